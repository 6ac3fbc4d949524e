"""Rows that are put aside on the disk until they are wanted again."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from tiltyard.datasources.rows import Array, DatasetError, batch_rows


class Spill:
    """Rows in a file without a name, which goes with the process. Use it in a `with`.

    Each keeps the dtype that it came in; `dtype` is the one that holds them all.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by __exit__
        self._parts: list[tuple[np.dtype[np.generic], int]] = []
        self.rows = 0
        self.row_shape: tuple[int, ...] = ()
        self.dtype = np.dtype("<f4")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, rows: Array) -> None:
        """More rows. Raises OSError, and DatasetError for another shape than that of the rows before."""
        if self.rows and rows.shape[1:] != self.row_shape:
            raise DatasetError(f"row {self.rows} has the shape {rows.shape[1:]}, those before it {self.row_shape}")
        self.dtype = np.result_type(self.dtype, rows.dtype) if self.rows else rows.dtype
        self.row_shape = rows.shape[1:]
        self._file.write(raw(rows))
        if self._parts and self._parts[-1][0] == rows.dtype:
            self._parts[-1] = (rows.dtype, self._parts[-1][1] + len(rows))
        else:
            self._parts.append((rows.dtype, len(rows)))
        self.rows += len(rows)

    def chunks(self) -> Iterator[Array]:
        """All rows, in pieces of about a million values of one dtype each."""
        self._file.seek(0)
        for dtype, rows in self._parts:
            step = batch_rows(math.prod(self.row_shape) * max(8, dtype.itemsize))
            for start in range(0, rows, step):
                yield self._next(dtype, min(step, rows - start))

    def between(self, start: int, stop: int) -> Array:
        """The rows from `start` to before `stop`, all of which are there."""
        found = []
        first, at = 0, 0
        for dtype, rows in self._parts:
            row_bytes = math.prod(self.row_shape) * dtype.itemsize
            low, high = max(start, first), min(stop, first + rows)
            if low < high:
                self._file.seek(at + (low - first) * row_bytes)
                found.append(self._next(dtype, high - low))
            first, at = first + rows, at + rows * row_bytes
        return np.concatenate(found)

    def _next(self, dtype: np.dtype[np.generic], rows: int) -> Array:
        values = np.fromfile(self._file, dtype, rows * math.prod(self.row_shape))
        return values.reshape(rows, *self.row_shape)


def raw(values: Array) -> memoryview:
    """The bytes of an array, in the order of its indices."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
