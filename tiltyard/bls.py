"""BLS12-381 signatures (AugSchemeMPL) of the selector: one key and one message have exactly one signature.

That is what makes a draw's sigma fair: whoever holds the key can neither choose it nor know it
before the message is fixed.
Source: draft-irtf-cfrg-bls-signature, message augmentation scheme, as implemented by chia_rs.
"""

import contextlib
import secrets
from pathlib import Path

from chia_rs import AugSchemeMPL, G1Element, G2Element, PrivateKey

from tiltyard.keyfiles import KeyLock, decrypt_pem, encrypt_pem, is_encrypted, read_secret, write_secret

PUBLIC_KEY_BYTES = 48
SIGNATURE_BYTES = 96
SEED_BYTES = 32
_LABEL = "ENCRYPTED BLS SEED"
_SEED_MARK = b"tiltyard/bls-seed/v1\n"

# The point at infinity as a compressed public key: its signatures hold for any message under the basic scheme.
_INFINITY = bytes([0xC0]) + bytes(PUBLIC_KEY_BYTES - 1)


class BlsKey:
    """A private key that signs draws and their receipts."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a key is made from {SEED_BYTES} bytes, not {len(seed)}")
        self._seed = seed
        self._key: PrivateKey = AugSchemeMPL.key_gen(seed)
        # Given with each message, it need not be computed again: a fifth of the time of a signature.
        self._point: G1Element = self._key.get_g1()
        self.public_key: bytes = self._point.to_bytes()

    @classmethod
    def load_or_create(cls, path: Path, lock: KeyLock = KeyLock()) -> "BlsKey":  # noqa: B008 - frozen
        """Reads the key's seed, or makes one that only the owner of the file may read.

        The file is 64 hex digits, or an encrypted seed where `lock` has a passphrase. Raises ValueError for a file that
        holds no seed, that is encrypted under another passphrase, or that is not encrypted where it must be.
        """
        try:
            return cls.load(path, lock)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                cls(secrets.token_bytes(SEED_BYTES)).save(path, lock)
            return cls.load(path, lock)

    @classmethod
    def load(cls, path: Path, lock: KeyLock = KeyLock()) -> "BlsKey":  # noqa: B008 - frozen
        """The key in a file, as `load_or_create` reads it. Raises OSError and ValueError."""
        content, closed = read_secret(path)
        return cls(_opened(content, lock, closed, str(path)))

    @classmethod
    def from_pem(cls, pem: bytes, passphrase: bytes, *, source: str = "this") -> "BlsKey":
        """The key in an encrypted PEM. Raises ValueError, naming its `source`."""
        return cls(_opened(pem, KeyLock(passphrase, required=True), True, source))

    def to_pem(self, passphrase: bytes) -> bytes:
        """The seed as PEM, encrypted under a passphrase."""
        return _sealed(self._seed, KeyLock(passphrase))

    def save(self, path: Path, lock: KeyLock = KeyLock()) -> None:  # noqa: B008 - frozen
        """Writes the seed with mode 0600, whole or not at all; FileExistsError where a file is.

        Encrypted where `lock` has a passphrase. Raises ValueError where it needs one and has none.
        """
        write_secret(path, _sealed(self._seed, lock))

    def sign(self, message: bytes) -> bytes:
        """The one signature over `message`, 96 bytes."""
        return AugSchemeMPL.sign(self._key, message, self._point).to_bytes()


def is_seed_file(content: bytes) -> bool:
    """Whether a key file is one of these, and not of an Ed25519 key."""
    return is_encrypted(content, label=_LABEL) or len(content.strip()) == 2 * SEED_BYTES


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


def _sealed(seed: bytes, lock: KeyLock) -> bytes:
    """The content of a file that holds `seed`."""
    if lock.passphrase is not None:
        return encrypt_pem(_SEED_MARK + seed, lock.passphrase, label=_LABEL)
    if lock.required:
        raise ValueError("keys must be encrypted here, and no passphrase is given")
    return seed.hex().encode() + b"\n"


def _opened(content: bytes, lock: KeyLock, closed: bool, source: str) -> bytes:
    """The seed in such a file."""
    if is_encrypted(content, label=_LABEL):
        if lock.passphrase is None:
            raise ValueError(f"{source} is encrypted, and no passphrase is given")
        marked = decrypt_pem(content, lock.passphrase, label=_LABEL)
        # A wrong passphrase that happened to leave good padding leaves no mark.
        if not marked.startswith(_SEED_MARK) or len(marked) != len(_SEED_MARK) + SEED_BYTES:
            raise ValueError(f"{source} is encrypted under another passphrase")
        return marked.removeprefix(_SEED_MARK)
    if lock.required:
        raise ValueError(f"{source} is not encrypted, as keys must be here")
    try:
        seed = bytes.fromhex(content.decode())
    except ValueError as error:
        raise ValueError(f"{source} holds no BLS key seed of {2 * SEED_BYTES} hex digits") from error
    if len(seed) != SEED_BYTES:
        raise ValueError(f"{source} holds no BLS key seed of {2 * SEED_BYTES} hex digits")
    if not closed:
        raise ValueError(f"{source} may be read by others: chmod 600 {source}")
    return seed
