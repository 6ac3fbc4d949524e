"""BLS12-381 signatures (AugSchemeMPL) of the selector: one key and one message have exactly one signature.

That is what makes a draw's sigma fair: whoever holds the key can neither choose it nor know it
before the message is fixed.
Source: draft-irtf-cfrg-bls-signature, message augmentation scheme, as implemented by chia_rs.
"""

import os
import secrets
from pathlib import Path

from chia_rs import AugSchemeMPL, G1Element, G2Element, PrivateKey

PUBLIC_KEY_BYTES = 48
SIGNATURE_BYTES = 96
SEED_BYTES = 32

# The point at infinity as a compressed public key: its signatures hold for any message under the basic scheme.
_INFINITY = bytes([0xC0]) + bytes(PUBLIC_KEY_BYTES - 1)


class BlsKey:
    """A private key that signs draws and their receipts."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a key is made from {SEED_BYTES} bytes, not {len(seed)}")
        self._key: PrivateKey = AugSchemeMPL.key_gen(seed)
        # Given with each message, it need not be computed again: a fifth of the time of a signature.
        self._point: G1Element = self._key.get_g1()
        self.public_key: bytes = self._point.to_bytes()

    @classmethod
    def load_or_create(cls, path: Path) -> "BlsKey":
        """Reads the key's seed (64 hex digits), or makes one that only the owner of the file may read.

        Raises ValueError for a file that holds no seed.
        """
        try:
            text = path.read_text().strip()
        except FileNotFoundError:
            text = _create(path)
        try:
            return cls(bytes.fromhex(text))
        except ValueError as error:
            raise ValueError(f"{path} holds no BLS key seed of {2 * SEED_BYTES} hex digits") from error

    def sign(self, message: bytes) -> bytes:
        """The one signature over `message`, 96 bytes."""
        return AugSchemeMPL.sign(self._key, message, self._point).to_bytes()


def is_public_key(public_key: bytes) -> bool:
    """True for the 48 bytes of a point that a key can have: in the right group, and not at infinity."""
    if len(public_key) != PUBLIC_KEY_BYTES or public_key == _INFINITY:
        return False
    try:
        G1Element.from_bytes(public_key)
    except ValueError:
        return False
    return True


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """True when `signature` is the holder's over `message`. False for malformed bytes and for a key at infinity."""
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES or public_key == _INFINITY:
        return False
    try:
        # from_bytes checks that both points lie in the right subgroup.
        return AugSchemeMPL.verify(G1Element.from_bytes(public_key), message, G2Element.from_bytes(signature))
    except ValueError:
        return False


def _create(path: Path) -> str:
    """Writes a fresh seed beside `path` and links it there: a crash leaves no half key, and a race has one winner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(SEED_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)
        except FileExistsError:
            return path.read_text().strip()
    finally:
        fresh.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return path.read_text().strip()
