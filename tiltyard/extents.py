"""How small numbers can be stored, found out from their dtype and range."""

from dataclasses import dataclass

import numpy as np

from tiltyard.datasources import Array, DatasetError


@dataclass(frozen=True)
class Extent:
    """What decides how small numbers can be stored: their dtype, and the range of those that are whole.

    `low` and `high` are None where there are no values, or not `whole` ones alone.
    """

    dtype: np.dtype[np.generic]
    whole: bool
    low: int | float | None
    high: int | float | None

    @classmethod
    def of(cls, x: Array) -> "Extent":
        """Raises DatasetError for what holds no numbers."""
        if x.dtype.kind not in "biuf":
            raise DatasetError(f"x holds {x.dtype}, which are no numbers")
        whole = x.dtype.kind != "f" or (bool(np.isfinite(x).all()) and bool((x == np.trunc(x)).all()))
        if not x.size or not whole:
            return cls(x.dtype, whole, None, None)
        return cls(x.dtype, whole, x.min().item(), x.max().item())

    def __or__(self, other: "Extent") -> "Extent":
        """Of both together."""
        return Extent(
            np.result_type(self.dtype, other.dtype),
            self.whole and other.whole,
            min((each.low for each in (self, other) if each.low is not None), default=None),
            max((each.high for each in (self, other) if each.high is not None), default=None),
        )

    @property
    def smallest(self) -> np.dtype[np.generic]:
        """See `datasets.smallest`. Raises DatasetError for integers over the range of int64."""
        kept = self.kept
        if kept.kind == "f" and self.whole and self.low is not None and self.high is not None:
            return _holding(self.low, self.high, "<u1", "<i1", "<u2", "<i2") or kept
        if kept == np.dtype("<u8"):
            raise DatasetError(f"x holds {self.high}, which is over the range of int64")
        return kept

    @property
    def kept(self) -> np.dtype[np.generic]:
        """What loses nothing of these values that `smallest` could keep, whatever values come after them.

        Whole floats stay floats: a negative zero is one.
        """
        if self.dtype.kind == "f":
            return np.dtype("<f2" if self.dtype.itemsize == 2 else "<f4")
        if self.low is None or self.high is None:
            return np.dtype("<u1")
        return _holding(self.low, self.high, "<u1", "<i1", "<u2", "<i2", "<i4", "<i8") or np.dtype("<u8")

    def stored(self, x: Array) -> Array:
        """Some of these values as `smallest`, whatever dtype they were kept in."""
        if self.dtype.kind == "f" and x.dtype.kind != "f":
            # An integer among floats was rounded to one of theirs first.
            x = x.astype(self.dtype)
        return narrowed(x, self.smallest)


def narrowed(x: Array, dtype: np.dtype[np.generic]) -> Array:
    """x as this dtype; what is too large for it becomes infinite, which a scan finds."""
    with np.errstate(over="ignore"):
        return x.astype(dtype, copy=False)


def _holding(low: int | float, high: int | float, *names: str) -> np.dtype[np.generic] | None:
    """The first of these integers that holds both."""
    for name in names:
        if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
            return np.dtype(name)
    return None
