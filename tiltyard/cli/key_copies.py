"""Copies of keys for safe keeping: an encrypted key below lines that say which it is and what it must hash to."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from tiltyard.cli.connection import CommandError, key_lock, load_key

if TYPE_CHECKING:
    from tiltyard.bls import BlsKey
    from tiltyard.identity import Key

    AnyKey = Key | BlsKey

_TITLE = "Tiltyard key, encrypted copy"
_ID = "id "
_SUM = "sha256 of what follows "


def load_any_key(path: Path) -> "AnyKey":
    """The Ed25519 key in a file, or the selector's BLS key. Raises CommandError."""
    from tiltyard.bls import BlsKey, is_seed_file

    try:
        if not is_seed_file(path.read_bytes()):
            return load_key(path)
        return BlsKey.load(path, key_lock())
    except FileNotFoundError:
        return load_key(path)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None


def public_key_of(key: "AnyKey") -> bytes:
    """The raw public key, 32 bytes of an Ed25519 key and 48 of a BLS key."""
    from tiltyard.identity import Key

    return key.public_bytes if isinstance(key, Key) else key.public_key


def id_of(key: "AnyKey") -> str:
    """What names a key: the participant id, or for a BLS key, which is no participant's, its public key in hex."""
    from tiltyard.identity import Key

    return key.id if isinstance(key, Key) else key.public_key.hex()


def key_copy(key: "AnyKey", passphrase: bytes) -> bytes:
    """The copy's content."""
    pem = key.to_pem(passphrase)
    return f"{_TITLE}\n{_ID}{id_of(key)}\n{_SUM}{hashlib.sha256(pem).hexdigest()}\n".encode() + pem


def check_is_copy(path: Path) -> None:
    """Raises OSError, and CommandError for a file that `tiltyard key export` did not write."""
    if path.read_bytes().partition(b"\n")[0].decode(errors="replace") != _TITLE:
        raise CommandError(f"{path} is no copy that `tiltyard key export` wrote")


def read_key_copy(path: Path, passphrase: bytes) -> "AnyKey":
    """The key in such a copy.

    Raises OSError, ValueError for another passphrase, CommandError when it is none, is damaged, or holds another key
    than it says.
    """
    from tiltyard.bls import BlsKey, is_seed_file
    from tiltyard.identity import Key

    check_is_copy(path)
    _, _, rest = path.read_bytes().partition(b"\n")
    named, _, rest = rest.partition(b"\n")
    checksum, _, pem = rest.partition(b"\n")
    if checksum.decode(errors="replace") != _SUM + hashlib.sha256(pem).hexdigest():
        raise CommandError(f"{path} is damaged: its checksum is another")
    kind = BlsKey if is_seed_file(pem) else Key
    key = kind.from_pem(pem, passphrase, source=str(path))
    if named.decode(errors="replace") != _ID + id_of(key):
        raise CommandError(f"{path} holds the key of {id_of(key)}, not the one that it names")
    return key
