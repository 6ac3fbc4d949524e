"""The node's data folder: finds a dataset below it and looks through it before the first step."""

import asyncio
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from services.runtime.errors import FieldViolation, InvalidArgument, NotFound
from services.trainer.config import LossKind
from tiltyard.datasets import Dataset, DatasetError, header_violations, pack, scan
from tiltyard.modelspec import ModelSpec, Transformer

_MAX_PATH_CHARS = 1024
# Sources of other kinds are packed once into this folder beside them.
_PACKED_FOLDER = ".packed"
_PACKED_SUFFIX = ".safetensors"
LARGE_BYTES = 256 * 1024 * 1024


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

    def file(self, dataset: str, loss: LossKind) -> Path:
        """The safetensors file that a training reads: the dataset's own, or the one that it was packed into.

        Raises as `path` does, and NotFound where a dataset of another kind was not packed as it is now.
        """
        source = self.path(dataset)
        if source.suffix == _PACKED_SUFFIX:
            return source
        packed = self._packed(source, loss)
        if not packed.is_file():
            raise NotFound("DATASET_CHANGED", f"the dataset {dataset!r} has changed since the training was started")
        return packed

    def path(self, dataset: str) -> Path:
        """The file or folder of a dataset, given as a path below the folder.

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
        if not path.is_file() and not (path.is_dir() and path != folder):
            raise NotFound("DATASET_NOT_FOUND", f"there is no dataset {dataset!r} in the node's data folder")
        return path

    async def check(self, dataset: str, *, spec: ModelSpec, loss: LossKind) -> LocalDataset:
        """Looks through the dataset. Raises InvalidArgument naming everything that does not fit the model.

        Of a large one only shapes and lengths: the training's own process looks through the rest before its first step.
        """
        return await asyncio.to_thread(self._check, dataset, spec, loss)

    def _check(self, dataset: str, spec: ModelSpec, loss: LossKind) -> LocalDataset:
        path = self.path(dataset)
        if path.suffix != _PACKED_SUFFIX:
            self._pack(path, loss)
            path = self.file(dataset, loss)
        return examine(path, spec, loss, whole=not is_large(path))

    def _packed(self, source: Path, loss: LossKind) -> Path:
        """Where a source of another kind lies as safetensors: another place when the source changes."""
        facts = f"{source}/{mark_of(source)}/{_regression(loss)}"
        return self._folder / _PACKED_FOLDER / (hashlib.sha256(facts.encode()).hexdigest()[:32] + _PACKED_SUFFIX)

    def _pack(self, source: Path, loss: LossKind) -> None:
        packed = self._packed(source, loss)
        if packed.exists():
            return
        size = source.stat().st_size if source.is_file() else sum(each.stat().st_size for each in _files(source))
        if size > LARGE_BYTES:
            raise InvalidArgument.field(
                "dataset",
                f"has {size} bytes, over {LARGE_BYTES} it must be a safetensors file: tiltyard dataset pack makes one",
                reason="BAD_DATASET",
            )
        packed.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            pack(source, packed, regression=_regression(loss))
        except (DatasetError, OSError) as error:
            raise InvalidArgument.field("dataset", f"is not a dataset: {error}", reason="BAD_DATASET") from error


def mark_of(path: Path) -> str:
    """Changes when the file, or a file of the folder, is replaced or written to."""
    if path.is_dir():
        marks = "".join(f"{each.relative_to(path)}\0{mark_of(each)}\0" for each in _files(path))
        return hashlib.sha256(marks.encode()).hexdigest()
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def _files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.is_file())


def _regression(loss: LossKind) -> bool | None:
    """Whether numbers are targets; None leaves it to what they look like."""
    if loss is LossKind.BINARY_CROSS_ENTROPY:
        return None
    return not loss.takes_labels()


def is_large(path: Path) -> bool:
    """Whether looking through a dataset takes longer than a caller should wait."""
    return path.stat().st_size > LARGE_BYTES


def class_count(dataset: Dataset, spec: ModelSpec, loss: LossKind) -> int | None:
    """Classes that labels may name, None for targets."""
    labelled = loss is LossKind.CROSS_ENTROPY or (loss.takes_labels() and dataset.y.dtype.kind == "i")
    return max(2, spec.outputs) if labelled else None


def examine(path: Path, spec: ModelSpec, loss: LossKind, *, whole: bool = True) -> LocalDataset:
    """Looks through a dataset, or at its header alone. Raises InvalidArgument."""
    mark = mark_of(path)
    try:
        dataset = Dataset.open(path)
    except (DatasetError, OSError) as error:
        raise InvalidArgument.field("dataset", f"is not a dataset: {error}", reason="BAD_DATASET") from error
    classes = class_count(dataset, spec, loss)
    scanned = scan(dataset, spec.input_shape, classes) if whole else header_violations(dataset, spec.input_shape)
    found = [FieldViolation("dataset", f"{violation.field}: {violation.description}") for violation in scanned]
    if whole and not found:
        found = _fits(dataset, spec, loss, labelled=classes is not None)
    if found:
        raise InvalidArgument(found, reason="BAD_DATASET")
    return LocalDataset(path=path, rows=len(dataset), mark=mark)


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
