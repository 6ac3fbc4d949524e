"""Artifacts as files in a directory, named by their digest: whole, or not there at all."""

import contextlib
import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from services.registry.artifacts.files import OpenUpload, Partial, Stored, UnnamedPartial
from tiltyard.foldersync import sync_folder
from tiltyard.growingfile import GrowingFile
from tiltyard.pagecache import Passage

_PLACED = ".placed"


class PartialFile:
    """One upload on its way: appended to, hashed as it grows, and put in its place by `place`.

    `demand_room` raises OSError where so many bytes more are not to be written.
    """

    def __init__(
        self, partial: Path, sha256: str, place: Callable[[Path, str], None], demand_room: Callable[[int], None]
    ) -> None:
        self._sha256 = sha256
        self._place = place
        self._demand_room = demand_room
        self._file = GrowingFile(partial)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._file.size

    def append(self, chunks: Sequence[bytes | memoryview]) -> None:
        """The next bytes, out of this process at once: they survive its death."""
        self._demand_room(sum(map(len, chunks)))
        self._file.append(chunks)

    def finish(self) -> bool:
        """Put the whole file in its place, durably. False where the digest is another: then nothing is kept."""
        if self._file.digest().hex() != self._sha256:
            self.close()
            self._file.path.unlink()
            return False
        self._file.sync()
        self.close()
        # From here on the upload counts as complete, wherever its bytes lie.
        _marker(self._file.path).touch()
        self._place(self._file.path, self._sha256)
        return True

    def settle(self) -> None:
        """The artifact is on record: forget the upload."""
        _marker(self._file.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Keep what there is for the next try."""
        self._file.close()


class UnnamedFile(PartialFile):
    """One upload whose digest comes later, which tells where it goes on; gone when it is closed before."""

    def __init__(
        self,
        unnamed: Path,
        partial_of: Callable[[str], Path],
        place: Callable[[Path, str], None],
        demand_room: Callable[[int], None],
    ) -> None:
        super().__init__(unnamed, "", place, demand_room)
        self._partial_of = partial_of

    def name(self, sha256: str) -> None:
        """Go on as the upload of this digest, in place of what was kept of that one."""
        self._file.rename(self._partial_of(sha256))
        self._sha256 = sha256
        _marker(self._file.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Keep what there is for the next try, where there can be one."""
        super().close()
        if not self._sha256:
            self._file.path.unlink(missing_ok=True)


class PlacedFile:
    """An upload whose bytes are all in their place, and not on record yet: the process died in between."""

    def __init__(self, marker: Path, size: int) -> None:
        self._marker = marker
        self.size = size

    def append(self, chunks: Sequence[bytes | memoryview]) -> None:
        """There is nothing to append."""
        if any(chunks):
            raise ValueError("the upload is complete")

    def finish(self) -> bool:
        """It is in its place."""
        return True

    def settle(self) -> None:
        """The artifact is on record: forget the upload."""
        self._marker.unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is open."""


class UploadFolder:
    """Uploads on their way, as `{owner}-{sha256}`; `{owner}-{sha256}.placed` says that all bytes are in their place.

    `place` moves a whole file there; `placed_size` tells the size of what lies there, or raises FileNotFoundError.
    Uploads leave `keep_free_bytes` of the disk to what is written beside them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        place: Callable[[Path, str], None],
        placed_size: Callable[[str], int],
        keep_free_bytes: int = 0,
    ) -> None:
        self._folder = folder
        self._keep_free_bytes = keep_free_bytes
        self._place = place
        self._placed_size = placed_size
        folder.mkdir(parents=True, exist_ok=True)

    def partial_size(self, owner: str, sha256: str) -> int:
        """Bytes of one participant's upload so far."""
        with contextlib.suppress(FileNotFoundError):
            return self._partial(owner, sha256).stat().st_size
        if _marker(self._partial(owner, sha256)).exists():
            with contextlib.suppress(FileNotFoundError):
                return self._placed_size(sha256)
        return 0

    def open_partial(self, owner: str, sha256: str, *, anew: bool) -> Partial:
        """One participant's upload, to go on with or to begin `anew`."""
        partial = self._partial(owner, sha256)
        marker = _marker(partial)
        if anew:
            partial.unlink(missing_ok=True)
            marker.unlink(missing_ok=True)
        elif marker.exists() and not partial.exists():
            with contextlib.suppress(FileNotFoundError):
                return PlacedFile(marker, self._placed_size(sha256))
        return PartialFile(partial, sha256, self._place, self._demand_room)

    def open_unnamed(self, owner: str, stand_in: str) -> UnnamedPartial:
        """A new upload of one participant, whose digest is not known yet."""
        unnamed = self._partial(owner, stand_in)
        return UnnamedFile(unnamed, lambda sha256: self._partial(owner, sha256), self._place, self._demand_room)

    def open_uploads(self, owner: str | None = None) -> Sequence[OpenUpload]:
        """What is kept of one participant's uploads, or of everybody's."""
        found = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name = entry.name.removesuffix(_PLACED)
                whose, _, sha256 = name.partition("-")
                if owner is not None and whose != owner:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    size = status.st_size
                    if entry.name.endswith(_PLACED):
                        size = self._placed_size(sha256)
                    changed = datetime.fromtimestamp(status.st_mtime, UTC)
                    found[name] = OpenUpload(whose, sha256, size, changed)
        return list(found.values())

    def remove_partial(self, owner: str, sha256: str) -> None:
        """Forget an upload, if there is one."""
        partial = self._partial(owner, sha256)
        _marker(partial).unlink(missing_ok=True)
        partial.unlink(missing_ok=True)

    def _demand_room(self, size_bytes: int) -> None:
        disk = os.statvfs(self._folder)
        if disk.f_bavail * disk.f_frsize < size_bytes + self._keep_free_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _partial(self, owner: str, sha256: str) -> Path:
        return self._folder / f"{owner}-{sha256}"


def _marker(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}{_PLACED}")


class Readers:
    """How many read each file now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[Path] = Counter()

    def come(self, path: Path) -> None:
        """One more."""
        with self._lock:
            self._counts[path] += 1

    def go(self, path: Path) -> None:
        """One less."""
        with self._lock:
            self._counts[path] -= 1
            if not self._counts[path]:
                del self._counts[path]

    def is_alone(self, path: Path) -> bool:
        """Whether there is one."""
        return self._counts[path] == 1


class OpenedFile:
    """A file that is read by position; it stays whole while it is open, also when it is removed.

    Several at once read it from the disk once: what one of them has read stays in the page cache for the others.
    """

    def __init__(self, path: Path, readers: Readers) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size
        self._path = path
        self._readers = readers
        self._passage = Passage(self._descriptor)
        readers.come(path)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset` on; fewer at the end."""
        if self._readers.is_alone(self._path):
            self._passage.reached(offset)
        return os.pread(self._descriptor, length, offset)

    def close(self) -> None:
        """Let go of it."""
        self._readers.go(self._path)
        os.close(self._descriptor)


class DirectoryFiles(UploadFolder):
    """`{root}/artifacts/ab/abcdef...`, uploads in `{root}/uploads`. All methods block."""

    def __init__(self, root: Path, *, keep_free_bytes: int = 0) -> None:
        self._artifacts = root / "artifacts"
        self._artifacts.mkdir(parents=True, exist_ok=True)
        self._readers = Readers()
        super().__init__(
            root / "uploads",
            place=self._put,
            placed_size=lambda sha256: self._path(sha256).stat().st_size,
            keep_free_bytes=keep_free_bytes,
        )

    def open(self, sha256: str) -> OpenedFile:
        """A complete artifact."""
        return OpenedFile(self._path(sha256), self._readers)

    @contextlib.contextmanager
    def local(self, sha256: str) -> Iterator[Path]:
        """The artifact's own file."""
        yield self._path(sha256)

    def stored(self, prefix: str) -> Sequence[Stored]:
        """Complete files whose digests begin with these two hex digits."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._artifacts / prefix) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found.append(Stored(entry.name, datetime.fromtimestamp(entry.stat().st_mtime, UTC)))
        return found

    def remove(self, sha256: str) -> None:
        """Remove a complete file, if it is there."""
        self._path(sha256).unlink(missing_ok=True)

    def _put(self, partial: Path, sha256: str) -> None:
        final = self._path(sha256)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(final)
        sync_folder(final.parent)

    def _path(self, sha256: str) -> Path:
        return self._artifacts / sha256[:2] / sha256
