"""Large files pass through the page cache without filling it."""

import errno
import mmap
import os
from pathlib import Path

KEPT_BYTES = 32 * 1024 * 1024
"""Of a large file the page cache holds about so much; a smaller one stays in it whole."""


_BLOCK_BYTES = 4096
_PIECE_BYTES = 1024 * 1024


class Passage:
    """One way through an open file, from `position` on.

    What lies behind goes to the disk, and from memory once it is there: a gigabyte on its way must not push out what
    others read, and fresh pages can cost more than the bytes in them, where a virtual machine gets each from its host.
    The price: who reads it next reads it from the disk.
    """

    def __init__(self, descriptor: int, position: int = 0) -> None:
        self._descriptor = descriptor
        self._let_go_at = position + KEPT_BYTES

    def reached(self, position: int) -> None:
        """All before `position` has been read or written."""
        if position < self._let_go_at:
            return
        self._let_go_at = position + KEPT_BYTES
        # Not in every system.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, position, os.POSIX_FADV_DONTNEED)


class PastCache:
    """Writes whole blocks of a file straight to its disk, where the file system can; a copy and a wait for each.

    The processor's part is a fourth of what the page cache costs a gigabyte that nobody is going to read soon. Beside
    it the file may be written in the usual way.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = _open_direct(path)
        # Disks want memory that begins with a page.
        self._piece = memoryview(mmap.mmap(-1, _PIECE_BYTES))

    def write(self, data: memoryview, at: int) -> int:
        """How many bytes of `data` lie in the file at `at` now; 0 where they have to go the usual way."""
        size = min(len(data), _PIECE_BYTES) // _BLOCK_BYTES * _BLOCK_BYTES
        if self._descriptor is None or not size or at % _BLOCK_BYTES:
            return 0
        self._piece[:size] = data[:size]
        try:
            return os.pwrite(self._descriptor, self._piece[:size], at)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # Opened so, but not written so.
        self.close()
        return 0

    def close(self) -> None:
        """Let go of it; once more does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open_direct(path: Path) -> int | None:
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    return None
