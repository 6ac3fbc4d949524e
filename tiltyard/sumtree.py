"""A Merkle sum tree: weights that can be changed, searched by cumulative weight, and proved, each in O(log n) steps.

Hashes are SHA-256 over bytes put one after the other; sums are 16 bytes big-endian:

- leaf: 0x00, the id in UTF-8, the weight;
- node: 0x01, left hash, left sum, right hash, right sum;
- root: 0x02, the number of leaves in 8 bytes big-endian, hash of the top node, its sum.

Leaves are filled up to a power of two with empty ones, whose hash is 32 zero bytes and whose weight is 0. A leaf keeps
its index for ever: one that is not wanted any more weighs 0. After Maxwell's summation trees (docs/sortition.md).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HASH_BYTES = 32
SUM_BYTES = 16
SUM_LIMIT = 2**128

_NO_HASH = bytes(HASH_BYTES)


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


@dataclass(frozen=True)
class SumNode:
    """A node beside a path: its hash, the sum of the weights below it, and whether it lies to the left."""

    hash: bytes
    sum: int
    left: bool


class SumTree:
    """Leaves with an id and a weight in a complete binary tree, kept in a list: below node i are 2i and 2i + 1."""

    def __init__(self, leaves: Iterable[tuple[str, int]] = ()) -> None:
        pairs = list(leaves)
        self._ids = [identifier for identifier, _ in pairs]
        self._capacity = 1
        while self._capacity < len(pairs):
            self._capacity *= 2
        self._sums = [0] * (2 * self._capacity)
        self._sums[self._capacity : self._capacity + len(pairs)] = [_checked(weight) for _, weight in pairs]
        for node in range(self._capacity - 1, 0, -1):
            self._sums[node] = self._sums[2 * node] + self._sums[2 * node + 1]
        _checked(self._sums[1])
        # Hashing a million leaves takes seconds and a draw needs none of it: hashes are made when first asked for.
        self._hashes: bytearray | None = None

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
        _checked(self._sums[1] + change)
        sums, hashes = self._sums, self._hashes
        sums[node] = weight
        if hashes is not None:
            self._put_hash(hashes, node, leaf_hash(self._ids[index], weight))
        while node > 1:
            node //= 2
            sums[node] += change
            if hashes is not None:
                self._put_hash(hashes, node, self._hash_children(hashes, node))

    def root(self) -> bytes:
        """The root: it fixes every id, weight and place."""
        hashes = self._all_hashes()
        return root_hash(len(self._ids), bytes(hashes[HASH_BYTES : 2 * HASH_BYTES]), self._sums[1])

    def path(self, index: int) -> tuple[SumNode, ...]:
        """The nodes beside the way from a leaf up to the top node."""
        hashes = self._all_hashes()
        node = self._leaf(index)
        beside = []
        while node > 1:
            sibling = node ^ 1
            digest = bytes(hashes[sibling * HASH_BYTES : (sibling + 1) * HASH_BYTES])
            beside.append(SumNode(digest, self._sums[sibling], left=sibling < node))
            node //= 2
        return tuple(beside)

    def _leaf(self, index: int) -> int:
        if not 0 <= index < len(self._ids):
            raise IndexError(f"no leaf {index} among {len(self._ids)}")
        return self._capacity + index

    def _grow(self) -> None:
        """Doubles the room: the whole tree becomes the left child of a new top node."""
        sums = [0] * (4 * self._capacity)
        sums[1] = self._sums[1]
        hashes = None if self._hashes is None else bytearray(4 * self._capacity * HASH_BYTES)
        level, empty = self._capacity, _NO_HASH
        while level >= 1:
            sums[2 * level : 3 * level] = self._sums[level : 2 * level]
            if hashes is not None and self._hashes is not None:
                old = self._hashes[level * HASH_BYTES : 2 * level * HASH_BYTES]
                hashes[2 * level * HASH_BYTES : 3 * level * HASH_BYTES] = old
                hashes[3 * level * HASH_BYTES : 4 * level * HASH_BYTES] = empty * level
            level, empty = level // 2, node_hash(empty, 0, empty, 0)
        self._sums, self._hashes, self._capacity = sums, hashes, 2 * self._capacity
        if hashes is not None:
            self._put_hash(hashes, 1, self._hash_children(hashes, 1))

    def _all_hashes(self) -> bytearray:
        if self._hashes is not None:
            return self._hashes
        hashes = bytearray(2 * self._capacity * HASH_BYTES)
        for index, identifier in enumerate(self._ids):
            node = self._capacity + index
            self._put_hash(hashes, node, leaf_hash(identifier, self._sums[node]))
        level, used, empty = self._capacity, len(self._ids), _NO_HASH
        while level > 1:
            level, used, empty = level // 2, (used + 1) // 2, node_hash(empty, 0, empty, 0)
            for node in range(level, level + used):
                self._put_hash(hashes, node, self._hash_children(hashes, node))
            hashes[(level + used) * HASH_BYTES : 2 * level * HASH_BYTES] = empty * (level - used)
        self._hashes = hashes
        return hashes

    def _hash_children(self, hashes: bytearray, node: int) -> bytes:
        at = 2 * node * HASH_BYTES
        left, right = hashes[at : at + HASH_BYTES], hashes[at + HASH_BYTES : at + 2 * HASH_BYTES]
        return node_hash(bytes(left), self._sums[2 * node], bytes(right), self._sums[2 * node + 1])

    def _put_hash(self, hashes: bytearray, node: int, digest: bytes) -> None:
        hashes[node * HASH_BYTES : (node + 1) * HASH_BYTES] = digest


class Remaining:
    """The leaves still left in a draw: takes leaves out without touching the tree, which must not change meanwhile."""

    def __init__(self, tree: SumTree) -> None:
        self._tree = tree
        self._taken: dict[int, int] = {}
        self.total = tree.total

    def take(self, index: int) -> None:
        """Takes a leaf out; it must not have been taken out before."""
        node = self._tree._leaf(index)
        weight = self._tree._sums[node]
        taken = self._taken
        while node >= 1:
            taken[node] = taken.get(node, 0) + weight
            node //= 2
        self.total -= weight

    def find(self, value: int) -> int:
        """Index of the leaf where the running sum of the weights left first exceeds `value`, 0 <= value < total."""
        if not 0 <= value < self.total:
            raise ValueError(f"{value} is not below the weight that is left, {self.total}")
        sums, taken, capacity = self._tree._sums, self._taken, self._tree._capacity
        node = 1
        while node < capacity:
            node *= 2
            left = sums[node] - taken.get(node, 0)
            if value >= left:
                value -= left
                node += 1
        return node - capacity


def prove_place(
    identifier: str, weight: int, path: Sequence[SumNode], *, index: int, root: bytes, leaf_count: int, total: int
) -> int:
    """Checks that a leaf lies under a root at `index`, and returns the sum of the weights to the left of it.

    Raises ValueError, saying what does not fit.
    """
    if not 0 <= index < leaf_count:
        raise ValueError(f"leaf {index} is not among {leaf_count}")
    if len(path) != (leaf_count - 1).bit_length():
        raise ValueError(f"a path under {leaf_count} leaves has {(leaf_count - 1).bit_length()} nodes, not {len(path)}")
    digest, below, before = leaf_hash(identifier, weight), weight, 0
    position = index
    for node in path:
        if node.left != bool(position & 1):
            raise ValueError(f"the path does not lead from leaf {index}")
        if node.left:
            digest = node_hash(node.hash, node.sum, digest, below)
            before += node.sum
        else:
            digest = node_hash(digest, below, node.hash, node.sum)
        below = _checked(below + node.sum)
        position //= 2
    if below != total or root_hash(leaf_count, digest, below) != root:
        raise ValueError(f"the path from leaf {index} does not lead to the root")
    return before


def _checked(weight: int) -> int:
    if not 0 <= weight < SUM_LIMIT:
        raise OverflowError("weights and their sums lie in [0, 2^128)")
    return weight
