"""What is in a local dataset, found out before the first step: balance, ranges, values that are none, duplicates."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from services.trainer.jsonfields import from_fields
from tiltyard.datasets import Dataset
from tiltyard.datasources import Spill

# At once: every byte becomes eight for a moment.
_HASHED_ROWS = 256
_HASHED_BYTES = 1 << 18
_HASH_SEED = 0x7117_4A2D
# Of a long row so many values.
_LOOKED_AT = 1 << 18
# Of short rows: what is found out of each is larger than the row.
_CHUNK_ROWS = 1 << 16
# Rows are compared part by part, and of a part so many at once: about 64 bytes a row are in memory then.
_PART_ROWS = 1 << 18
_PIECE_ROWS = 1 << 19
_MAX_PARTS = 256  # each is an open file


@dataclass(frozen=True)
class DataReport:
    """The fields of tiltyard.trainer.v1.DataReport; minimum, maximum and mean are those of the finite features."""

    rows: int
    class_rows: tuple[int, ...]
    minimum: float = 0.0
    maximum: float = 0.0
    mean: float = 0.0
    not_finite_rows: int = 0
    duplicate_rows: int = 0
    contradicting_rows: int = 0

    def to_json(self) -> dict[str, Any]:
        """The fields by name; `from_json` gives back an equal report."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> "DataReport":
        """The report that `to_json` wrote. Raises TypeError and ValueError for anything else."""
        return from_fields(cls, value)

    def warnings(self) -> list[str]:
        """What a person should know before the training is worth its time."""
        found = []
        if self.duplicate_rows:
            found.append(f"{self.duplicate_rows} of {self.rows} rows have the features of an earlier row")
        if self.contradicting_rows:
            found.append(f"{self.contradicting_rows} of these have another label than the first such row")
        if missing := self.class_rows.count(0):
            found.append(f"{missing} of {len(self.class_rows)} classes have no row")
        return found


def report_on(
    dataset: Dataset, *, classes: int | None, scratch: Path, progress: Callable[[int], None] = lambda _: None
) -> DataReport:
    """Reads the dataset once, in chunks of at most 8 MiB. `classes` is None for a regression.

    `progress` is told after each how many rows have been read.

    Rows are compared by a 64-bit hash: of a billion different rows, two are taken for equal with a chance of 3%. The
    hashes are put aside in the folder `scratch`, 16 bytes a row, so that only some of them are in memory. Raises
    OSError.
    """
    low, high, total, count, not_finite = np.inf, -np.inf, 0.0, 0, 0
    class_rows = np.zeros(classes or 0, np.int64)
    with _Repeats(len(dataset), scratch) as repeats:
        for start, part in dataset.chunks("x", most_rows=_CHUNK_ROWS):
            flat = np.ascontiguousarray(part.reshape(len(part), -1))
            bad = np.zeros(len(flat), np.bool_)
            for some in np.split(flat, range(_LOOKED_AT, flat.shape[1], _LOOKED_AT), axis=1):
                values = some
                if some.dtype.kind == "f":
                    finite = np.isfinite(some)
                    bad |= ~finite.all(axis=1)
                    values = some[finite].astype(np.float64)
                if values.size:
                    low, high = min(low, float(values.min())), max(high, float(values.max()))
                    total, count = total + float(values.sum(dtype=np.float64)), count + values.size
            not_finite += int(bad.sum())
            labels = dataset.part("y", start, start + len(part))
            if classes is not None:
                class_rows += np.bincount(labels, minlength=classes)
            repeats.add(flat, labels)
            progress(start + len(part))
        duplicates, contradicting = repeats.count()
    return DataReport(
        rows=len(dataset),
        class_rows=tuple(class_rows.tolist()),
        minimum=low if count else 0.0,
        maximum=high if count else 0.0,
        mean=total / count if count else 0.0,
        not_finite_rows=not_finite,
        duplicate_rows=duplicates,
        contradicting_rows=contradicting,
    )


class _Repeats:
    """Finds the rows that repeat an earlier one. Equal rows have equal hashes, and so come into the same part."""

    def __init__(self, rows: int, scratch: Path) -> None:
        self._open = ExitStack()
        parts = min(_MAX_PARTS, 1 + rows // _PART_ROWS)
        self._parts = [self._open.enter_context(Spill(scratch)) for _ in range(parts)]
        self._factors: dict[int, np.ndarray] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """The next rows, and their labels or targets."""
        hashes = self._hashes(x)
        labels = self._hashes(y + y.dtype.type(0))  # a negative zero is a zero
        # By the upper half: a factor being odd, the lowest bits are little more than those of the bytes.
        part = ((hashes >> np.uint64(32)) % np.uint64(len(self._parts))).astype(np.uint8)
        ordered = np.stack([hashes, labels], axis=1)[np.argsort(part, kind="stable")]
        ends = np.bincount(part, minlength=len(self._parts)).cumsum()
        for spill, some in zip(self._parts, np.split(ordered, ends[:-1]), strict=True):
            spill.append(some)

    def count(self) -> tuple[int, int]:
        """How many rows have the features of an earlier row, and how many of these another label than the first."""
        duplicates = contradicting = 0
        for spill in self._parts:
            known = np.empty((0, 2), np.uint64)
            for start in range(0, spill.rows, _PIECE_ROWS):
                piece = spill.between(start, min(start + _PIECE_ROWS, spill.rows))
                hashes, labels = np.concatenate([known, piece]).T
                _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
                duplicates += len(hashes) - len(first)
                contradicting += int((labels != labels[first[group]]).sum())
                known = np.stack([hashes[first], labels[first]], axis=1)
        return duplicates, contradicting

    def _hashes(self, values: np.ndarray) -> np.ndarray:
        """Of each row; that of a long one is made of those of its pieces."""
        raw = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
        pieces = np.split(raw, range(_HASHED_BYTES, raw.shape[1], _HASHED_BYTES), axis=1)
        hashes = np.zeros(len(raw), np.uint64)
        for piece, factor in zip(pieces, _odd(len(pieces), seed=_HASH_SEED + 1), strict=True):
            width = piece.shape[1]
            if width not in self._factors:
                self._factors[width] = _odd(width, seed=_HASH_SEED)
            step = max(1, min(_HASHED_ROWS, _HASHED_BYTES // width))
            for row in range(0, len(raw), step):
                hashes[row : row + step] += piece[row : row + step].astype(np.uint64) @ self._factors[width] * factor
        return hashes


def _odd(count: int, *, seed: int) -> np.ndarray:
    """Random odd numbers below 2^64, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 1 << 63, count, np.uint64) * 2 + 1
