"""The folder of one run: what the service orders, what the child keeps, and the model that both end with."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.trainer.config import LossKind, TrainingConfig
from tiltyard import modelspec
from tiltyard.foldersync import sync_folder
from tiltyard.modelspec import ModelSpec

# What a process says while it trains: one JSON object for each event.
Say = Callable[[dict[str, Any]], None]
STOPPED_STATUS = 3
"""Exit status of a process that was told to stop and may go on from its checkpoint."""

MODEL_FILE = "model.safetensors"
SPEC_FILE = "spec.json"
JOURNAL_FILE = "submission.json"
_ORDER_FILE = "run.json"
_RESULT_FILE = "result.json"
_LOCK_FILE = "lock"
_CANCELLED_FILE = "cancelled"
_KEPT_FILES = (MODEL_FILE, SPEC_FILE, JOURNAL_FILE)


@dataclass(frozen=True)
class Order:
    """Everything that a child needs to know. `threads` is fixed for a run: sums depend on it to the last bit.

    `base_model` holds the weights to begin with and is named by its SHA-256; None begins with fresh ones. Where there
    is a `source`, `dataset` is the copy that it is packed into, one of those below the `data` folder.
    """

    dataset: Path
    spec: ModelSpec
    loss: LossKind
    config: TrainingConfig
    device: str
    threads: int
    base_model: Path | None = None
    source: Path | None = None
    data: Path = Path()
    packed_bytes: int = 0


def prepare(folder: Path, order: Order) -> None:
    """Makes the folder and writes the order into it; model servers find the spec beside the model."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / _LOCK_FILE).touch()  # a child on a full disk could not make it
    write_json(folder / SPEC_FILE, modelspec.to_json(order.spec))
    write_json(
        folder / _ORDER_FILE,
        {
            "dataset": str(order.dataset),
            "spec": modelspec.to_json(order.spec),
            "loss": order.loss,
            "config": order.config.to_json(),
            "device": order.device,
            "threads": order.threads,
            "base_model": str(order.base_model) if order.base_model else None,
            "source": str(order.source) if order.source else None,
            "data": str(order.data),
            "packed_bytes": order.packed_bytes,
        },
    )


def read_order(folder: Path) -> Order:
    """The order that `prepare` wrote."""
    raw = json.loads((folder / _ORDER_FILE).read_text())
    return Order(
        dataset=Path(raw["dataset"]),
        spec=modelspec.from_json(raw["spec"]),
        loss=LossKind(raw["loss"]),
        config=TrainingConfig.from_json(raw["config"]),
        device=raw["device"],
        threads=raw["threads"],
        base_model=Path(raw["base_model"]) if raw.get("base_model") else None,
        source=Path(raw["source"]) if raw.get("source") else None,
        data=Path(raw.get("data", "")),
        packed_bytes=raw.get("packed_bytes", 0),
    )


def scratch(folder: Path) -> Path:
    """A folder of short path for what must not outlive the run: sockets lie in it, and theirs are at most 107 bytes."""
    return _temporary() / f"ty{hashlib.sha256(bytes(folder)).hexdigest()[:10]}"


def _temporary() -> Path:
    """Where temporary files go, also while the disk is full: `gettempdir`, which writes there, names another then."""
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    for each in (*filter(None, named), "/tmp"):  # noqa: S108 -- what lies there has a folder of its own
        if os.path.isdir(each) and os.access(each, os.W_OK | os.X_OK):
            return Path(each).absolute()
    return Path(tempfile.gettempdir())


def data_report(folder: Path) -> Path:
    """What was found in the dataset, once it has been looked through."""
    return folder / "data.json"


def checkpoint(folder: Path) -> Path:
    """The last checkpoint."""
    return folder / "checkpoint.safetensors"


def log(folder: Path) -> Path:
    """What the child writes to standard error."""
    return folder / "child.log"


def read_result(folder: Path) -> dict[str, Any] | None:
    """The last word of a child that finished, None before."""
    try:
        result: dict[str, Any] = json.loads((folder / _RESULT_FILE).read_text())
    except FileNotFoundError:
        return None
    return result


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Makes the run finished: from here on it is never trained again."""
    write_json(folder / _RESULT_FILE, result)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process works in the folder; the lock goes with the process that holds it."""
    with (folder / _LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_drafts(folder: Path) -> None:
    """Removes what a process was writing when it was killed: checkpoints, say. Only for who is `alone`."""
    for path in folder.glob(".*"):
        path.unlink(missing_ok=True)


def mark_cancelled(folder: Path) -> None:
    """Keeps durably that the run was asked to stop, with an empty file: in most file systems a full disk takes one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / _CANCELLED_FILE).touch()
    sync_folder(folder)


def is_cancelled(folder: Path) -> bool:
    """Whether `mark_cancelled` was called for it."""
    return (folder / _CANCELLED_FILE).exists()


def clear(folder: Path, *, keep_mark: bool = False) -> None:
    """Leaves the model, its spec and the submission's journal, and by choice the mark of who was asked to stop."""
    if not folder.is_dir():
        return
    kept = (*_KEPT_FILES, _CANCELLED_FILE) if keep_mark else _KEPT_FILES
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in kept:
            path.unlink(missing_ok=True)


def is_clear(folder: Path) -> bool:
    """Whether the folder holds a model and nothing but what `clear` leaves, is gone meanwhile, or is another user's."""
    try:
        names = {path.name for path in folder.iterdir()}
    except (FileNotFoundError, PermissionError):
        return True
    return MODEL_FILE in names and names.issubset(_KEPT_FILES)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file whole or not at all, and durably."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)
