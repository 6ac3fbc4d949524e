"""How keys lie on disk: encrypted under a passphrase or closed to others, written whole or not at all."""

import base64
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.padding import PKCS7

from tiltyard.foldersync import sync_folder

ENCRYPTED_LABEL = "ENCRYPTED PRIVATE KEY"

# scrypt (RFC 7914) at a strength that OWASP's cheat sheet on password storage names, in 16 MiB: OpenSSL's own reader
# takes no more than 32. About a quarter of a second of one core.
_COSTS = (1 << 14, 8, 5)
_SALT_BYTES = 16
_AES_KEY_BYTES = 32
_AES_BLOCK_BYTES = 16

# Object identifiers in DER: PBES2 (RFC 8018), id-scrypt (RFC 7914), aes256-CBC-PAD (RFC 8018).
_PBES2 = bytes.fromhex("06092a864886f70d01050d")
_ID_SCRYPT = bytes.fromhex("06092b06010401da47040b")
_AES256_CBC = bytes.fromhex("060960864801650304012a")


@dataclass(frozen=True)
class KeyLock:
    """What key files are encrypted with, and whether one that is not may be read.

    Without a passphrase new files are plaintext, of mode 0600. A plaintext file is read with or without one, unless
    `required`.
    """

    passphrase: bytes | None = field(default=None, repr=False)
    required: bool = False

    @classmethod
    def read(cls, passphrase_file: Path | None, *, required: bool = False) -> "KeyLock":
        """The passphrase in the first line of a file. Raises OSError, or ValueError for an empty or missing one."""
        if passphrase_file is None:
            if required:
                raise ValueError("keys must be encrypted, and no file is named that holds the passphrase")
            return cls()
        first = passphrase_file.read_bytes().split(b"\n", 1)[0].rstrip(b"\r")
        if not first:
            raise ValueError(f"{passphrase_file} holds no passphrase in its first line")
        return cls(first, required)


def encrypt_pem(content: bytes, passphrase: bytes, *, label: str = ENCRYPTED_LABEL) -> bytes:
    """PEM of an EncryptedPrivateKeyInfo (RFC 5958) around `content`, by PBES2 with scrypt and AES-256.

    With PKCS #8 DER as content OpenSSL reads it, as do other libraries; `cryptography`, which reads it for us, writes
    PBKDF2 of 2048 rounds only.
    """
    salt, iv = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_AES_BLOCK_BYTES)
    padder = PKCS7(8 * _AES_BLOCK_BYTES).padder()
    cipher = _cipher(passphrase, salt, iv).encryptor()
    encrypted = cipher.update(padder.update(content) + padder.finalize()) + cipher.finalize()
    return _pem(_layout(salt, iv, encrypted), label)


def _layout(salt: bytes, iv: bytes, encrypted: bytes) -> bytes:
    """The one DER that we write around encrypted bytes."""
    parameters = _der(0x04, salt) + b"".join(map(_integer, _COSTS))
    derivation = _der(0x30, _ID_SCRYPT + _der(0x30, parameters))
    algorithm = _der(0x30, _PBES2 + _der(0x30, derivation + _der(0x30, _AES256_CBC + _der(0x04, iv))))
    return _der(0x30, algorithm + _der(0x04, encrypted))


def decrypt_pem(pem: bytes, passphrase: bytes, *, label: str) -> bytes:
    """What `encrypt_pem` was given. Raises ValueError for other bytes, and nearly always for another passphrase.

    The content must be such that its reader knows it: one wrong passphrase in 256 decrypts to nonsense.
    """
    lines = pem.decode("ascii", errors="replace").strip().splitlines()
    if len(lines) < 3 or lines[0] != f"-----BEGIN {label}-----" or lines[-1] != f"-----END {label}-----":
        raise ValueError(f"no {label}")
    try:
        der = base64.b64decode("".join(lines[1:-1]), validate=True)
        [(_, whole)] = _parts(der)
        (_, algorithm), (_, encrypted) = _parts(whole)
        _, (_, parameters) = _parts(algorithm)
        (_, derivation), (_, encryption) = _parts(parameters)
        _, (_, costs) = _parts(derivation)
        (_, salt), *_ = _parts(costs)
        _, (_, iv) = _parts(encryption)
    except (ValueError, IndexError) as error:
        raise ValueError(f"a damaged {label}") from error
    if _layout(salt, iv, encrypted) != der or len(iv) != _AES_BLOCK_BYTES:
        raise ValueError(f"a damaged {label}, or one of another making")
    decryptor, unpadder = _cipher(passphrase, salt, iv).decryptor(), PKCS7(8 * _AES_BLOCK_BYTES).unpadder()
    try:
        padded = decryptor.update(encrypted) + decryptor.finalize()
        return unpadder.update(padded) + unpadder.finalize()
    except ValueError as error:
        raise ValueError(f"another passphrase than that of the {label}") from error


def _cipher(passphrase: bytes, salt: bytes, iv: bytes) -> Cipher[modes.CBC]:
    key = Scrypt(salt, _AES_KEY_BYTES, *_COSTS).derive(passphrase)
    return Cipher(algorithms.AES256(key), modes.CBC(iv))


def _der(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def _parts(der: bytes) -> list[tuple[int, bytes]]:
    """The values that follow each other in `der`: tag and content of each. Raises ValueError and IndexError."""
    found, at = [], 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length & 0x80:
            octets = length & 0x7F
            length, at = int.from_bytes(der[at : at + octets], "big"), at + octets
        if at + length > len(der):
            raise ValueError("cut off")
        found.append((tag, der[at : at + length]))
        at += length
    return found


def _integer(value: int) -> bytes:
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _pem(der: bytes, label: str) -> bytes:
    text = base64.b64encode(der).decode()
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]).encode()


def is_encrypted(pem: bytes, *, label: str = ENCRYPTED_LABEL) -> bool:
    """Whether a PEM file holds an encrypted key."""
    return f"-----BEGIN {label}-----".encode() in pem


def read_secret(path: Path) -> tuple[bytes, bool]:
    """A secret file, and whether it is closed to others. Raises OSError.

    Its own user's file is closed with no right for anybody else. Another's that the group may read is closed, too:
    that is how a secret is mounted for a container's user.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        others = 0o077 if status.st_uid == os.geteuid() else 0o037
        return file.read(), not stat.S_IMODE(status.st_mode) & others


def write_secret(path: Path, content: bytes) -> None:
    """Writes a new file of mode 0600, whole or not at all; a folder that it makes for it is closed to others.

    Raises FileExistsError where a file is.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, fails where a file is there already.
        os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
