"""A file that grows by what arrives, and knows the SHA-256 of all that it holds."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

_READ_BYTES = 1024 * 1024
# Of a large file the page cache holds about so much; a smaller one stays in it whole.
_CACHED_BYTES = 32 * 1024 * 1024


class GrowingFile:
    """Opened at its end, made when it isn't there; what it holds already is hashed first. All methods block.

    What has been appended survives the death of the process, and after `sync` that of the machine. One thread at a time
    uses it.
    """

    def __init__(self, path: Path) -> None:
        self._hash = hashlib.sha256()
        self._file = path.open("ab+", buffering=0)
        self._file.seek(0)
        while block := self._file.read(_READ_BYTES):
            self._hash.update(block)
        self.size = self._file.tell()
        self._let_go_at = self.size + _CACHED_BYTES

    def append(self, chunks: Sequence[bytes]) -> None:
        """The next bytes. Raises OSError; then what was written counts, and no more."""
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                written = self._file.write(rest)
                self._hash.update(rest[:written])
                self.size += written
                rest = rest[written:]
            if self.size >= self._let_go_at:
                self._let_go()

    def _let_go(self) -> None:
        """Lets what has been written go to the disk now, and from memory once it is there.

        A gigabyte on its way must not push out what others read, and fresh pages can cost more than the bytes in them:
        a virtual machine gets each from its host. At the end there is little left to wait for. The price: who reads it
        first reads it from the disk.
        """
        self._let_go_at = self.size + _CACHED_BYTES
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, self.size, os.POSIX_FADV_DONTNEED)

    def digest(self) -> bytes:
        """SHA-256 of all of it, 32 bytes."""
        return self._hash.digest()

    def sync(self) -> None:
        """Wait until it is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of it; once more does nothing."""
        self._file.close()
