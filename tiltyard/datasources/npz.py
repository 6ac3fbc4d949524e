"""npz: the arrays x and y of a zip file, compressed or not, read on from where the last batch ended."""

import math
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from tiltyard.datasources.rows import Array, DatasetError, Rows, batch_rows

UNREADABLE = (
    *(ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),
    # Of a header that is no literal of Python's.
    *(SyntaxError, tokenize.TokenError),
)
"""What zipfile and numpy raise for a damaged file, an encrypted one, and one of objects."""
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def batches(path: Path, *, scratch: Path) -> Iterator[Rows]:
    """The rows of x beside those of y. Nothing is unpickled: arrays of objects are refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            if missing := {"x", "y"} - set(members):
                raise DatasetError(f"lacks the array {sorted(missing)[0]!r}")
            with archive.open(members["x"]) as x_file, archive.open(members["y"]) as y_file:
                x, y = (_Array.begin(file, name) for file, name in ((x_file, "x"), (y_file, "y")))
                if not x.shape:
                    raise DatasetError("x must have the shape (rows, ...features), has ()")
                if x.shape[0] != (y.shape or (0,))[0]:
                    raise DatasetError(f"x has {x.shape[0]} rows, but y has {(y.shape or (0,))[0]}")
                step = batch_rows(x.row_bytes + y.row_bytes)
                for some_x, some_y in zip(x.batches(step, scratch), y.batches(step, scratch), strict=True):
                    yield Rows(some_x, some_y)
    except UNREADABLE as error:
        raise DatasetError(f"{path.name}: {error}") from error


@dataclass(frozen=True)
class _Array:
    """An array whose header has been read, and the file that stands at its first byte."""

    file: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    by_columns: bool
    """Whether rows are scattered: Fortran's order, which pandas writes."""

    @classmethod
    def begin(cls, file: IO[bytes], name: str) -> "_Array":
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise DatasetError(f"the array {name!r} is of an unknown version, {version}")
        shape, by_columns, dtype = _HEADERS[version](file)
        if dtype.hasobject:
            raise DatasetError(f"the array {name!r} holds objects, which are never unpickled")
        return cls(file, shape, dtype, by_columns and len(shape) > 1)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def batches(self, step: int, scratch: Path) -> Iterator[Array]:
        """The rows, `step` at a time; the file is read to its end, where zip has its checksum."""
        if self.by_columns:
            with tempfile.TemporaryFile(dir=scratch) as whole:
                shutil.copyfileobj(self.file, whole)
                for start in range(0, self.shape[0], step):
                    yield self._across(whole, start, min(step, self.shape[0] - start))
            return
        for start in range(0, self.shape[0], step):
            rows = min(step, self.shape[0] - start)
            raw = _exactly(self.file, rows * self.row_bytes)
            yield np.frombuffer(raw, self.dtype).reshape(rows, *self.shape[1:])
        self.file.read(1)

    def _across(self, whole: IO[bytes], start: int, rows: int) -> Array:
        """Rows of an array that lies column by column: a piece of each."""
        size, columns = self.dtype.itemsize, math.prod(self.shape[1:])
        raw = bytearray()
        for column in range(columns):
            whole.seek((column * self.shape[0] + start) * size)
            raw += _exactly(whole, rows * size)
        return np.frombuffer(raw, self.dtype).reshape(*reversed(self.shape[1:]), rows).transpose()


def _exactly(file: IO[bytes], n: int) -> bytes:
    raw = file.read(n)
    if len(raw) != n:
        raise DatasetError("an array ends before its last row")
    return raw
