"""What is in a local dataset, found out before the first step: balance, ranges, values that are none, duplicates."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tiltyard.datasets import Dataset

_HASHED_ROWS = 256  # each byte becomes eight for a moment
_HASH_SEED = 0x7117_4A2D


@dataclass(frozen=True)
class DataReport:
    """The fields of tiltyard.trainer.v1.DataReport; minimum, maximum and mean are those of the finite features."""

    rows: int
    class_rows: tuple[int, ...] = field(default=())
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
    def from_json(cls, value: dict[str, Any]) -> "DataReport":
        """The report that `to_json` wrote."""
        return cls(**{**value, "class_rows": tuple(value["class_rows"])})

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


def report_on(dataset: Dataset, *, classes: int | None) -> DataReport:
    """Reads the dataset once, in chunks of 8 MiB. `classes` is None for a regression.

    Rows are compared by a 64-bit hash: of a billion different rows, two are taken for equal with a chance of 3%.
    """
    low, high, total, count, not_finite = np.inf, -np.inf, 0.0, 0, 0
    factors: np.ndarray | None = None
    hashes = np.empty(len(dataset), np.uint64)
    for start, part in dataset.chunks("x"):
        flat = np.ascontiguousarray(part.reshape(len(part), -1))
        if flat.dtype.kind == "f":
            finite = np.isfinite(flat)
            not_finite += int((~finite.all(axis=1)).sum())
            values = flat[finite].astype(np.float64)
        else:
            values = flat
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            total, count = total + float(values.sum(dtype=np.float64)), count + values.size
        raw = flat.view(np.uint8).reshape(len(flat), -1)
        if factors is None:
            factors = np.random.default_rng(_HASH_SEED).integers(0, 1 << 63, raw.shape[1], np.uint64) * 2 + 1
        for row in range(0, len(raw), _HASHED_ROWS):
            some = raw[row : row + _HASHED_ROWS].astype(np.uint64) @ factors
            hashes[start + row : start + row + len(some)] = some
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    labels = np.asarray(dataset.y)
    differs = (labels != labels[first[group]]).reshape(len(labels), -1).any(axis=1)
    class_rows = () if classes is None else tuple(np.bincount(labels, minlength=classes).tolist())
    return DataReport(
        rows=len(dataset),
        class_rows=class_rows,
        minimum=low if count else 0.0,
        maximum=high if count else 0.0,
        mean=total / count if count else 0.0,
        not_finite_rows=not_finite,
        duplicate_rows=len(dataset) - len(first),
        contradicting_rows=int(differs.sum()),
    )
