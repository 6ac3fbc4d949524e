"""Parquet: columns of numbers and one of labels, some columns at a time and of each a page."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from tiltyard.datasources.columns import labels, numbers
from tiltyard.datasources.rows import LABEL_COLUMN, Array, DatasetError, Rows, batch_rows, optional
from tiltyard.datasources.spill import Spill

# A column takes about 2 MiB while it is read, its page and its dictionary. Of a wide table, these go aside before the
# next are read.
COLUMNS_AT_ONCE = 16
# Without a buffer pyarrow reads what a row group has of a column at once, and a row group may be the whole file.
_BUFFER_BYTES = 64 * 1024


def batches(path: Path, *, scratch: Path) -> Iterator[Rows]:
    """The label is in the column named `y`, otherwise in the last."""
    arrow = optional("pyarrow", "pyarrow", "Parquet files")
    parquet = optional("pyarrow.parquet", "pyarrow", "Parquet files")
    with arrow.OSFile(str(path)) as file:
        try:
            opened = parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            yield from _batches(arrow, opened, scratch)
        except (ValueError, TypeError, LookupError, NotImplementedError) as error:
            raise DatasetError(f"{path.name}: {error}") from error
        except OSError as error:
            if error.errno is not None:
                raise
            # No trouble with the disk: so pyarrow calls bytes that make no sense.
            raise DatasetError(f"{path.name}: {error}") from error


def _batches(arrow: Any, file: Any, scratch: Path) -> Iterator[Rows]:
    names: list[str] = file.schema_arrow.names
    if len(names) < 2:
        raise DatasetError("needs at least one column of features and one of labels")
    if len(set(names)) < len(names):
        raise DatasetError("has columns of the same name")
    label = LABEL_COLUMN if LABEL_COLUMN in names else names[-1]
    features = [name for name in names if name != label]
    *before, last = (features[at : at + COLUMNS_AT_ONCE] for at in range(0, len(features), COLUMNS_AT_ONCE))
    step = batch_rows(8 * len(names))

    def read(columns: list[str]) -> Iterator[Any]:
        return iter(file.iter_batches(batch_size=step, columns=columns, use_threads=False))

    def beside(columns: list[str], batch: Any) -> Array:
        found = {name: numbers(arrow, name, batch.column(name)) for name in columns}
        for name, values in found.items():
            if values.ndim > 1:
                raise DatasetError(f"column {name!r} holds lists, which are no numbers")
        return np.stack(list(found.values()), axis=1)

    with ExitStack() as stack:
        aside = [stack.enter_context(Spill(scratch)) for _ in before]
        for columns, spill in zip(before, aside, strict=True):
            for batch in read(columns):
                spill.append(beside(columns, batch))
        start = 0
        for batch in read([*last, label]):
            stop = start + batch.num_rows
            x = [spill.between(start, stop) for spill in aside if stop > start]
            yield Rows(np.concatenate([*x, beside(last, batch)], axis=1), labels(arrow, batch.column(label)))
            start = stop
