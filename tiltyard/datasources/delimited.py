"""CSV and TSV: numeric columns and one of labels, read twice, once to see what the labels are and once for the rows."""

import csv
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from tiltyard.datasources.rows import (
    LABEL_COLUMN,
    MAX_LABEL_CHARS,
    DatasetError,
    Rows,
    batch_rows,
    is_number,
    label_kind,
    parsed,
)

# A file without an end of line is not taken for one row.
MAX_LINE_CHARS = 16 * 1024 * 1024


def batches(path: Path, delimiter: str) -> Iterator[Rows]:
    """The label is in the column named `y`, otherwise in the last. The first line may be a header."""
    columns = _Columns.of(path, delimiter)
    kind = "i"
    for line, cells in columns.rows():
        kind = label_kind(columns.label(line, cells), kind)
        if kind == "U":
            break
    step = batch_rows(8 * len(columns.names))
    values, labels = array("d"), list[str]()
    for line, cells in columns.rows():
        labels.append(columns.label(line, cells))
        del cells[columns.label_at]
        try:
            values.extend(map(float, cells))
        except ValueError:
            raise columns.no_number(line, cells) from None
        if len(labels) == step:
            yield columns.batch(values, labels, kind)
            values, labels = array("d"), []
    if labels:
        yield columns.batch(values, labels, kind)


@dataclass(frozen=True)
class _Columns:
    """What the first line says of the others. `names` are those of the header, if it is one, otherwise numbers."""

    path: Path
    delimiter: str
    names: list[str]
    label_at: int
    headed: bool

    @classmethod
    def of(cls, path: Path, delimiter: str) -> "_Columns":
        _, first = next(_cells(path, delimiter), (0, None))
        if first is None:
            raise DatasetError(f"{path.name}: is empty")
        if len(first) < 2:
            raise DatasetError(f"{path.name}: needs at least one column of features and one of labels")
        names = [name.strip() for name in first]
        label_at = names.index(LABEL_COLUMN) if LABEL_COLUMN in names else len(first) - 1
        headed = LABEL_COLUMN in names or not all(is_number(cell) for i, cell in enumerate(first) if i != label_at)
        return cls(path, delimiter, names if headed else [str(n) for n in range(1, len(first) + 1)], label_at, headed)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """The rows' cells, with the number of the line."""
        found = False
        cells = _cells(self.path, self.delimiter)
        if self.headed:
            next(cells, None)
        for line, row in cells:
            if not row:
                continue
            if len(row) != len(self.names):
                raise DatasetError(f"{self.path.name}:{line}: {len(row)} columns, not {len(self.names)}")
            found = True
            yield line, row
        if not found:
            raise DatasetError(f"{self.path.name}: has no rows")

    def label(self, line: int, row: list[str]) -> str:
        label = row[self.label_at].strip()
        if len(label) > MAX_LABEL_CHARS:
            raise DatasetError(f"{self.path.name}:{line}: a label of {len(label)} characters, over {MAX_LABEL_CHARS}")
        return label

    def no_number(self, line: int, features: list[str]) -> DatasetError:
        """Which of a row's features is none."""
        names = self.names[: self.label_at] + self.names[self.label_at + 1 :]
        name, cell = next((name, cell) for name, cell in zip(names, features, strict=True) if not is_number(cell))
        return DatasetError(f"{self.path.name}:{line}: column {name[:80]!r}: {cell[:80]!r} is no number")

    def batch(self, values: "array[float]", labels: list[str], kind: str) -> Rows:
        try:
            y = parsed(labels, kind)
        except DatasetError as error:
            raise DatasetError(f"{self.path.name}: {error}") from error
        return Rows(np.frombuffer(values, np.float64).reshape(len(labels), len(self.names) - 1), y)


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(_lines(file, path.name), delimiter=delimiter)
        try:
            for row in lines:
                yield lines.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DatasetError(f"{path.name}:{lines.line_num}: {error}") from error


def _lines(file: TextIO, name: str) -> Iterator[str]:
    while line := file.readline(MAX_LINE_CHARS):
        if len(line) == MAX_LINE_CHARS and not line.endswith(("\n", "\r")):
            raise DatasetError(f"{name}: a line has over {MAX_LINE_CHARS} characters")
        yield line
