"""Hugging Face datasets on disk: the Arrow files that state.json names, mapped, and let go of batch by batch."""

import io
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tiltyard.datasources.columns import labels, numbers
from tiltyard.datasources.images import is_grey, pixels_of
from tiltyard.datasources.rows import LABEL_COLUMN, Array, DatasetError, Rows, batch_rows, optional

LABEL_COLUMNS = ("label", "labels", LABEL_COLUMN)


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a dataset, or a dictionary of them, that `save_to_disk` wrote."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def batches(folder: Path) -> Iterator[Rows]:
    """Images are decoded, lists stacked, numbers put side by side."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise DatasetError(f"{folder.name}: has the splits {splits}; name one as {folder.name}/SPLIT")
    arrow = optional("pyarrow", "pyarrow", "Hugging Face datasets")
    schema = None
    for file in _files(folder):
        try:
            for batch in _record_batches(arrow, file):
                schema = schema or batch.schema
                if not batch.schema.equals(schema):
                    raise DatasetError(f"{file.name} has other columns than the file before it")
                yield Rows(_features(arrow, batch), _label(arrow, batch))
        except (ValueError, TypeError, LookupError, NotImplementedError) as error:
            raise DatasetError(f"{folder.name}: {error}") from error
        except OSError as error:
            if error.errno is not None:
                raise
            # No trouble with the disk: so pyarrow calls bytes that make no sense.
            raise DatasetError(f"{folder.name}: {error}") from error


def _files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = [folder / Path(each["filename"]).name for each in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(f"{folder.name}: is no dataset of save_to_disk: {error}") from error
    if state.get("_indices_data_files"):
        raise DatasetError(f"{folder.name}: its rows were selected or shuffled; call flatten_indices() before saving")
    return files


def _record_batches(arrow: Any, file: Path) -> Iterator[Any]:
    """A file's record batches, those that are large in slices."""
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with arrow.ipc.open_stream(arrow.py_buffer(mapped)) as stream:
        for batch in stream:
            if not batch.num_rows:
                continue
            row_bytes = max(_features(arrow, batch.slice(0, 1)).nbytes, batch.nbytes // batch.num_rows)
            step = batch_rows(row_bytes)
            for start in range(0, batch.num_rows, step):
                yield batch.slice(start, step)
                # What has been read must not stay in memory until the file is at its end.
                mapped.madvise(mmap.MADV_DONTNEED)


def _label_at(batch: Any) -> int:
    names: list[str] = batch.schema.names
    label = next((name for name in LABEL_COLUMNS if name in names), None)
    if label is None or len(names) < 2:
        raise DatasetError(f"needs a column named {' or '.join(LABEL_COLUMNS)}, and features")
    return names.index(label)


def _label(arrow: Any, batch: Any) -> Array:
    return labels(arrow, batch.column(_label_at(batch)))


def _features(arrow: Any, batch: Any) -> Array:
    label = _label_at(batch)
    found = [
        _feature(arrow, name, batch.column(index)) for index, name in enumerate(batch.schema.names) if index != label
    ]
    return found[0] if len(found) == 1 else np.stack(found, axis=1)


def _feature(arrow: Any, name: str, column: Any) -> Array:
    if not arrow.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
        return numbers(arrow, name, column)
    try:
        return _images(column)
    except (ValueError, TypeError, OSError) as error:
        raise DatasetError(f"column {name!r}: {error}") from error


def _images(column: Any) -> Array:
    image = optional("PIL.Image", "Pillow", "images")
    decoded = []
    for each in column:
        with image.open(io.BytesIO(each.as_py()["bytes"])) as opened:
            decoded.append(pixels_of(opened, grey=is_grey(opened)))
    return np.stack(decoded)
