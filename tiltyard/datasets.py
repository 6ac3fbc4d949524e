"""Datasets as safetensors files with `x` [n, ...] and `y` [n]: made, opened as memory maps, and scanned."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from tiltyard.datasetfile import FILE_DTYPE, LABELS_KEY, NUMPY_OF, Tensor, write_file
from tiltyard.datasources import Array, DatasetError, Spill, read_batches
from tiltyard.extents import Extent, narrowed
from tiltyard.tensorfile import TensorEntry, TensorFileError, read_header

__all__ = [
    "Dataset",
    "DatasetError",
    "DatasetViolation",
    "Packed",
    "header_violations",
    "pack",
    "scan",
    "smallest",
    "write_dataset",
]

CHUNK_BYTES = 8 * 1024 * 1024
MAX_CLASSES = 1 << 16
_ONE = np.float32(1)

# What the Open Inference Protocol calls the file's dtypes.
_OIP_DATATYPE = {
    "BOOL": "BOOL", "U8": "UINT8", "I8": "INT8", "U16": "UINT16", "I16": "INT16", "I32": "INT32", "I64": "INT64",
    "F16": "FP16", "F32": "FP32", "F64": "FP64",
}  # fmt: skip


@dataclass(frozen=True)
class DatasetViolation:
    """One thing wrong with a dataset: `x` or `y`, and a sentence that says where."""

    field: str
    description: str


@dataclass(frozen=True)
class Packed:
    """What `pack` made: rows, the shape of one, and the original label of each class (None: a regression)."""

    rows: int
    row_shape: tuple[int, ...]
    labels: tuple[int | str, ...] | None


@dataclass(frozen=True)
class Dataset:
    """An open dataset: `x` and `y` are read-only memory maps, read from the disk as they are used."""

    path: Path
    x: Array
    y: Array
    labels: tuple[int | str, ...] | None
    """The original label of each class, by class, where packing kept them."""
    _starts: Mapping[str, int]

    @classmethod
    def open(cls, path: Path) -> "Dataset":
        """Open a file without reading its tensors. Raises OSError, and DatasetError for what is no dataset."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                header = read_header(lambda offset, n: os.pread(file.fileno(), n, offset), size)
            except TensorFileError as error:
                raise DatasetError(str(error)) from error
        if set(header.tensors) != {"x", "y"}:
            raise DatasetError("a dataset has exactly the tensors x and y")
        x, y = (_mapped(path, name, header.tensors[name]) for name in ("x", "y"))
        if x.ndim < 2:
            raise DatasetError(f"x must have the shape (rows, ...features), has {x.shape}")
        if y.ndim not in (1, 2) or y.dtype not in (np.dtype("<i8"), np.dtype("<f4")):
            raise DatasetError("y must be int64 labels or float32 targets of shape (rows) or (rows, targets)")
        starts = {name: entry.start for name, entry in header.tensors.items()}
        return cls(path, x, y, _labels(header.metadata.get(LABELS_KEY)), starts)

    def __len__(self) -> int:
        """Number of rows of x."""
        return len(self.x)

    @property
    def datatype(self) -> str:
        """The Open Inference Protocol's name of x's dtype."""
        return _OIP_DATATYPE[FILE_DTYPE[self.x.dtype]]

    def row_bytes(self, start: int, stop: int) -> bytes:
        """Rows start to stop of x as they cross the wire.

        Read past the memory map, so that streaming a large file does not leave all of it in memory.
        """
        stop = min(stop, len(self.x))
        row = self.x.dtype.itemsize * math.prod(self.x.shape[1:])
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), max(0, stop - start) * row, self._starts["x"] + start * row)

    def chunks(self, name: str, *, most_rows: int | None = None) -> Iterator[tuple[int, Array]]:
        """The rows of `x` or `y` in pieces of about 8 MiB, each with the index of its first row."""
        values = self.x if name == "x" else self.y
        step = max(1, CHUNK_BYTES // max(1, math.prod(values.shape[1:]) * values.dtype.itemsize))
        step = min(step, most_rows or step)
        for start in range(0, len(values), step):
            yield start, self.part(name, start, start + step)

    def pieces(self, name: str) -> Iterator[tuple[int, Array]]:
        """The values of `x` or `y` with the index of the first: at most 8 MiB at once, however long a row is."""
        values = self.x if name == "x" else self.y
        step = CHUNK_BYTES // values.dtype.itemsize
        for start in range(0, values.size, step):
            offset = self._starts[name] + start * values.dtype.itemsize
            yield start, np.fromfile(self.path, values.dtype, min(step, values.size - start), offset=offset)

    def part(self, name: str, start: int, stop: int) -> Array:
        """Rows start to stop of `x` or `y`, read past the memory map."""
        values = self.x if name == "x" else self.y
        rows, row_values = max(0, min(stop, len(values)) - start), math.prod(values.shape[1:])
        offset = self._starts[name] + start * row_values * values.dtype.itemsize
        part = np.fromfile(self.path, values.dtype, rows * row_values, offset=offset)
        return part.reshape(rows, *values.shape[1:])

    def digest(self) -> bytes:
        """SHA-256 of the file, 32 bytes."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()


def write_dataset(path: Path, x: Array, y: Array, *, labels: Sequence[int | str] | None = None) -> None:
    """Write rows and their labels (integers, not negative) or targets (floats); the file appears whole or not at all.

    x gets the smallest dtype that holds it (`smallest`); y becomes int64 or float32. `labels` are the original names of
    the classes. The same arrays give the same bytes. Raises DatasetError.
    """
    x, y = np.asarray(x), np.asarray(y)
    if len(x) != len(y):
        raise DatasetError(f"x has {len(x)} rows, but y has {len(y)}")
    x, y = smallest(x), _targets(y)
    write_file(path, Tensor(x.dtype, x.shape, [x]), Tensor(y.dtype, y.shape, [y]), labels=labels)


def smallest(x: Array) -> Array:
    """x in the smallest of uint8, int8, uint16, int16, int32, int64 that holds every value, else float16 or float32.

    float16 stays, other floats become float32, and floats that are all small whole numbers (pixels often are) become
    integers of at most 16 bits. Raises DatasetError for what holds no numbers. What fits already is not copied.
    """
    return narrowed(x, Extent.of(x).smallest)


def pack(
    source: Path, out: Path, *, regression: bool | None = None, progress: Callable[[int], None] | None = None
) -> Packed:
    """Make a dataset from `.npz` (arrays x and y), `.csv`, `.tsv`, `.parquet`, or a folder with one folder a class.

    Integer and text labels become the classes 0, 1, ... in ascending order, and their originals are kept in the file's
    metadata; floats are targets of a regression. `regression` says it where the numbers leave it open: True takes
    integers as targets, False takes whole floats as labels. Raises OSError, and DatasetError, also where `out` is the
    source.

    The source may be larger than memory: its rows are put aside beside `out`, until all that decides their dtype and
    classes has been seen. Until then the disk holds them twice. Whatever ends it early leaves nothing. `progress` hears
    how many rows have been read.
    """
    if out.exists() and source.exists() and out.samefile(source):
        raise DatasetError(f"{out} is what the dataset is made of, and would be gone")
    with Spill(out.parent) as x, Spill(out.parent) as y:
        extent: Extent | None = None
        for rows in read_batches(source, scratch=out.parent):
            batch = rows.x[:, None] if rows.x.ndim == 1 else rows.x
            found = Extent.of(batch)
            extent = found if extent is None else extent | found
            x.append(narrowed(batch, found.kept))
            y.append(rows.y)
            if progress:
                progress(x.rows)
        if extent is None:
            raise DatasetError("a dataset needs at least one row")
        features = Tensor(extent.smallest, (x.rows, *x.row_shape), map(extent.stored, x.chunks()))
        if y.dtype.kind == "f" if regression is None else regression:
            write_file(out, features, _regression(y))
            return Packed(x.rows, x.row_shape, None)
        originals = _classes(y)
        labels = tuple(_label(original) for original in originals.tolist())
        classes = (np.searchsorted(originals, part.reshape(-1)).astype("<i8") for part in y.chunks())
        write_file(out, features, Tensor(np.dtype("<i8"), (y.rows,), classes), labels=labels)
        return Packed(x.rows, x.row_shape, labels)


def scan(
    dataset: Dataset,
    input_shape: Sequence[int],
    classes: int | None,
    *,
    targets: int | None = None,
    input_scale: float = 1.0,
) -> list[DatasetViolation]:
    """What is wrong with a dataset for a model of this input shape and number of classes (None: a regression).

    `targets` is how many a row of a regression must have, None for any number; `input_scale` is the largest factor by
    which a model scales x, after which it must still be finite. Reads the file in pieces of 8 MiB,
    so that neither its size nor a row's matters. An empty list means that it is good.
    """
    found = header_violations(dataset, input_shape)
    x, y = dataset.x, dataset.y
    if classes is None and y.dtype.kind != "f":
        found.append(DatasetViolation("y", "must be float32 targets"))
    elif classes is None:
        each = 1 if y.ndim == 1 else y.shape[1]
        if targets not in (None, each):
            found.append(DatasetViolation("y", f"has {each} targets a row, but the model has {targets} outputs"))
        found += _first_bad_row(dataset, "y", _not_finite, "has a target that is NaN or infinite")
    elif y.dtype.kind != "i" or y.ndim != 1:
        found.append(DatasetViolation("y", "must be one int64 label for each row"))
    else:

        def outside(labels: Array) -> Array:
            return (labels < 0) | (labels >= classes)

        found += _first_bad_row(dataset, "y", outside, f"has a label outside 0 to {classes - 1}")
    if x.dtype.kind == "f":
        factor = np.float32(max(1.0, abs(input_scale)))

        def overflows(values: Array) -> Array:
            return _not_finite(values, factor)

        scaled = f" once it is multiplied by {factor:g}" if factor != 1 else ""
        found += _first_bad_row(dataset, "x", overflows, f"has a value that is NaN or infinite{scaled}")
    return found


def header_violations(dataset: Dataset, input_shape: Sequence[int]) -> list[DatasetViolation]:
    """What is wrong with a dataset's lengths and shapes for a model of this input shape; reads nothing more."""
    found: list[DatasetViolation] = []
    x, y = dataset.x, dataset.y
    if not len(x):
        found.append(DatasetViolation("x", "the dataset is empty"))
    if len(x) != len(y):
        found.append(DatasetViolation("y", f"has {len(y)} rows, but x has {len(x)}"))
    if x.shape[1:] != tuple(input_shape):
        found.append(
            DatasetViolation("x", f"has rows of shape {x.shape[1:]}, but the model takes {tuple(input_shape)}")
        )
    return found


def _not_finite(values: Array, factor: np.float32 = _ONE) -> Array:
    # In float32, with which models compute: what overflows there would be any model's NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = values.astype(np.float32, copy=False)
        return ~np.isfinite(numbers if factor == _ONE else numbers * factor)


def _first_bad_row(
    dataset: Dataset, field: str, bad: Callable[[Array], Array], description: str
) -> Iterator[DatasetViolation]:
    """One violation that names the first bad row of x or y, if there is one."""
    row_values = math.prod((dataset.x if field == "x" else dataset.y).shape[1:])
    for start, piece in dataset.pieces(field):
        wrong = bad(piece)
        if wrong.any():
            yield DatasetViolation(field, f"row {(start + int(wrong.argmax())) // row_values} {description}")
            return


def _labels(raw: str | None) -> tuple[int | str, ...] | None:
    if raw is None:
        return None
    try:
        labels = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DatasetError("the metadata `labels` is not JSON") from error
    if not isinstance(labels, list) or not all(type(label) in (int, str) for label in labels):
        raise DatasetError("the metadata `labels` must be a list of integers and texts")
    return tuple(labels)


def _mapped(path: Path, name: str, entry: TensorEntry) -> Array:
    if entry.dtype not in NUMPY_OF:
        raise DatasetError(f"{name} has the dtype {entry.dtype}, which a dataset cannot have")
    dtype = np.dtype(NUMPY_OF[entry.dtype])
    if entry.start == entry.end:
        # Nothing cannot be mapped.
        try:
            return np.empty(entry.shape, dtype)
        except ValueError as error:
            raise DatasetError(f"{name} has the shape {entry.shape}, which no array can have") from error
    return np.memmap(path, dtype=dtype, mode="r", offset=entry.start, shape=entry.shape)


def _targets(y: Array) -> Array:
    """Labels as int64, targets as float32."""
    if y.dtype.kind == "f":
        if y.ndim not in (1, 2):
            raise DatasetError(f"targets must have the shape (rows) or (rows, targets), have {y.shape}")
        return narrowed(y, np.dtype("<f4"))
    if y.dtype.kind not in "biu" or y.ndim != 1:
        raise DatasetError("labels must be one integer for each row")
    if y.size and (int(y.min()) < 0 or int(y.max()) >= MAX_CLASSES):
        raise DatasetError(f"labels must be 0 to {MAX_CLASSES - 1}")
    return y.astype("<i8")


def _regression(y: Spill) -> Tensor:
    if y.dtype.kind not in "biuf":
        raise DatasetError("the targets of a regression must be numbers")
    if len(y.row_shape) > 1:
        raise DatasetError(f"targets must have the shape (rows) or (rows, targets), have {(y.rows, *y.row_shape)}")
    targets = (_targets(part.astype(np.float64)) for part in y.chunks())
    return Tensor(np.dtype("<f4"), (y.rows, *y.row_shape), targets)


def _classes(y: Spill) -> Array:
    """The labels that there are, each once, in ascending order."""
    if y.row_shape not in ((), (1,)):
        raise DatasetError(f"y must have one label for each row, has the shape {(y.rows, *y.row_shape)}")
    if y.dtype.kind not in "biufUS":
        raise DatasetError(f"y holds {y.dtype}, which are no labels")
    found = np.empty(0, y.dtype)
    for part in y.chunks():
        if y.dtype.kind == "f" and not bool((part == np.trunc(part)).all()):
            raise DatasetError("y holds fractions, which are no labels")
        if y.dtype.kind == "f" and not bool((np.abs(part) < 2.0**63).all()):
            raise DatasetError(f"y holds {np.abs(part).max()}, which is over the range of int64")
        found = np.union1d(found, part)
        if len(found) > MAX_CLASSES:
            raise DatasetError(f"y holds over {MAX_CLASSES} different labels")
    return found


def _label(original: object) -> int | str:
    if isinstance(original, bytes):
        return original.decode(errors="replace")
    return original if isinstance(original, str) else int(cast("int | float", original))
