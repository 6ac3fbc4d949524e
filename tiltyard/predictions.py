"""Predictions under one Merkle root: what two evaluations of the same rows are compared by, block by block.

A leaf is one block of 256 predictions as little-endian int32 (RFC 9162 leaf hash), the root is that of their tree.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tiltyard.transparency import EMPTY_ROOT, HASH_BYTES, node_hash

BLOCK_ROWS = 256
"""Predictions under one leaf."""

MAX_HASHES = 65_536
"""Most hashes that are handed in with a report: 2 MiB."""

PREDICTION_BYTES = 4
_LEAF = b"\x00"


@dataclass(frozen=True)
class RowRange:
    """Rows from `start` up to, not including, `stop`, counted from 0."""

    start: int
    stop: int


@dataclass(frozen=True)
class Difference:
    """One row that two evaluations answered differently."""

    row: int
    left: int
    right: int


def block_count(rows: int) -> int:
    """Leaves over so many rows."""
    return -(-rows // BLOCK_ROWS)


def block_hash(block: bytes) -> bytes:
    """The leaf hash of one block: at most 256 predictions, four little-endian bytes each."""
    return hashlib.sha256(_LEAF + block).digest()


def block_hashes(predictions: bytes) -> list[bytes]:
    """The leaf hashes of all predictions, four little-endian bytes each, in row order."""
    size = BLOCK_ROWS * PREDICTION_BYTES
    return [block_hash(predictions[start : start + size]) for start in range(0, len(predictions), size)]


def level_of(blocks: int) -> int:
    """The level of the tree that is handed in: the lowest with no more than `MAX_HASHES` nodes. 0 is the leaves."""
    level = 0
    while -(-blocks >> level) > MAX_HASHES:
        level += 1
    return level


def rows_per_hash(blocks: int) -> int:
    """Rows under each handed-in hash but the last."""
    return BLOCK_ROWS << level_of(blocks)


def prediction_root(hashes: Sequence[bytes]) -> bytes:
    """The root over leaf hashes, or over all nodes of one level: a level's nodes have the root of the leaves.

    RFC 9162 splits at powers of two, so the nodes of a level cover whole runs of leaves, the last one what is left.
    """
    return _root_of(hashes)


def handed_in(hashes: Sequence[bytes]) -> bytes:
    """What goes beside a report whose leaf hashes these are: the nodes of `level_of` them, one after the other."""
    run = 1 << level_of(len(hashes))
    return b"".join(
        hashes if run == 1 else (_root_of(hashes[start : start + run]) for start in range(0, len(hashes), run))
    )


def check_handed_in(handed: bytes, *, root: bytes, blocks: int) -> str:
    """What is wrong with the hashes handed in beside a report, in a few words; empty when they give its root."""
    expected = -(-blocks >> level_of(blocks))
    if len(handed) != expected * HASH_BYTES:
        return f"must be {expected} hashes of {HASH_BYTES} bytes"
    return "" if _root_of(split(handed)) == root else "do not give the report's prediction_root"


def split(handed: bytes) -> list[bytes]:
    """The single hashes. Raises ValueError where they are not whole."""
    if len(handed) % HASH_BYTES:
        raise ValueError(f"{len(handed)} bytes are no whole hashes of {HASH_BYTES}")
    return [handed[start : start + HASH_BYTES] for start in range(0, len(handed), HASH_BYTES)]


def differing_rows(left: bytes, right: bytes, *, rows: int) -> list[RowRange]:
    """The rows under the handed-in hashes that differ, neighbours together.

    Raises ValueError where the two are not over the same number of rows.
    """
    one, other = split(left), split(right)
    step = rows_per_hash(block_count(rows))
    if not len(one) == len(other) == -(-rows // step):
        raise ValueError(f"{len(one)} and {len(other)} hashes are not two evaluations of {rows} rows")
    ranges: list[RowRange] = []
    for index, (mine, yours) in enumerate(zip(one, other, strict=True)):
        if mine == yours:
            continue
        start, stop = index * step, min((index + 1) * step, rows)
        if ranges and ranges[-1].stop == start:
            start = ranges.pop().start
        ranges.append(RowRange(start, stop))
    return ranges


def differing_predictions(left: bytes, right: bytes) -> list[Difference]:
    """Every row that two runs answered differently. Raises ValueError for runs over another number of rows."""
    if len(left) != len(right):
        raise ValueError("the predictions are over another number of rows")
    size = PREDICTION_BYTES * BLOCK_ROWS
    found: list[Difference] = []
    for start in range(0, len(left), size):
        one, other = left[start : start + size], right[start : start + size]
        if one != other:
            rows = zip(_numbers(one), _numbers(other), strict=True)
            first = start // PREDICTION_BYTES
            found += [Difference(first + row, a, b) for row, (a, b) in enumerate(rows) if a != b]
    return found


def search_block(block: bytes, wanted: bytes, *, first_row: int, outputs: int, most: int) -> list[Difference] | None:
    """The rows in which an unknown block differs from a known one, found by its hash alone.

    Tries every change of one row, then of two and so on, at most `most` hashes in all; None when none of those gives
    the hash `wanted`. One row in 256 of 10 classes takes 2,304 hashes, two take 2.6 million.
    """
    known = list(_numbers(block))
    tried = 0
    for changes in range(1, len(known) + 1):
        for rows in itertools.combinations(range(len(known)), changes):
            for values in itertools.product(range(outputs), repeat=changes):
                if any(known[row] == value for row, value in zip(rows, values, strict=True)):
                    continue
                tried += 1
                if tried > most:
                    return None
                changed = bytearray(block)
                for row, value in zip(rows, values, strict=True):
                    at = row * PREDICTION_BYTES
                    changed[at : at + PREDICTION_BYTES] = value.to_bytes(PREDICTION_BYTES, "little")
                if block_hash(bytes(changed)) == wanted:
                    pairs = zip(rows, values, strict=True)
                    return [Difference(first_row + row, known[row], value) for row, value in pairs]
    return None


def _numbers(block: bytes) -> Iterator[int]:
    for at in range(0, len(block), PREDICTION_BYTES):
        yield int.from_bytes(block[at : at + PREDICTION_BYTES], "little", signed=True)


def _root_of(hashes: Sequence[bytes]) -> bytes:
    """`transparency.root_hash`, level by level: faster over many hashes."""
    if not hashes:
        return EMPTY_ROOT
    level = list(hashes)
    while len(level) > 1:
        paired = [node_hash(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
        # An odd one out goes up alone: the tree's right edge.
        level = paired + level[len(level) & ~1 :]
    return level[0]
