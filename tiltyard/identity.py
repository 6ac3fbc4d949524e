"""Who a participant is: an Ed25519 key, its short-lived bearer tokens, and the envelopes it signs."""

import base64
import binascii
import contextlib
import hashlib
import json
import math
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import jwt
from cryptography.exceptions import InvalidSignature as _BadSignature
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tiltyard.keyfiles import KeyLock, encrypt_pem, is_encrypted, read_secret, write_secret

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
TOKEN_LIFETIME_S = 240
_ID_DIGITS = 40
_RENEWAL_S = 60
_MAX_TOKEN_CHARS = 4096
_SHOWN_CHARS = 300


class InvalidToken(Exception):
    """A bearer token that proves nothing; `reason` says why, in words fit for the caller."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LockedKey(ValueError):
    """A key file that is encrypted, where no passphrase is given."""


class InvalidSignature(Exception):
    """An envelope whose signature, key or payload type is not what it claims."""


def participant_id(public_key: bytes) -> str:
    """The id of the holder of a raw 32-byte Ed25519 public key: the first 40 hex digits of its SHA-256."""
    return hashlib.sha256(public_key).hexdigest()[:_ID_DIGITS]


class Key:
    """An Ed25519 private key. Two calls of `sign` on the same bytes give the same 64-byte signature (RFC 8032)."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.public_bytes: bytes = private_key.public_key().public_bytes_raw()
        self.id: str = participant_id(self.public_bytes)

    def __repr__(self) -> str:
        return f"Key(id={self.id!r})"

    @classmethod
    def generate(cls) -> "Key":
        """A new key from the system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path, lock: KeyLock = KeyLock()) -> "Key":  # noqa: B008 - frozen
        """The key in a PKCS #8 PEM file, encrypted or not.

        Raises FileNotFoundError, or ValueError naming the file: no Ed25519 key, another passphrase, an unencrypted file
        that others may read or that `lock` does not allow.
        """
        pem, closed = read_secret(path)
        encrypted = is_encrypted(pem)
        if encrypted and lock.passphrase is None:
            raise LockedKey(f"{path} is encrypted, and no passphrase is given")
        if not encrypted and lock.required:
            raise ValueError(f"{path} is not encrypted, as keys must be here")
        key = cls.from_pem(pem, lock.passphrase if encrypted else None, source=str(path))
        if not encrypted and not closed:
            raise ValueError(f"{path} may be read by others: chmod 600 {path}")
        return key

    @classmethod
    def from_pem(cls, pem: bytes, passphrase: bytes | None = None, *, source: str = "this") -> "Key":
        """The key in PKCS #8 PEM. Raises ValueError, naming its `source`."""
        try:
            private_key = serialization.load_pem_private_key(pem, password=passphrase)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            what = "key that this passphrase opens" if passphrase is not None else "unencrypted PEM key"
            raise ValueError(f"{source} holds no {what}") from error
        if not isinstance(private_key, Ed25519PrivateKey):
            raise ValueError(f"{source} holds a key of another kind than Ed25519")
        return cls(private_key)

    def to_pem(self, passphrase: bytes | None = None) -> bytes:
        """PKCS #8 PEM, encrypted under a passphrase where one is given."""
        plain = serialization.NoEncryption()
        if passphrase is None:
            encoding = serialization.Encoding.PEM
            return self._private_key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
        der = self._private_key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, plain)
        return encrypt_pem(der, passphrase)

    def save(self, path: Path, lock: KeyLock = KeyLock()) -> None:  # noqa: B008 - frozen
        """Writes the key as PKCS #8 PEM with mode 0600, whole or not at all; FileExistsError where a file is.

        Encrypted where `lock` has a passphrase. Raises ValueError where it needs one and has none.
        """
        if lock.required and lock.passphrase is None:
            raise ValueError(f"{path}: keys must be encrypted here, and no passphrase is given")
        write_secret(path, self.to_pem(lock.passphrase))

    @classmethod
    def load_or_create(cls, path: Path, lock: KeyLock = KeyLock()) -> "Key":  # noqa: B008 - frozen
        """The key in `path`, made on the first call; two processes that start at once end up with one key."""
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                cls.generate().save(path, lock)
        return cls.load(path, lock)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `message`."""
        return self._private_key.sign(message)


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def issue_token(key: Key, *, audience: str, lifetime_s: int = TOKEN_LIFETIME_S, now: float | None = None) -> str:
    """A JWT (EdDSA, RFC 8037) that proves possession of `key` to `audience` from `now` (Unix seconds) on."""
    issued_at = int(time.time() if now is None else now)
    return jwt.encode(
        {"sub": key.id, "aud": audience, "iat": issued_at, "exp": issued_at + lifetime_s},
        key._private_key,
        algorithm="EdDSA",
        headers={"jwk": {"kty": "OKP", "crv": "Ed25519", "x": _base64url(key.public_bytes)}},
    )


class TokenSource:
    """Keeps one token of `key` for `audience` and renews it when less than a minute is left. Safe between threads."""

    def __init__(self, key: Key, audience: str) -> None:
        self._key = key
        self._audience = audience
        self._lock = threading.Lock()
        self._token = ""
        self._expires_at = -math.inf

    def token(self, now: float | None = None) -> str:
        """A token that is good for another minute at least."""
        moment = time.time() if now is None else now
        with self._lock:
            # One from the future is of before the clock was set back: servers refuse it until that time has come.
            if not _RENEWAL_S <= self._expires_at - moment <= TOKEN_LIFETIME_S:
                self._token = issue_token(self._key, audience=self._audience, now=moment)
                self._expires_at = int(moment) + TOKEN_LIFETIME_S
            return self._token


@dataclass(frozen=True)
class TokenClaims:
    """What a checked token proves: the caller's id and raw public key, until `expires_at` (Unix seconds)."""

    id: str
    public_key: bytes
    expires_at: float


def _token_key(token: str) -> bytes:
    try:
        header = jwt.get_unverified_header(token)
    except jwt.InvalidTokenError:
        raise InvalidToken("not a JWT") from None
    if header.get("alg") != "EdDSA":
        raise InvalidToken("alg must be EdDSA")
    jwk = header.get("jwk")
    if not isinstance(jwk, dict):
        raise InvalidToken("the header carries no jwk")
    encoded = jwk.get("x")
    if jwk.get("kty") != "OKP" or jwk.get("crv") != "Ed25519" or not isinstance(encoded, str):
        raise InvalidToken("jwk is not an Ed25519 public key")
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvalidToken("jwk is not an Ed25519 public key") from None
    if len(raw) != PUBLIC_KEY_BYTES:
        raise InvalidToken("jwk is not an Ed25519 public key")
    return raw


def _moment(claims: dict[str, object], name: str) -> float:
    value = claims.get(name)
    # NaN and Infinity are numbers to Python's JSON, and every comparison with NaN is false.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidToken(f"{name} is missing or not a time")
    return float(value)


def verify_token(
    token: str, *, audience: str | Collection[str], now: float, leeway_s: float = 120, max_age_s: float = 300
) -> TokenClaims:
    """Checks a token made by `issue_token` at `now` (Unix seconds), clocks being up to `leeway_s` apart.

    `audience` is the one (or the several) that this server answers to. Raises InvalidToken: wrong audience, expired,
    issued in the future, living longer than `max_age_s`, another algorithm than EdDSA, no key, a key that does not hash
    to the subject, a signature that does not match.
    """
    if len(token) > _MAX_TOKEN_CHARS:
        raise InvalidToken("too long")
    public_key = _token_key(token)
    try:
        claims: dict[str, object] = jwt.decode(
            token,
            Ed25519PublicKey.from_public_bytes(public_key),
            algorithms=["EdDSA"],
            # Times and audience are checked below, against the given clock.
            options={"verify_aud": False, "verify_exp": False, "verify_iat": False, "verify_nbf": False},
        )
    except (jwt.InvalidTokenError, ValueError):
        raise InvalidToken("the signature does not match") from None
    subject = claims.get("sub")
    if not isinstance(subject, str) or subject != participant_id(public_key):
        raise InvalidToken("the key does not hash to sub")
    accepted = {audience} if isinstance(audience, str) else audience
    named = claims.get("aud")
    if not isinstance(named, str) or named not in accepted:
        # Signed by the caller, but its text: shown as one line of ASCII, and no longer than names are.
        raise InvalidToken(f"the token is for another audience, {ascii(named)[:_SHOWN_CHARS]}, not {min(accepted)!r}")
    issued_at, expires_at = _moment(claims, "iat"), _moment(claims, "exp")
    if expires_at - issued_at > max_age_s:
        raise InvalidToken(f"the token lives longer than {max_age_s:g} seconds")
    if issued_at - leeway_s > now:
        raise InvalidToken("the token was issued in the future")
    if expires_at + leeway_s < now:
        raise InvalidToken("the token has expired")
    return TokenClaims(id=subject, public_key=public_key, expires_at=expires_at)


@dataclass(frozen=True)
class Envelope:
    """A signed statement that outlives its call: DSSE v1 with one signature and the raw public key beside it."""

    payload_type: str
    payload: bytes
    signature: bytes
    public_key: bytes


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed: DSSE v1's pre-authentication encoding (secure-systems-lab/dsse, protocol.md)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign_envelope(key: Key, payload_type: str, payload: bytes) -> Envelope:
    """Signs `payload` as a statement of type `payload_type`."""
    return Envelope(payload_type, payload, key.sign(pae(payload_type, payload)), key.public_bytes)


def verify_envelope(envelope: Envelope, *, payload_type: str) -> str:
    """The participant id of the signer of an envelope of type `payload_type`. Raises InvalidSignature."""
    if envelope.payload_type != payload_type:
        raise InvalidSignature(f"payload type is {envelope.payload_type!r}, expected {payload_type!r}")
    if len(envelope.public_key) != PUBLIC_KEY_BYTES:
        raise InvalidSignature(f"public key has {len(envelope.public_key)} bytes, expected {PUBLIC_KEY_BYTES}")
    try:
        public_key = Ed25519PublicKey.from_public_bytes(envelope.public_key)
        public_key.verify(envelope.signature, pae(envelope.payload_type, envelope.payload))
    except (_BadSignature, ValueError):
        raise InvalidSignature("the signature does not match") from None
    return participant_id(envelope.public_key)


def envelope_to_json(envelope: Envelope) -> str:
    """DSSE's JSON form, with the public key (base64) beside the signature so that it can be checked offline."""
    signature = {
        "keyid": participant_id(envelope.public_key),
        "sig": base64.b64encode(envelope.signature).decode(),
        "public_key": base64.b64encode(envelope.public_key).decode(),
    }
    body = {
        "payloadType": envelope.payload_type,
        "payload": base64.b64encode(envelope.payload).decode(),
        "signatures": [signature],
    }
    return json.dumps(body)
