"""A file that grows by what arrives, and knows the SHA-256 of all that it holds."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tiltyard.pagecache import KEPT_BYTES, Passage, PastCache

_READ_BYTES = 1024 * 1024
# Less is hashed sooner than another thread wakes up.
_HASHED_BEHIND_BYTES = 256 * 1024

# For all files: each has one batch here at most, which waits for nothing.
_hashers = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="hash")


class GrowingFile:
    """Opened at its end, made when it isn't there; what it holds already is hashed first. All methods block.

    What has been appended survives the death of the process, and after `sync` that of the machine. One thread at a time
    uses it. What is appended is hashed while the next comes, and must not change meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self._hash = hashlib.sha256()
        self._hashing: Future[None] | None = None
        self.path = path
        self._past: PastCache | None = None
        self._file = path.open("ab+", buffering=0)
        self._file.seek(0)
        while block := self._file.read(_READ_BYTES):
            self._hash.update(block)
        self.size = self._file.tell()
        self._passage = Passage(self._file.fileno(), self.size)

    def append(self, chunks: Sequence[bytes | memoryview]) -> None:
        """The next bytes. Raises OSError; then what was written counts, and no more."""
        written: list[memoryview] = []
        try:
            for chunk in chunks:
                rest = memoryview(chunk)
                while rest:
                    count = self._write(rest)
                    written.append(rest[:count])
                    self.size += count
                    rest = rest[count:]
                self._passage.reached(self.size)
        finally:
            self._take(written)

    def _write(self, data: memoryview) -> int:
        if self.size < KEPT_BYTES:
            return self._file.write(data)
        if self._past is None:
            self._past = PastCache(self.path)
        return self._past.write(data, self.size) or self._file.write(data)

    def _take(self, written: Sequence[memoryview]) -> None:
        """Hash these after those before."""
        self._wait()
        if sum(map(len, written)) < _HASHED_BEHIND_BYTES:
            self._update(written)
        else:
            self._hashing = _hashers.submit(self._update, written)

    def _update(self, written: Sequence[memoryview]) -> None:
        for piece in written:
            self._hash.update(piece)

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def rename(self, path: Path) -> None:
        """Go on under another name, in place of what has that name."""
        self.path.replace(path)
        self.path = path

    def digest(self) -> bytes:
        """SHA-256 of all of it, 32 bytes."""
        self._wait()
        return self._hash.digest()

    def sync(self) -> None:
        """Wait until it is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of it; once more does nothing."""
        self._file.close()
        if self._past is not None:
            self._past.close()
