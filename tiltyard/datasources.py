"""Rows and labels out of the files that people have: npz, CSV, Parquet, folders of images, Hugging Face datasets."""

import csv
import importlib
import io
import json
import math
import tempfile
import zipfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LABEL_COLUMN = "y"
HUGGING_FACE_LABELS = ("label", "labels", LABEL_COLUMN)
IN_MEMORY_BYTES = 256 * 1024 * 1024
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


class DatasetError(ValueError):
    """A file that is no dataset, or arrays that cannot be made into one; the text is for its author."""


@dataclass(frozen=True)
class Rows:
    """Features [n, ...], and for each row its label or targets as they were written, numbers or texts."""

    x: Array
    y: Array


def read_rows(source: Path) -> Rows:
    """Read a source by its kind: `.npz`, `.csv`, `.tsv`, `.parquet`, or a folder.

    A folder is what `save_to_disk` of Hugging Face's datasets wrote, or has one folder of images a class.

    Raises OSError, and DatasetError for what cannot be read; both say where.
    """
    if source.is_dir():
        return _hugging_face(source) if is_hugging_face(source) else _images(source)
    readers: dict[str, Callable[[Path], Rows]] = {
        ".npz": _npz,
        ".csv": lambda path: _delimited(path, ","),
        ".tsv": lambda path: _delimited(path, "\t"),
        ".parquet": _parquet,
    }
    reader = readers.get(source.suffix.lower())
    if reader is None:
        raise DatasetError(f"{source.name}: must be {', '.join(readers)} or a folder of images")
    return reader(source)


def _npz(path: Path) -> Rows:
    try:
        # Without pickle an array of objects is refused instead of being run.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if missing := {"x", "y"} - set(file.files):
                raise DatasetError(f"{path.name}: lacks the array {sorted(missing)[0]!r}")
            return Rows(file["x"], file["y"])
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path.name}: {error}") from error


def _delimited(path: Path, delimiter: str) -> Rows:
    """Numeric columns and one label column: the one named `y`, otherwise the last. The first line may be a header."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            lines = csv.reader(file, delimiter=delimiter)
            first = next(lines, None)
            if first is None:
                raise DatasetError(f"{path.name}: is empty")
            if len(first) < 2:
                raise DatasetError(f"{path.name}: needs at least one column of features and one of labels")
            names = [name.strip() for name in first]
            label_at = names.index(LABEL_COLUMN) if LABEL_COLUMN in names else len(first) - 1
            headed = LABEL_COLUMN in names or not all(_is_number(c) for i, c in enumerate(first) if i != label_at)
            values, labels = array("d"), []
            for cells in lines if headed else _chain(first, lines):
                if not cells:
                    continue
                if len(cells) != len(first):
                    raise DatasetError(f"{path.name}:{lines.line_num}: {len(cells)} columns, not {len(first)}")
                labels.append(cells[label_at].strip())
                try:
                    values.extend(float(cell) for index, cell in enumerate(cells) if index != label_at)
                except ValueError as error:
                    raise DatasetError(f"{path.name}:{lines.line_num}: {error}") from error
        except (csv.Error, UnicodeDecodeError) as error:
            raise DatasetError(f"{path.name}: {error}") from error
    if not labels:
        raise DatasetError(f"{path.name}: has no rows")
    return Rows(np.frombuffer(values, dtype=np.float64).reshape(len(labels), len(first) - 1), _parsed(labels))


def _chain(first: list[str], rest: Any) -> Any:
    yield first
    yield from rest


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _parsed(labels: Sequence[str]) -> Array:
    """Texts as integers if all are, else as floats if all are, else as they are."""
    try:
        return np.array([int(label) for label in labels], dtype=np.int64)
    except (ValueError, OverflowError):
        pass
    if all(_is_number(label) and math.isfinite(float(label)) for label in labels):
        return np.array([float(label) for label in labels])
    return np.array(labels, dtype=np.str_)


def _parquet(path: Path) -> Rows:
    parquet = _optional("pyarrow.parquet", "pyarrow", "Parquet files")
    table = parquet.read_table(path)
    names: list[str] = table.column_names
    if len(names) < 2:
        raise DatasetError(f"{path.name}: needs at least one column of features and one of labels")
    label = LABEL_COLUMN if LABEL_COLUMN in names else names[-1]
    columns = []
    for name in names:
        if name == label:
            continue
        column = table.column(name).to_numpy()
        if column.dtype.kind not in "biuf":
            raise DatasetError(f"{path.name}: column {name!r} holds {column.dtype}, which are no numbers")
        columns.append(column)
    y = table.column(label).to_numpy(zero_copy_only=False)
    return Rows(np.stack(columns, axis=1), y.astype(np.str_) if y.dtype.kind == "O" else y)


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is a dataset, or a dictionary of them, that `save_to_disk` wrote."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _hugging_face(folder: Path) -> Rows:
    """The Arrow files that state.json names; images are decoded, lists stacked, numbers put side by side."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise DatasetError(f"{folder.name}: has the splits {splits}; name one as {folder.name}/SPLIT")
    arrow = _optional("pyarrow", "pyarrow", "Hugging Face datasets")
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = [folder / Path(each["filename"]).name for each in state["_data_files"]]
        tables = []
        for file in files:
            with arrow.memory_map(str(file)) as mapped:
                tables.append(arrow.ipc.open_stream(mapped).read_all())
        table = arrow.concat_tables(tables)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(f"{folder.name}: is no dataset of save_to_disk: {error}") from error
    if state.get("_indices_data_files"):
        raise DatasetError(f"{folder.name}: its rows were selected or shuffled; call flatten_indices() before saving")
    names: list[str] = table.column_names
    label = next((name for name in HUGGING_FACE_LABELS if name in names), None)
    if label is None or len(names) < 2:
        raise DatasetError(f"{folder.name}: needs a column named {' or '.join(HUGGING_FACE_LABELS)}, and features")
    y = table.column(label).to_numpy()
    features = [_hugging_face_column(folder, name, table.column(name)) for name in names if name != label]
    x = features[0] if len(features) == 1 else np.stack(features, axis=1)
    return Rows(x, y.astype(np.str_) if y.dtype.kind == "O" else y)


def _hugging_face_column(folder: Path, name: str, column: Any) -> Array:
    first = column[0].as_py() if len(column) else None
    try:
        if isinstance(first, dict) and "bytes" in first:
            image = _optional("PIL.Image", "Pillow", "images")
            decoded = []
            for each in column:
                with image.open(io.BytesIO(each.as_py()["bytes"])) as opened:
                    grey = opened.mode in ("1", "L")
                    pixels = np.asarray(opened.convert("L" if grey else "RGB"))
                decoded.append(pixels if grey else pixels.transpose(2, 0, 1))
            return np.stack(decoded)
        values = np.array(column.to_pylist()) if isinstance(first, list) else column.to_numpy()
    except (ValueError, TypeError, OSError) as error:
        raise DatasetError(f"{folder.name}: column {name!r}: {error}") from error
    if values.dtype.kind not in "biuf":
        raise DatasetError(f"{folder.name}: column {name!r} holds {values.dtype}, which are no numbers")
    return values


def _images(folder: Path) -> Rows:
    """One folder a class, its name the label: grey images as (rows, columns), others as (3, rows, columns)."""
    image = _optional("PIL.Image", "Pillow", "folders of images")
    found = [
        (path, label.name)
        for label in sorted(folder.iterdir())
        if label.is_dir()
        for path in sorted(label.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not found:
        raise DatasetError(f"{folder.name}: has no folders with images")
    modes: set[str] = set()
    sizes: dict[tuple[int, int], Path] = {}
    for path, _ in found:
        with image.open(path) as opened:
            modes.add(opened.mode)
            sizes.setdefault(opened.size, path)
    if len(sizes) > 1:
        one, other = list(sizes.values())[:2]
        raise DatasetError(f"{one.name} and {other.name} differ in size; all images must have one")
    grey = modes <= {"1", "L"}
    (columns, rows) = next(iter(sizes))
    x = _room((len(found), rows, columns) if grey else (len(found), 3, rows, columns))
    for index, (path, _) in enumerate(found):
        with image.open(path) as opened:
            pixels = np.asarray(opened.convert("L" if grey else "RGB"))
        x[index] = pixels if grey else pixels.transpose(2, 0, 1)
    return Rows(x, _parsed([label for _, label in found]))


def _room(shape: tuple[int, ...]) -> Array:
    """Bytes of this shape to be filled: in memory where they are few, else in a file that goes with the array."""
    if math.prod(shape) <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype=np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)


def _optional(module: str, package: str, purpose: str) -> Any:
    """A module of a package that only some sources need. Raises DatasetError naming the package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetError(f"{purpose} need the package {package}: pip install {package}") from error
