"""Copies of datasets of other kinds as safetensors: made once, bounded, and made again when they are gone."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from services.trainer.config import LossKind
from services.trainer.fulldisk import is_full
from tiltyard.datasets import DatasetError, pack

FOLDER = ".packed"
_SUFFIX = ".safetensors"


class PackedCopies:
    """Below `data`/.packed each source has a folder of its own path, with a copy named by what the source was then.

    Several processes may share the folder: who packs holds a lock on the source's folder there, who uses a copy one on
    the copy. Locks go with their processes. A copy that nobody holds may vanish at any time: it is made again where it
    is needed. `max_bytes` bounds the copies together; those in use may exceed it while they are.
    """

    def __init__(self, data: Path, *, max_bytes: int) -> None:
        self._data = data
        self._folder = data / FOLDER
        self._max_bytes = max_bytes

    def place(self, source: Path, loss: LossKind) -> Path:
        """Where the copy of a source as it is now belongs. Raises OSError."""
        kind = {None: "any", True: "targets", False: "labels"}[regression(loss)]
        relative = source.relative_to(self._data.resolve())
        return self._folder / relative / f"{mark_of(source)}-{kind}{_SUFFIX}"

    @contextmanager
    def held(
        self, copy: Path, source: Path, loss: LossKind, *, progress: Callable[[int], None] = lambda _: None
    ) -> Iterator[None]:
        """Has the `place` of a source filled, packed now where it is not, and keeps it so.

        `progress` is told the rows read so far. Raises OSError, and DatasetError for what is no dataset.
        """
        held = _taken(copy)
        while held is None:
            with _alone(copy.parent):
                if not copy.exists():
                    self._pack(copy, source, loss, progress)
            held = _taken(copy)
        with held:
            self.bound()
            yield

    def _pack(self, copy: Path, source: Path, loss: LossKind, progress: Callable[[int], None]) -> None:
        try:
            pack(source, copy, regression=regression(loss), progress=progress)
        except OSError as error:
            if not is_full(error) or not self.bound(max_bytes=0):
                raise
            # What nobody used has made room.
            pack(source, copy, regression=regression(loss), progress=progress)
        if not copy.name.startswith(f"{mark_of(source)}-"):
            copy.unlink()
            raise DatasetError("it was changed while it was packed")

    def tidy(self) -> None:
        """Removes copies of what has changed or is gone, what a crash left half done, and what is over the bound."""
        for folder, _, names in os.walk(self._folder, topdown=False):
            place = Path(folder)
            for name in names:
                if not self._is_current(place / name):
                    _remove_unused(place / name)
        self.bound()

    def bound(self, *, max_bytes: int | None = None) -> int:
        """Removes the copies used longest ago until the others keep within the bound; those in use stay.

        The bytes that have become free.
        """
        most = self._max_bytes if max_bytes is None else max_bytes
        found: list[tuple[int, int, Path]] = []
        for folder, _, names in os.walk(self._folder):
            for path in (Path(folder) / name for name in names if name.endswith(_SUFFIX)):
                with suppress(FileNotFoundError):  # another process tidies up, too
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        before = total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total > most and _remove_unused(path):
                total -= size
        for folder, _, _ in os.walk(self._folder, topdown=False):
            if folder != str(self._folder):
                _remove_empty(Path(folder))
        return before - total

    def _is_current(self, path: Path) -> bool:
        """Whether a copy is whole and its source is still what it was."""
        source = self._data.resolve() / path.parent.relative_to(self._folder)
        if path.suffix != _SUFFIX or path.name.startswith(".") or path.parent == self._folder:
            return False
        try:
            return path.stem.rpartition("-")[0] == mark_of(source)
        except (FileNotFoundError, NotADirectoryError):
            return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until nobody else packs into the folder, which is there."""
    while True:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # it was empty, and tidied away
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_still(folder, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def _taken(copy: Path) -> BinaryIO | None:
    """The copy, open and locked, so that nobody removes it; None where there is none."""
    try:
        file = copy.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if not _is_still(copy, file.fileno()):
        file.close()
        return None
    os.utime(file.fileno())  # those used last are kept longest
    return file


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether what is open is what lies there: it may have been removed while a lock on it was waited for."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Removes a file that nobody uses or writes; whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.name.startswith("."):
                return _under_lock(path.parent, path.unlink)
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _remove_empty(folder: Path) -> None:
    with suppress(FileNotFoundError):
        if not any(folder.iterdir()):
            _under_lock(folder, folder.rmdir)


def _under_lock(folder: Path, work: Callable[[], None]) -> bool:
    """Does the work unless somebody packs into the folder; whether it was done."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        work()
    except OSError:
        return False  # locked, or not empty any more
    finally:
        os.close(descriptor)
    return True


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


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(each.stat().st_size for each in files_of(path)) if path.is_dir() else path.stat().st_size


def regression(loss: LossKind) -> bool | None:
    """Whether numbers are targets; None leaves it to what they look like."""
    if loss is LossKind.BINARY_CROSS_ENTROPY:
        return None
    return not loss.takes_labels()
