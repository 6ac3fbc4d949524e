"""Reads an artifact's next chunks while those before are on their way."""

import asyncio
from collections import deque

from services.registry.artifacts.files import StoredFile
from services.registry.artifacts.storedwork import stored
from services.runtime.errors import DataLoss

# A thread's turn for each chunk would cost as much as the chunk.
_READ_AT_ONCE = 4


class ReadAhead:
    """An open file from an offset on, in chunks that are taken one after the other."""

    def __init__(self, file: StoredFile, offset: int) -> None:
        self._file = file
        self._position = offset
        self.left = file.size - offset
        """Bytes that have not been taken yet."""
        self._read: deque[bytes] = deque()
        self._ahead: asyncio.Future[list[bytes]] | None = None

    async def take(self, chunk_bytes: int, *, ahead: bool) -> bytes:
        """The next chunk while there is one left; with `ahead` the next few are being read when it comes.

        It is of `chunk_bytes` at most where nothing has been read ahead. Raises DataLoss, Unavailable.
        """
        if not self._read and self._ahead is not None:
            reading, self._ahead = self._ahead, None
            self._read += await reading
        if not self._read:
            self._read += await self._begin(chunk_bytes, _READ_AT_ONCE if ahead else 1)
        if ahead and self._ahead is None and self._position < self._file.size:
            self._ahead = self._begin(chunk_bytes, _READ_AT_ONCE)
        chunk = self._read.popleft()
        self.left -= len(chunk)
        return chunk

    async def close(self) -> None:
        """Waits for what is being read, and closes the file."""
        if self._ahead is not None:
            await asyncio.gather(self._ahead, return_exceptions=True)
        await stored(self._file.close)

    def _begin(self, chunk_bytes: int, count: int) -> asyncio.Future[list[bytes]]:
        start, self._position = self._position, min(self._file.size, self._position + count * chunk_bytes)
        stop = self._position

        def read() -> list[bytes]:
            return [self._chunk(at, min(chunk_bytes, stop - at)) for at in range(start, stop, chunk_bytes)]

        return asyncio.ensure_future(stored(read))

    def _chunk(self, offset: int, length: int) -> bytes:
        chunk = self._file.read(offset, length)
        if len(chunk) != length:
            raise DataLoss("ARTIFACT_LOST", f"{len(chunk)} of {length} bytes are left at offset {offset}")
        return chunk
