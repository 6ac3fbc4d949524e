"""The node's data folder: finds a dataset below it and looks through it before the first step."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from services.runtime.errors import FieldViolation, InvalidArgument, NotFound
from services.trainer.config import LossKind
from tiltyard.datasets import Dataset, DatasetError, scan
from tiltyard.modelspec import ModelSpec

_MAX_PATH_CHARS = 1024


@dataclass(frozen=True)
class LocalDataset:
    """A dataset that was looked through: its file, its rows, and a mark that changes when the file does."""

    path: Path
    rows: int
    mark: str


class DataFolder:
    """The datasets that this node may train on. They never leave it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, dataset: str) -> Path:
        """The file of a dataset, given as a path below the folder.

        Raises InvalidArgument on `dataset` for a path that leads out of the folder, NotFound when there is no file.
        """
        if not dataset:
            raise InvalidArgument.field("dataset", "is required, as a path below the node's data folder")
        relative = PurePosixPath(dataset)
        bad = len(dataset) > _MAX_PATH_CHARS or not dataset.isprintable()
        if bad or relative.is_absolute() or ".." in relative.parts:
            raise InvalidArgument.field(
                "dataset", "must be a relative path below the node's data folder, without '..'", reason="INVALID_PATH"
            )
        folder = self._folder.resolve()
        path = (folder / relative).resolve()
        if not path.is_relative_to(folder):
            raise InvalidArgument.field("dataset", "leads out of the node's data folder", reason="INVALID_PATH")
        if not path.is_file():
            raise NotFound("DATASET_NOT_FOUND", f"there is no dataset {dataset!r} in the node's data folder")
        return path

    async def check(self, dataset: str, *, spec: ModelSpec, loss: LossKind) -> LocalDataset:
        """Looks through the whole dataset. Raises InvalidArgument naming everything that does not fit the model."""
        path = self.path(dataset)
        return await asyncio.to_thread(_check, path, spec, loss)


def mark_of(path: Path) -> str:
    """Changes when the file is replaced or written to."""
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def _check(path: Path, spec: ModelSpec, loss: LossKind) -> LocalDataset:
    mark = mark_of(path)
    try:
        dataset = Dataset.open(path)
    except (DatasetError, OSError) as error:
        raise InvalidArgument.field("dataset", f"is not a dataset: {error}", reason="BAD_DATASET") from error
    classes = spec.outputs if loss is LossKind.CROSS_ENTROPY else None
    found = [
        FieldViolation("dataset", f"{violation.field}: {violation.description}")
        for violation in scan(dataset, spec.input_shape, classes)
    ]
    if not found:
        found = _fits(dataset, spec, loss)
    if found:
        raise InvalidArgument(found, reason="BAD_DATASET")
    return LocalDataset(path=path, rows=len(dataset), mark=mark)


def _fits(dataset: Dataset, spec: ModelSpec, loss: LossKind) -> list[FieldViolation]:
    """What a scan for any task lets pass but a training cannot use."""
    if loss is LossKind.MSE:
        targets = 1 if dataset.y.ndim == 1 else dataset.y.shape[1]
        if targets == spec.outputs:
            return []
        return [FieldViolation("dataset", f"y: has {targets} targets a row, but the model has {spec.outputs} outputs")]
    first = dataset.y[0]
    if all(bool(np.all(part == first)) for _, part in dataset.chunks("y")):
        return [FieldViolation("dataset", f"y: every row has the label {first}, one class cannot be told from others")]
    return []
