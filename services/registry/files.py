"""Artifacts as files in a directory, named by their digest; whole or not there at all."""

import hashlib
import os
from pathlib import Path


class PartialFile:
    """One upload on its way: appended to, hashed as it grows. Used by one thread at a time."""

    def __init__(self, partial: Path, final: Path, sha256: str) -> None:
        self._partial = partial
        self._final = final
        self._sha256 = sha256
        self._hash = hashlib.sha256()
        partial.parent.mkdir(parents=True, exist_ok=True)
        self._file = partial.open("ab+")
        self._file.seek(0)
        while block := self._file.read(1 << 20):
            self._hash.update(block)
        self.size = self._file.tell()

    def append(self, chunk: bytes) -> None:
        """The next bytes, out of this process at once: they survive its death."""
        self._file.write(chunk)
        self._file.flush()
        self._hash.update(chunk)
        self.size += len(chunk)

    def finish(self) -> bool:
        """Put the whole file in its place, durably. False where the digest is another: then nothing is kept."""
        if self._hash.hexdigest() != self._sha256:
            self.close()
            self._partial.unlink()
            return False
        os.fsync(self._file.fileno())
        self.close()
        self._final.parent.mkdir(parents=True, exist_ok=True)
        self._partial.replace(self._final)
        _sync_directory(self._final.parent)
        return True

    def close(self) -> None:
        """Keep what there is for the next try."""
        self._file.close()


class DirectoryFiles:
    """`{root}/artifacts/ab/abcdef...`, uploads in `{root}/uploads`. All methods block."""

    def __init__(self, root: Path) -> None:
        self._artifacts = root / "artifacts"
        self._uploads = root / "uploads"
        for folder in (self._artifacts, self._uploads):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where an artifact lies, or would."""
        return self._artifacts / sha256[:2] / sha256

    def size(self, sha256: str) -> int:
        """Bytes of a complete artifact. Raises FileNotFoundError where its file is gone."""
        return self.path(sha256).stat().st_size

    def read(self, sha256: str, offset: int, length: int) -> bytes:
        """Bytes of an artifact from `offset` on; fewer at its end. Raises FileNotFoundError where it is gone."""
        descriptor = os.open(self.path(sha256), os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def partial_size(self, owner: str, sha256: str) -> int:
        """Bytes of one participant's upload so far."""
        try:
            return self._partial(owner, sha256).stat().st_size
        except FileNotFoundError:
            return 0

    def open_partial(self, owner: str, sha256: str, *, anew: bool) -> PartialFile:
        """One participant's upload, to go on with or to begin `anew`."""
        partial = self._partial(owner, sha256)
        if anew:
            partial.unlink(missing_ok=True)
        return PartialFile(partial, self.path(sha256), sha256)

    def _partial(self, owner: str, sha256: str) -> Path:
        return self._uploads / f"{owner}-{sha256}"


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
