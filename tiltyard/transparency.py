"""The record log's arithmetic: RFC 9162 Merkle trees, their proofs, and checkpoints as signed notes.

Hashes are SHA-256: a leaf is H(0x00 || entry), a node H(0x01 || left || right), the empty tree H(""). Section numbers
are those of RFC 9162. Signed notes and checkpoints follow C2SP (c2sp.org/signed-note, c2sp.org/tlog-checkpoint).
"""

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature as _BadSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tiltyard.identity import Key

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()

_ED25519_NOTE = 0x01
_KEY_HASH_BYTES = 4
# A tree has fewer than 2^63 leaves.
_MOST_DIGITS = 19

Node = tuple[int, int]
"""A complete subtree: its level (0 for leaves) and its index among those of that level."""
ReadNode = Callable[[int, int], bytes]
"""The hash of the complete subtree at (level, index)."""


def leaf_hash(entry: bytes) -> bytes:
    """Hash of one leaf, 32 bytes (2.1.1)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node over its children's hashes, 32 bytes (2.1.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """A tree that only grows, held by the roots of its complete subtrees, the largest first: O(log n) hashes.

    Reading back `size` and `hashes` gives an equal frontier: this is all that a store has to keep.
    """

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        if size < 0 or len(hashes) != size.bit_count() or any(len(value) != HASH_BYTES for value in hashes):
            raise ValueError(f"a frontier of {size} leaves has {max(size, 0).bit_count()} hashes of {HASH_BYTES} bytes")
        self._size = size
        self._hashes = list(hashes)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return self._size

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """Roots of the complete subtrees, the largest (leftmost) first."""
        return tuple(self._hashes)

    def append(self, leaf: bytes) -> list[tuple[Node, bytes]]:
        """Add a leaf by its hash; answers with the subtrees that it completed, the leaf itself first."""
        level, index, current = 0, self._size, leaf
        completed = [((level, index), current)]
        while index & 1:
            current = node_hash(self._hashes.pop(), current)
            level, index = level + 1, index >> 1
            completed.append(((level, index), current))
        self._hashes.append(current)
        self._size += 1
        return completed

    def root(self) -> bytes:
        """Root of the tree, 32 bytes; of the empty tree the hash of nothing."""
        return _fold(self._hashes)


def root_hash(leaf_hashes: Sequence[bytes]) -> bytes:
    """Root of the tree over these leaf hashes, in order (2.1.1)."""
    frontier = Frontier()
    for value in leaf_hashes:
        frontier.append(value)
    return frontier.root()


def _fold(hashes: Sequence[bytes]) -> bytes:
    if not hashes:
        return EMPTY_ROOT
    *rest, root = hashes
    for value in reversed(rest):
        root = node_hash(value, root)
    return root


def _complete_subtrees(start: int, end: int) -> Iterator[Node]:
    """The complete subtrees that tile [start, end), left to right."""
    while start < end:
        level = (end - start).bit_length() - 1
        if start:
            level = min(level, (start & -start).bit_length() - 1)
        yield level, start >> level
        start += 1 << level


def _range_hash(start: int, end: int, read: ReadNode) -> bytes:
    return _fold([read(level, index) for level, index in _complete_subtrees(start, end)])


def _split(size: int) -> int:
    """The largest power of two below `size`, which is 2 or more."""
    return 1 << ((size - 1).bit_length() - 1)


def inclusion_proof(index: int, size: int, read: ReadNode) -> list[bytes]:
    """The path from leaf `index` to the root of the first `size` leaves, from the leaf's sibling up (2.1.3.1).

    `read` is asked for complete subtrees below `size` only. Raises ValueError for an index beyond the size.
    """
    if not 0 <= index < size:
        raise ValueError(f"there is no leaf {index} in a tree of {size}")
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_range_hash(middle, end, read))
            end = middle
        else:
            path.append(_range_hash(start, middle, read))
            start = middle
    path.reverse()
    return path


def verify_inclusion(*, leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """Whether `path` proves the leaf with hash `leaf` at `index` of the tree of `size` leaves (2.1.3.2)."""
    if not 0 <= index < size:
        return False
    position, last, current = index, size - 1, leaf
    for value in path:
        if last == 0:
            return False
        if position & 1 or position == last:
            current = node_hash(value, current)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            current = node_hash(current, value)
        position, last = position >> 1, last >> 1
    return last == 0 and current == root


def consistency_proof(old_size: int, new_size: int, read: ReadNode) -> list[bytes]:
    """What proves that the first `old_size` leaves are a beginning of the first `new_size` (2.1.4.1).

    Empty for an empty or equal old tree. Raises ValueError for an old size beyond the new one.
    """
    if not 0 <= old_size <= new_size:
        raise ValueError(f"a tree of {old_size} leaves is no beginning of one of {new_size}")
    if old_size in (0, new_size):
        return []
    path: list[bytes] = []
    start, end = 0, new_size
    whole = True
    while end != old_size:
        middle = start + _split(end - start)
        if old_size <= middle:
            path.append(_range_hash(middle, end, read))
            end = middle
        else:
            path.append(_range_hash(start, middle, read))
            start, whole = middle, False
    if not whole:
        path.append(_range_hash(start, end, read))
    path.reverse()
    return path


def verify_consistency(
    *, old_size: int, new_size: int, path: Sequence[bytes], old_root: bytes, new_root: bytes
) -> bool:
    """Whether `path` proves that the tree with `old_root` is a beginning of the tree with `new_root` (2.1.4.2)."""
    if not 0 <= old_size <= new_size:
        return False
    if old_size == new_size:
        return not path and old_root == new_root
    if old_size == 0:
        return not path and old_root == EMPTY_ROOT
    hashes = list(path)
    if old_size & (old_size - 1) == 0:
        hashes.insert(0, old_root)
    if not hashes:
        return False
    position, last = old_size - 1, new_size - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    old = new = hashes[0]
    for value in hashes[1:]:
        if last == 0:
            return False
        if position & 1 or position == last:
            old, new = node_hash(value, old), node_hash(value, new)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            new = node_hash(new, value)
        position, last = position >> 1, last >> 1
    return last == 0 and old == old_root and new == new_root


class InvalidNote(ValueError):
    """A note that is not of the form, is of another log, or whose signature fails."""


@dataclass(frozen=True)
class Checkpoint:
    """What a log says of itself at one size."""

    origin: str
    size: int
    root: bytes
    """RFC 9162 root hash, 32 bytes."""


def checkpoint_body(checkpoint: Checkpoint) -> str:
    """The text that is signed: origin, size, root in base64, each on a line (tlog-checkpoint)."""
    return f"{checkpoint.origin}\n{checkpoint.size}\n{base64.b64encode(checkpoint.root).decode()}\n"


def parse_checkpoint(body: str) -> Checkpoint:
    """The reverse of `checkpoint_body`; extension lines after the third are ignored. Raises InvalidNote."""
    lines = body.split("\n")
    if len(lines) < 4 or lines[-1] or not lines[0]:
        raise InvalidNote("a checkpoint has an origin, a size and a root, each on a line")
    try:
        root = base64.b64decode(lines[2], validate=True)
    except binascii.Error:
        raise InvalidNote("the root is not base64") from None
    number = lines[1]
    sized = number.isascii() and number.isdigit() and len(number) <= _MOST_DIGITS and number == str(int(number))
    if not sized or len(root) != HASH_BYTES:
        raise InvalidNote("size or root is not of the form")
    return Checkpoint(lines[0], int(number), root)


def _key_hash(name: str, public_key: bytes) -> bytes:
    digest = hashlib.sha256(name.encode() + b"\n" + bytes([_ED25519_NOTE]) + public_key).digest()
    return digest[:_KEY_HASH_BYTES]


def sign_note(key: Key, *, name: str, body: str) -> str:
    """`body` with a signature line of `key`, which is known to verifiers by `name` (signed-note).

    Raises ValueError for a body that does not end with a newline, or a name with spaces or a plus sign.
    """
    if not body.endswith("\n"):
        raise ValueError("the text of a note ends with a newline")
    if not name or "+" in name or any(char.isspace() for char in name):
        raise ValueError("the name of a note's key is not empty and holds no spaces and no plus sign")
    signature = _key_hash(name, key.public_bytes) + key.sign(body.encode())
    return f"{body}\n\u2014 {name} {base64.b64encode(signature).decode()}\n"


def verify_note(note: str, *, name: str, public_key: bytes) -> str:
    """The body of a note that the holder of `public_key` (raw Ed25519, 32 bytes) signed as `name`.

    Lines of other signers are ignored, as the format asks. Raises InvalidNote.
    """
    body, separator, signatures = note.rpartition("\n\n")
    if not separator or not signatures.endswith("\n"):
        raise InvalidNote("a note is a text, an empty line, and signature lines")
    body += "\n"
    wanted = _key_hash(name, public_key)
    for line in signatures[:-1].split("\n"):
        if not line.startswith("\u2014 "):
            raise InvalidNote("a signature line begins with an em dash")
        signer, _, encoded = line[2:].partition(" ")
        try:
            raw = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            raise InvalidNote("a signature is not base64") from None
        if signer != name or raw[:_KEY_HASH_BYTES] != wanted:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(raw[_KEY_HASH_BYTES:], body.encode())
        except (_BadSignature, ValueError):
            raise InvalidNote("the signature does not match") from None
        return body
    raise InvalidNote(f"there is no signature of {name} with this key")
