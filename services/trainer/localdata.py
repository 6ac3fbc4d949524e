"""The node's data folder: finds a dataset below it and looks through it before the first step."""

import asyncio
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from services.runtime.errors import DiskFull, FieldViolation, InvalidArgument, NotFound
from services.trainer.config import LossKind
from services.trainer.fulldisk import is_full
from services.trainer.packed import FOLDER, PackedCopies, mark_of, size_of
from tiltyard.datasets import Dataset, DatasetError, header_violations, scan
from tiltyard.datasources import check_kind
from tiltyard.modelspec import ModelSpec, Transformer

_MAX_PATH_CHARS = 1024
_SAFETENSORS = ".safetensors"
LARGE_BYTES = 256 * 1024 * 1024
LARGE_SOURCE_BYTES = 32 * 1024 * 1024
"""Packing reads a CSV file a tenth as fast as a dataset is looked through."""
DEFAULT_PACKED_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class LocalFile:
    """The file that a training reads, and a mark that changes when the dataset does.

    A dataset of another kind than safetensors is the `source`, which is packed into that file where it is not there.
    """

    path: Path
    mark: str
    source: Path | None = None


@dataclass(frozen=True)
class LocalDataset:
    """A dataset that was looked at: its rows, None where it has yet to be packed, and a mark that changes with it."""

    rows: int | None
    mark: str


class DataFolder:
    """The datasets that this node may train on. They never leave it.

    Those of other kinds than safetensors are packed into copies of at most `packed_bytes`.
    """

    def __init__(self, folder: Path, *, packed_bytes: int = DEFAULT_PACKED_BYTES) -> None:
        self.folder = folder
        self.packed_bytes = packed_bytes
        self.copies = PackedCopies(folder, max_bytes=packed_bytes)

    def tidy(self) -> None:
        """Removes packed copies that are of no use any more."""
        self.copies.tidy()

    def locate(self, dataset: str, loss: LossKind) -> LocalFile:
        """The safetensors file that a training reads: the dataset's own, or the one that it is packed into.

        Raises as `path` does, and OSError.
        """
        source = self.path(dataset)
        if source.suffix == _SAFETENSORS:
            return LocalFile(source, mark_of(source))
        copy = self.copies.place(source, loss)
        return LocalFile(copy, copy.stem, source)

    def path(self, dataset: str) -> Path:
        """The file or folder of a dataset, given as a path below the folder.

        Raises InvalidArgument on `dataset` for a path that leads out of the folder, NotFound when there is no file.
        """
        if not dataset:
            raise InvalidArgument.field("dataset", "is required, as a path below the node's data folder")
        relative = PurePosixPath(dataset)
        bad = len(dataset) > _MAX_PATH_CHARS or not dataset.isprintable()
        if bad or relative.is_absolute() or ".." in relative.parts or FOLDER in relative.parts[:1]:
            raise InvalidArgument.field(
                "dataset", "must be a relative path below the node's data folder, without '..'", reason="INVALID_PATH"
            )
        folder = self.folder.resolve()
        path = (folder / relative).resolve()
        if not path.is_relative_to(folder):
            raise InvalidArgument.field("dataset", "leads out of the node's data folder", reason="INVALID_PATH")
        if not path.is_file() and not (path.is_dir() and path != folder):
            raise NotFound("DATASET_NOT_FOUND", f"there is no dataset {dataset!r} in the node's data folder")
        return path

    async def check(self, dataset: str, *, spec: ModelSpec, loss: LossKind) -> LocalDataset:
        """Looks through the dataset. Raises InvalidArgument naming everything that does not fit the model.

        Of a large one only shapes and lengths, and of one that has to be packed only the kind: the training's own
        process packs it and looks through the rest before its first step.
        """
        return await asyncio.to_thread(self._check, dataset, spec, loss)

    def _check(self, dataset: str, spec: ModelSpec, loss: LossKind) -> LocalDataset:
        try:
            found = self.locate(dataset, loss)
            if found.source is None:
                rows = examine(found.path, spec, loss, whole=not is_large(found.path))
                return LocalDataset(rows=rows, mark=found.mark)
            check_kind(found.source)
            if size_of(found.source) > LARGE_SOURCE_BYTES and not found.path.exists():
                return LocalDataset(rows=None, mark=found.mark)
            with self.copies.held(found.path, found.source, loss):
                rows = examine(found.path, spec, loss, whole=not is_large(found.path))
                return LocalDataset(rows=rows, mark=found.mark)
        except DatasetError as error:
            raise InvalidArgument.field("dataset", f"is not a dataset: {error}", reason="BAD_DATASET") from error
        except OSError as error:
            if is_full(error):
                raise DiskFull("the node's disk is full: the dataset cannot be packed", resource="dataset") from error
            raise InvalidArgument.field("dataset", f"cannot be read: {error}", reason="BAD_DATASET") from error


def is_large(path: Path) -> bool:
    """Whether looking through a dataset takes longer than a caller should wait."""
    return path.stat().st_size > LARGE_BYTES


def class_count(dataset: Dataset, spec: ModelSpec, loss: LossKind) -> int | None:
    """Classes that labels may name, None for targets."""
    labelled = loss is LossKind.CROSS_ENTROPY or (loss.takes_labels() and dataset.y.dtype.kind == "i")
    return max(2, spec.outputs) if labelled else None


def examine(path: Path, spec: ModelSpec, loss: LossKind, *, whole: bool = True) -> int:
    """Looks through a dataset, or at its header alone; how many rows it has. Raises InvalidArgument, OSError."""
    try:
        dataset = Dataset.open(path)
    except DatasetError as error:
        raise InvalidArgument.field("dataset", f"is not a dataset: {error}", reason="BAD_DATASET") from error
    classes = class_count(dataset, spec, loss)
    if whole:
        scanned = scan(dataset, spec.input_shape, classes, input_scale=spec.input_scale)
    else:
        scanned = header_violations(dataset, spec.input_shape)
    found = [FieldViolation("dataset", f"{violation.field}: {violation.description}") for violation in scanned]
    if whole and not found:
        found = _fits(dataset, spec, loss, labelled=classes is not None)
    if found:
        raise InvalidArgument(found, reason="BAD_DATASET")
    return len(dataset)


def _fits(dataset: Dataset, spec: ModelSpec, loss: LossKind, *, labelled: bool) -> list[FieldViolation]:
    """What a scan for any task lets pass but a training cannot use."""
    if isinstance(spec.architecture, Transformer):
        last = spec.architecture.vocabulary - 1
        for start, part in dataset.chunks("x"):
            wrong = ((part < 0) | (part > last) | (part != np.trunc(part))).any(axis=1)
            if wrong.any():
                row = start + int(wrong.argmax())
                return [FieldViolation("dataset", f"x: row {row} has a value that is no token id of 0 to {last}")]
    if not labelled:
        targets = 1 if dataset.y.ndim == 1 else dataset.y.shape[1]
        if targets == spec.outputs:
            return [] if loss is not LossKind.BINARY_CROSS_ENTROPY else _probabilities(dataset)
        return [FieldViolation("dataset", f"y: has {targets} targets a row, but the model has {spec.outputs} outputs")]
    first = int(dataset.y[0])
    if all(bool(np.all(part == first)) for _, part in dataset.chunks("y")):
        return [FieldViolation("dataset", f"y: every row has the label {first}, one class cannot be told from others")]
    return []


def _probabilities(dataset: Dataset) -> list[FieldViolation]:
    for start, part in dataset.chunks("y"):
        wrong = ((part < 0) | (part > 1)).reshape(len(part), -1).any(axis=1)
        if wrong.any():
            row = start + int(wrong.argmax())
            return [FieldViolation("dataset", f"y: row {row} has a target outside 0 to 1, where binary ones lie")]
    return []
