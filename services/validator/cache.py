"""Files named by their SHA-256, kept up to a number of bytes and to the disk's; the least recently used go first."""

import asyncio
import contextlib
import hashlib
import os
import shutil
import stat
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

PARTIAL = ".part"
# What is not in use goes before the disk has less than this: the run store, say, writes there, too.
SPARED_BYTES = 64 * 1024 * 1024

Fetch = Callable[[Path], Awaitable[None]]
"""Brings the file to the path given, whole and checked; what lies in `{path}.part` may be gone on with."""

_log = structlog.get_logger("tiltyard.validator")


class CacheTooSmall(Exception):
    """The files in use and the one wanted are together more than the cache may hold, or than the disk has room for."""


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written to the disk that a folder lies on."""
    return shutil.disk_usage(folder).free


class Cache:
    """A folder of artifacts. It holds no state but the files, so nothing can disagree after a crash.

    A file that is there from an earlier process is hashed before its first use: a crash of the machine may have left
    its bytes unwritten.
    """

    def __init__(self, folder: Path, *, max_bytes: int, free: Callable[[Path], int] = free_bytes) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._free = free
        self._trusted: set[str] = set()
        self._in_use: Counter[str] = Counter()
        self._wanted_bytes: dict[str, int] = {}
        self._fetching: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def hold(self, digest: str, size_bytes: int, fetch: Fetch) -> AsyncIterator[Path]:
        """The file of this digest (64 hex digits), which stays as long as the block runs.

        Several may want one file: it is fetched once. Raises CacheTooSmall, OSError, and what `fetch` raises.
        """
        self._in_use[digest] += 1
        self._wanted_bytes[digest] = size_bytes
        try:
            async with self._fetching.setdefault(digest, asyncio.Lock()):
                path = self._folder / digest
                if not await self._is_good(digest, path):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    self._make_room()
                    await fetch(path)
                    self._trusted.add(digest)
            os.utime(path)
            yield path
        finally:
            self._in_use[digest] -= 1
            if not self._in_use[digest]:
                del self._in_use[digest], self._wanted_bytes[digest], self._fetching[digest]

    def remove(self, digest: str) -> bool:
        """Removes a file, also a half-fetched one. False when it stays: in use, or not let go by the disk."""
        if digest in self._in_use:
            return False
        return all([self._unlink(self._folder / name) for name in (digest, digest + PARTIAL)])

    def _unlink(self, path: Path) -> bool:
        """Whether a file is gone."""
        self._trusted.discard(path.name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("a file of the cache cannot be removed", path=str(path), detail=str(error))
            return False
        return True

    async def _is_good(self, digest: str, path: Path) -> bool:
        if not await asyncio.to_thread(path.exists):
            # An operator who needs the disk may empty the folder at any time.
            self._trusted.discard(digest)
        if digest not in self._trusted and await asyncio.to_thread(_is_whole, path, digest):
            self._trusted.add(digest)
        return digest in self._trusted

    def _make_room(self) -> None:
        """Removes what is not in use, oldest first, until that which is in use or wanted fits."""
        wanted = sum(self._wanted_bytes.values())
        if wanted > self._max_bytes:
            raise CacheTooSmall(f"{wanted} bytes are needed at once, the cache may hold {self._max_bytes}")
        idle = [path for path in self._folder.iterdir() if path.name.removesuffix(PARTIAL) not in self._in_use]
        aged = sorted((found.st_mtime_ns, path, found.st_size) for path in idle if (found := _stat(path)) is not None)
        kept = sum(size for *_, size in aged)
        missing = sum(max(0, size - self._present_bytes(digest)) for digest, size in self._wanted_bytes.items())
        free = self._free(self._folder)
        if missing > free + kept:
            raise CacheTooSmall(f"{missing} bytes are yet to come, the disk has room for {free + kept}")
        for _, path, size in aged:
            if kept + wanted <= self._max_bytes and missing + SPARED_BYTES <= free:
                return
            if self._unlink(path):
                kept -= size
                free = self._free(self._folder)
        if kept + wanted > self._max_bytes or missing > free:
            raise CacheTooSmall(f"{wanted} bytes are needed at once, and {kept} that are not needed cannot be removed")

    def _present_bytes(self, digest: str) -> int:
        """Bytes of a file, or of the part of it that there is."""
        for name in (digest, digest + PARTIAL):
            with contextlib.suppress(FileNotFoundError):
                return (self._folder / name).stat().st_size
        return 0


def _stat(path: Path) -> os.stat_result | None:
    """What there is to know of a file; None for one that is gone, and for what is no file."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        return None if stat.S_ISDIR(found.st_mode) else found
    return None


def _is_whole(path: Path, digest: str) -> bool:
    """Whether the file is there with these bytes; one with others is removed."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return False
    if found != digest:
        path.unlink()
    return found == digest
