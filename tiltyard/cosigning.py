"""Cosignatures of witnesses on checkpoints: who has seen a log at a size and found that it only grew, and when.

The format is C2SP's tlog-cosignature (cosignature/v1, Ed25519): a signature line in a signed note. A witness is named
by a verifier key, `name+hash+base64`, as in C2SP's signed-note. Pure.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature as _BadSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tiltyard.identity import Key
from tiltyard.transparency import InvalidNote

_COSIGNATURE = 0x04
_KEY_HASH_BYTES = 4
_TIME_BYTES = 8
_DASH = "\u2014 "


@dataclass(frozen=True)
class WitnessKey:
    """Whose cosignatures are looked for: a name, and a raw Ed25519 key of 32 bytes."""

    name: str
    public_key: bytes

    @property
    def key_hash(self) -> bytes:
        """The four bytes that a signature line begins with."""
        body = self.name.encode() + b"\n" + bytes([_COSIGNATURE]) + self.public_key
        return hashlib.sha256(body).digest()[:_KEY_HASH_BYTES]

    def __str__(self) -> str:
        encoded = base64.b64encode(bytes([_COSIGNATURE]) + self.public_key).decode()
        return f"{self.name}+{self.key_hash.hex()}+{encoded}"

    @staticmethod
    def check_name(name: str) -> None:
        """Raises ValueError for a name that no line of a note can hold."""
        if not name or "+" in name or not name.isprintable() or any(char.isspace() for char in name):
            raise ValueError(f"{name!r} is no name of a witness: it may hold neither spaces nor plus signs")

    @classmethod
    def parse(cls, text: str) -> "WitnessKey":
        """The reverse of `str`. Raises ValueError."""
        name, _, rest = text.strip().partition("+")
        _, _, encoded = rest.partition("+")
        try:
            raw = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            raw = b""
        found = cls(name, raw[1:])
        if raw[:1] != bytes([_COSIGNATURE]) or len(raw) != 33 or str(found) != text.strip():
            raise ValueError("a witness is named as name+hash+base64, with an Ed25519 key for cosignature/v1")
        return found


def cosign(note: str, *, key: Key, name: str, time_s: int) -> str:
    """The note with one more line: that `name` saw this checkpoint at a time in seconds since 1970."""
    body = _body(note)
    WitnessKey.parse(str(WitnessKey(name, key.public_bytes)))
    signature = key.sign(_signed(body, time_s))
    line = WitnessKey(name, key.public_bytes).key_hash + time_s.to_bytes(_TIME_BYTES, "big") + signature
    return f"{note}{_DASH}{name} {base64.b64encode(line).decode()}\n"


def verify_cosignature(note: str, witness: WitnessKey) -> int:
    """When the witness saw the note, in seconds since 1970. Raises InvalidNote without its valid line."""
    body = _body(note)
    for line in note[len(body) :].split("\n"):
        signer, _, encoded = line.removeprefix(_DASH).partition(" ")
        if not line.startswith(_DASH) or signer != witness.name:
            continue
        try:
            raw = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            raise InvalidNote("a cosignature is not base64") from None
        if raw[:_KEY_HASH_BYTES] != witness.key_hash:
            continue
        time_s = int.from_bytes(raw[_KEY_HASH_BYTES : _KEY_HASH_BYTES + _TIME_BYTES], "big")
        try:
            Ed25519PublicKey.from_public_bytes(witness.public_key).verify(
                raw[_KEY_HASH_BYTES + _TIME_BYTES :], _signed(body, time_s)
            )
        except (_BadSignature, ValueError):
            raise InvalidNote(f"the cosignature of {witness.name} does not match") from None
        return time_s
    raise InvalidNote(f"there is no cosignature of {witness.name} with this key")


def _signed(body: str, time_s: int) -> bytes:
    return f"cosignature/v1\ntime {time_s}\n{body}".encode()


def _body(note: str) -> str:
    body, separator, _ = note.rpartition("\n\n")
    if not separator:
        raise InvalidNote("a note is a text, an empty line, and signature lines")
    return body + "\n"
