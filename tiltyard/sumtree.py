"""A Merkle sum tree: weights that can be changed, searched by cumulative weight, and proved, each in O(log n) steps.

Hashes are SHA-256 over bytes put one after the other; sums are 16 bytes big-endian:

- leaf: 0x00, the id in UTF-8, the weight;
- node: 0x01, left hash, left sum, right hash, right sum;
- root: 0x02, the number of leaves in 8 bytes big-endian, hash of the top node, its sum.

Leaves are filled up to a power of two with empty ones, whose hash is 32 zero bytes and whose weight is 0. A leaf keeps
its index for ever: one that is not wanted any more weighs 0. After Maxwell's summation trees (docs/sortition.md).
"""

import hashlib
import struct
from array import array
from bisect import insort
from collections.abc import Iterable, MutableSequence

HASH_BYTES = 32
SUM_BYTES = 16
SUM_LIMIT = 2**128

# Sums below this are kept in an array of machine words, which is small and fast; larger ones in a list.
_SMALL = 2**64
_RECORD_BYTES = HASH_BYTES + SUM_BYTES
_RECORD = struct.Struct(f"{HASH_BYTES}s{SUM_BYTES}s")
_PAIR_BYTES = 1 + 2 * _RECORD_BYTES
# Where the records of the two children begin in what is hashed for a node.
_LEFT, _RIGHT = 1, 1 + _RECORD_BYTES
_NO_RECORD = bytes(_RECORD_BYTES)
_MOST_GAPS = 256

_sha256 = hashlib.sha256


def leaf_hash(identifier: str, weight: int) -> bytes:
    """Hash of the leaf of `identifier`."""
    return hashlib.sha256(b"\x00" + identifier.encode() + weight.to_bytes(SUM_BYTES, "big")).digest()


def node_hash(left_hash: bytes, left_sum: int, right_hash: bytes, right_sum: int) -> bytes:
    """Hash of the node above two others."""
    left = left_hash + left_sum.to_bytes(SUM_BYTES, "big")
    right = right_hash + right_sum.to_bytes(SUM_BYTES, "big")
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_hash(leaf_count: int, top_hash: bytes, total: int) -> bytes:
    """Hash that stands for the whole tree, the number of its leaves included."""
    return hashlib.sha256(
        b"\x02" + leaf_count.to_bytes(8, "big") + top_hash + total.to_bytes(SUM_BYTES, "big")
    ).digest()


class SumTree:
    """Leaves with an id and a weight in a complete binary tree, kept in arrays: below node i are 2i and 2i + 1.

    A million leaves take some 220 MB, their ids and hashes included.
    """

    def __init__(self, leaves: Iterable[tuple[str, int]] = ()) -> None:
        self._ids: list[str] = []
        weights: list[int] = []
        for identifier, weight in leaves:
            self._ids.append(identifier)
            weights.append(_checked(weight))
        self._capacity = 1 << max(0, len(weights) - 1).bit_length()
        self._sums = _sums(2 * self._capacity, largest=_checked(sum(weights)))
        for node, weight in enumerate(weights, self._capacity):
            self._sums[node] = weight
        for node in range(self._capacity - 1, 0, -1):
            self._sums[node] = self._sums[2 * node] + self._sums[2 * node + 1]
        # Hashing a million leaves takes seconds and a draw needs none of it: hashes are made when first asked for.
        # What is hashed for node i lies in one piece, the records of its children after the tag, at i * _PAIR_BYTES.
        # The top node is the right child of a node 0, which has no other use.
        self._pairs: bytearray | None = None

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def total(self) -> int:
        """Sum of all weights."""
        return self._sums[1]

    def identifier(self, index: int) -> str:
        """Id of a leaf."""
        return self._ids[self._leaf(index) - self._capacity]

    def weight(self, index: int) -> int:
        """Weight of a leaf."""
        return self._sums[self._leaf(index)]

    def append(self, identifier: str, weight: int) -> int:
        """Adds a leaf and returns its index. Raises OverflowError when the sum would reach 2^128."""
        _checked(self._sums[1] + _checked(weight))
        if len(self._ids) == self._capacity:
            self._grow()
        index = len(self._ids)
        self._ids.append(identifier)
        self.set_weight(index, weight)
        return index

    def set_weight(self, index: int, weight: int) -> None:
        """Changes the weight of a leaf. Raises OverflowError when the sum would reach 2^128."""
        node = self._leaf(index)
        change = _checked(weight) - self._sums[node]
        if _checked(self._sums[1] + change) >= _SMALL and isinstance(self._sums, array):
            self._sums = list(self._sums)
        sums, pairs = self._sums, self._pairs
        sums[node] = weight
        if pairs is None:
            while node > 1:
                node >>= 1
                sums[node] += change
            return
        # The one loop that every change of a pool waits for: names are local, and each record is written in one piece.
        put, pair_bytes, sha256 = _RECORD.pack_into, _PAIR_BYTES, _sha256
        digest = leaf_hash(self._ids[index], weight)
        value = weight
        while node > 1:
            right = node & 1
            node >>= 1
            at = node * pair_bytes
            put(pairs, at + _RIGHT if right else at + _LEFT, digest, value.to_bytes(16, "big"))
            value = sums[node] + change
            sums[node] = value
            digest = sha256(pairs[at : at + pair_bytes]).digest()
        put(pairs, _RIGHT, digest, value.to_bytes(16, "big"))

    def root(self) -> bytes:
        """The root: it fixes every id, weight and place."""
        pairs = self._all_pairs()
        return _sha256(b"\x02" + len(self._ids).to_bytes(8, "big") + pairs[_RIGHT:_PAIR_BYTES]).digest()

    def path(self, index: int) -> bytes:
        """The nodes beside the way from a leaf up to the top node, each with its hash and its sum: 48 bytes a level.

        On which side of the way they lie follows from the index.
        """
        pairs = self._all_pairs()
        node = self._leaf(index)
        beside = []
        while node > 1:
            at = (node >> 1) * _PAIR_BYTES + (_LEFT if node & 1 else _RIGHT)
            beside.append(pairs[at : at + _RECORD_BYTES])
            node >>= 1
        return b"".join(beside)

    def _leaf(self, index: int) -> int:
        if not 0 <= index < len(self._ids):
            raise IndexError(f"no leaf {index} among {len(self._ids)}")
        return self._capacity + index

    def _grow(self) -> None:
        """Doubles the room: the whole tree becomes the left child of a new top node."""
        old, old_pairs, old_capacity = self._sums, self._pairs, self._capacity
        self._capacity = 2 * old_capacity
        self._sums = _sums(2 * self._capacity, largest=old[1])
        self._sums[1] = old[1]
        level = 1
        while level <= old_capacity:
            self._sums[2 * level : 3 * level] = old[level : 2 * level]
            level *= 2
        if old_pairs is None:
            return
        pairs = _blank_pairs(self._capacity)
        level = 1
        while level < old_capacity:
            moved = old_pairs[level * _PAIR_BYTES : 2 * level * _PAIR_BYTES]
            pairs[2 * level * _PAIR_BYTES : 3 * level * _PAIR_BYTES] = moved
            level *= 2
        pairs[_PAIR_BYTES + _LEFT : _PAIR_BYTES + _RIGHT] = old_pairs[_RIGHT:_PAIR_BYTES]
        self._pairs = pairs
        level, empty = self._capacity // 2, _record_above(_NO_RECORD)
        while level > 1:
            _fill(pairs, empty, first=level + level // 2, end=2 * level)
            level, empty = level // 2, _record_above(empty)
        self._put(pairs, 1, _sha256(pairs[_PAIR_BYTES : 2 * _PAIR_BYTES]).digest())

    def _all_pairs(self) -> bytearray:
        if self._pairs is not None:
            return self._pairs
        pairs, sums = _blank_pairs(self._capacity), self._sums
        for node, identifier in enumerate(self._ids, self._capacity):
            self._put(pairs, node, leaf_hash(identifier, sums[node]))
        level, used, empty = self._capacity, len(self._ids), _NO_RECORD
        while level > 1:
            level, used = level // 2, (used + 1) // 2
            for node in range(level, level + used):
                at = node * _PAIR_BYTES
                self._put(pairs, node, _sha256(pairs[at : at + _PAIR_BYTES]).digest())
            empty = _record_above(empty)
            _fill(pairs, empty, first=level + used, end=2 * level)
        self._pairs = pairs
        return pairs

    def _put(self, pairs: bytearray, node: int, digest: bytes) -> None:
        at = (node >> 1) * _PAIR_BYTES + (_RIGHT if node & 1 else _LEFT)
        _RECORD.pack_into(pairs, at, digest, self._sums[node].to_bytes(SUM_BYTES, "big"))


class Remaining:
    """The leaves still left in a draw: takes leaves out without touching the tree, which must not change meanwhile."""

    def __init__(self, tree: SumTree) -> None:
        self._capacity = tree._capacity
        self._sums = tree._sums
        # For each leaf taken out where it begins in the running sum of the whole tree, its weight and its node. A few
        # of a large pool are drawn fastest by skipping these; from a certain number on a copy of the sums is worth it.
        self._gaps: list[tuple[int, int, int]] | None = []
        self.total = tree.total

    def take(self, index: int) -> None:
        """Takes a leaf out; it must not have been taken out before."""
        node = index + self._capacity
        begin = 0
        while node > 1:
            if node & 1:
                begin += self._sums[node - 1]
            node >>= 1
        self._take(index + self._capacity, begin)

    def pop(self, value: int) -> int:
        """Takes out the leaf where the running sum of the weights left first exceeds `value`; returns its index."""
        if not 0 <= value < self.total:
            raise ValueError(f"{value} is not below the weight that is left, {self.total}")
        for begin, weight, _ in self._gaps or ():
            if value < begin:
                break
            value += weight
        sums, capacity, node, rest = self._sums, self._capacity, 1, value
        while node < capacity:
            node *= 2
            left = sums[node]
            if rest >= left:
                rest -= left
                node += 1
        self._take(node, value - rest)
        return node - capacity

    def _take(self, node: int, begin: int) -> None:
        weight = self._sums[node]
        self.total -= weight
        if self._gaps is None:
            self._subtract(node, weight)
            return
        insort(self._gaps, (begin, weight, node))
        if len(self._gaps) > _MOST_GAPS:
            gaps, self._gaps = self._gaps, None
            self._sums = self._sums[:]
            for _, weight, node in gaps:
                self._subtract(node, weight)

    def _subtract(self, node: int, weight: int) -> None:
        sums = self._sums
        while node >= 1:
            sums[node] -= weight
            node >>= 1


def prove_place(
    identifier: str, weight: int, path: bytes, *, index: int, root: bytes, leaf_count: int, total: int
) -> int:
    """Checks that a leaf lies under a root at `index`, and returns the sum of the weights to the left of it.

    `path` is as from `SumTree.path`. Raises ValueError, saying what does not fit.
    """
    if not 0 <= index < leaf_count:
        raise ValueError(f"leaf {index} is not among {leaf_count}")
    levels = (leaf_count - 1).bit_length()
    if len(path) != levels * _RECORD_BYTES:
        raise ValueError(
            f"a path under {leaf_count} leaves has {levels} nodes of {_RECORD_BYTES} bytes, not {len(path)} bytes"
        )
    digest, below, before = leaf_hash(identifier, weight), weight, 0
    for level, (beside_hash, beside_sum) in enumerate(_RECORD.iter_unpack(path)):
        beside = int.from_bytes(beside_sum, "big")
        if index >> level & 1:
            digest = node_hash(beside_hash, beside, digest, below)
            before += beside
        else:
            digest = node_hash(digest, below, beside_hash, beside)
        below = _checked(below + beside)
    if below != total or root_hash(leaf_count, digest, below) != root:
        raise ValueError(f"the path from leaf {index} does not lead to the root")
    return before


def _checked(weight: int) -> int:
    if not 0 <= weight < SUM_LIMIT:
        raise OverflowError("weights and their sums lie in [0, 2^128)")
    return weight


def _sums(size: int, *, largest: int) -> MutableSequence[int]:
    """Zeros, with room for sums up to `largest`."""
    return array("Q", bytes(8 * size)) if largest < _SMALL else [0] * size


def _blank_pairs(capacity: int) -> bytearray:
    """What is hashed for each inner node, all of it empty but for the tag."""
    pairs = bytearray(_PAIR_BYTES * capacity)
    pairs[::_PAIR_BYTES] = b"\x01" * capacity
    return pairs


def _record_above(record: bytes) -> bytes:
    """The record of a node above two empty ones."""
    return _sha256(b"\x01" + record + record).digest() + bytes(SUM_BYTES)


def _fill(pairs: bytearray, record: bytes, *, first: int, end: int) -> None:
    """Gives the nodes from `first` until before `end`, which is even, the same record."""
    if first < end and first & 1:
        at = (first >> 1) * _PAIR_BYTES + _RIGHT
        pairs[at : at + _RECORD_BYTES] = record
        first += 1
    if first < end:
        pair = b"\x01" + record + record
        pairs[(first >> 1) * _PAIR_BYTES : (end >> 1) * _PAIR_BYTES] = pair * ((end - first) >> 1)
