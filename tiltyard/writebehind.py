"""Writes bytes in a thread while the next ones arrive."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

Chunk = bytes | memoryview
_LIMIT_BYTES = 4 * 1024 * 1024

# For all streams, which take turns: each has one piece of work here at most.
_writers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="write")


class WriteBehind:
    """Calls `write` in a thread with what has been put, in order and one call at a time.

    `write` gets all chunks that have gathered since its last call, some 4 MiB at most, and is called again as soon as
    it returns. What it raises comes out of a later `put` or of `flush`; it is not called again afterwards, so that
    nothing is ever missing in between. Whoever put something has to `flush` before anybody else touches what `write`
    does. For one task of one event loop.
    """

    def __init__(self, write: Callable[[Sequence[Chunk]], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._gathered: list[Chunk] = []
        self._gathered_bytes = 0
        self._is_writing = False
        self._room: asyncio.Future[None] | None = None
        self._written: asyncio.Future[None] | None = None
        """Of the writing that has begun last: done when nothing was left, or with what `write` raised."""

    async def put(self, chunk: Chunk) -> None:
        """The next bytes; waits only while too many are held."""
        if self._written is not None and self._written.done():
            self._written.result()
        loop = asyncio.get_running_loop()
        with self._lock:
            self._gathered.append(chunk)
            self._gathered_bytes += len(chunk)
            begins, self._is_writing = not self._is_writing, True
            is_full = self._gathered_bytes >= _LIMIT_BYTES
            if is_full:
                self._room = loop.create_future()
        if begins:
            self._written = loop.create_future()
            _writers.submit(self._write_gathered, self._written)
        if is_full and self._room is not None and self._written is not None:
            await asyncio.wait((self._room, self._written), return_when=asyncio.FIRST_COMPLETED)

    async def flush(self) -> None:
        """Waits until all is written, to the end of a call that runs also when cancelled meanwhile."""
        if self._written is None:
            return
        try:
            await asyncio.shield(self._written)
        except asyncio.CancelledError:
            # The thread goes on whatever we do: nobody else may touch what it writes to.
            await asyncio.wait((self._written,))
            raise

    def _write_gathered(self, written: asyncio.Future[None]) -> None:
        with self._lock:
            gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
            room, self._room = self._room, None
        if room is not None:
            _tell(room, None)
        try:
            self._write(gathered)
        except BaseException as failure:  # whatever it is, whoever puts more hears of it
            _tell(written, failure)
            return
        with self._lock:
            goes_on = self._is_writing = bool(self._gathered)
        if goes_on:
            _writers.submit(self._write_gathered, written)
        else:
            _tell(written, None)


def _tell(future: asyncio.Future[None], failure: BaseException | None) -> None:
    # A loop that was closed has nobody waiting.
    with contextlib.suppress(RuntimeError):
        future.get_loop().call_soon_threadsafe(_resolve, future, failure)


def _resolve(future: asyncio.Future[None], failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(None)
    else:
        future.set_exception(failure)
