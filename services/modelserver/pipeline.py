"""Answers to a stream of requests in the order they came, several under way at once."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from typing import TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")

# Deep enough that reading, running and writing overlap; shallow enough that a slow reader holds few batches in memory.
DEPTH = 4


async def answered_in_order(
    requests: AsyncIterable[Request], answer: Callable[[Request], Awaitable[Answer]], *, depth: int = DEPTH
) -> AsyncGenerator[Answer, None]:
    """Yield `answer(request)` for each request in order, with at most `depth` read ahead of the one yielded.

    An error of the stream or of `answer` comes out at its place. When it is closed, what is under way is cancelled.
    """
    under_way: asyncio.Queue[asyncio.Future[Answer] | None] = asyncio.Queue(depth)

    async def read() -> None:
        try:
            async for request in requests:
                begun = asyncio.ensure_future(answer(request))
                try:
                    await under_way.put(begun)
                except asyncio.CancelledError:
                    begun.cancel()
                    raise
        except Exception:
            await under_way.put(None)
            raise
        await under_way.put(None)

    reader = asyncio.create_task(read())
    try:
        while (pending := await under_way.get()) is not None:
            yield await pending
        await reader
    finally:
        reader.cancel()
        # Whoever the requests belong to may close them next, which nobody may do who still reads.
        await asyncio.gather(reader, return_exceptions=True)
        while not under_way.empty():
            if (left := under_way.get_nowait()) is not None:
                left.cancel()
