"""Copies of datasets of other kinds as safetensors: made once, bounded, and made again when they are gone."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.trainer.config import LossKind
from tiltyard.datasets import pack

FOLDER = ".packed"
_SUFFIX = ".safetensors"
_LOCK = ".lock"


class PackedCopies:
    """Below `data`/.packed each source has a folder of its own path, with a copy named by what the source was then.

    A copy may vanish at any time: whoever needs it has it made again. Several processes may share the folder.
    """

    def __init__(self, data: Path, *, max_bytes: int) -> None:
        self._data = data
        self._folder = data / FOLDER
        self._max_bytes = max_bytes

    def copy(self, source: Path, loss: LossKind) -> Path:
        """The copy of a source as it is now. Raises OSError, and DatasetError for what is no dataset."""
        path = self._place(source, loss)
        try:
            os.utime(path)  # those used last are kept longest
        except FileNotFoundError:
            with self._alone():
                if not path.exists():
                    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    pack(source, path, regression=regression(loss))
                self._tidy(keep=path)
        return path

    def tidy(self) -> None:
        """Removes copies of what has changed or is gone, what a crash left half done, and what is over the bound."""
        if self._folder.is_dir():
            with self._alone():
                self._tidy(keep=None)

    def _place(self, source: Path, loss: LossKind) -> Path:
        kind = {None: "any", True: "targets", False: "labels"}[regression(loss)]
        relative = source.relative_to(self._data.resolve())
        return self._folder / relative / f"{mark_of(source)}-{kind}{_SUFFIX}"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with (self._folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _tidy(self, *, keep: Path | None) -> None:
        kept: list[tuple[int, int, Path]] = []
        for folder, _, names in os.walk(self._folder, topdown=False):
            place = Path(folder)
            for name in names:
                path = place / name
                if path == self._folder / _LOCK:
                    continue
                if path != keep and not self._is_current(path):
                    path.unlink()
                else:
                    status = path.stat()
                    kept.append((status.st_mtime_ns, status.st_size, path))
            if place != self._folder and not any(place.iterdir()):
                place.rmdir()
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total > self._max_bytes and path != keep:
                path.unlink()
                total -= size

    def _is_current(self, path: Path) -> bool:
        """Whether a copy is whole and its source is still what it was."""
        source = self._data.resolve() / path.parent.relative_to(self._folder)
        if path.suffix != _SUFFIX or path.parent == self._folder:
            return False
        try:
            return path.stem.rpartition("-")[0] == mark_of(source)
        except FileNotFoundError:
            return False


def mark_of(path: Path) -> str:
    """Changes when the file, or a file of the folder, is replaced or written to. Raises FileNotFoundError."""
    if path.is_dir():
        marks = "".join(f"{each.relative_to(path)}\0{mark_of(each)}\0" for each in files_of(path))
        return hashlib.sha256(marks.encode()).hexdigest()
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, in order."""
    return sorted(each for each in folder.rglob("*") if each.is_file())


def regression(loss: LossKind) -> bool | None:
    """Whether numbers are targets; None leaves it to what they look like."""
    if loss is LossKind.BINARY_CROSS_ENTROPY:
        return None
    return not loss.takes_labels()
