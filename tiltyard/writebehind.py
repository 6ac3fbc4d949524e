"""Hashes and writes bytes in a thread while the next ones arrive."""

import asyncio
from collections.abc import Callable, Sequence

_LIMIT_BYTES = 4 * 1024 * 1024


class WriteBehind:
    """Calls `write` in a thread with what has been put, in order and one call at a time; holds some 4 MiB at most.

    `write` gets all chunks that have gathered since its last call. What it raises comes out of the next `put` or
    `flush`; it is not called again afterwards, so that nothing is ever missing in between.
    """

    def __init__(self, write: Callable[[Sequence[bytes]], None]) -> None:
        self._write = write
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._failed = False
        self._running: asyncio.Future[None] | None = None

    async def put(self, chunk: bytes) -> None:
        """The next bytes; waits only while too many are held."""
        if self._failed:
            raise ValueError("what was put before could not be written")
        self._gathered.append(chunk)
        self._gathered_bytes += len(chunk)
        if self._running is not None and (self._running.done() or self._gathered_bytes >= _LIMIT_BYTES):
            await self._wait()
        if self._running is None:
            self._start()

    async def flush(self) -> None:
        """Wait until all is written, to the end of a call that runs also when cancelled meanwhile."""
        while self._running is not None or self._gathered:
            if self._running is None:
                self._start()
            await self._wait()

    def _start(self) -> None:
        gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
        self._running = asyncio.ensure_future(asyncio.to_thread(self._write, gathered))

    async def _wait(self) -> None:
        running = self._running
        if running is None:
            return
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            # The thread goes on whatever we do: nobody else may touch what it writes to.
            await asyncio.wait((running,))
            raise
        finally:
            self._running = None
            if running.exception() is not None:
                self._failed = True
                self._gathered.clear()
