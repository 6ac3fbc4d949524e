"""What comes in while a batch is under way is the next batch: many askers, one piece of work at a time."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_TOGETHER = 64


class Batches(Generic[Item, Result]):
    """Calls `work` with all items that came in while it was busy, 64 at most, and answers each asker.

    `work` returns a result for each item, in order, or the exception that is its asker's; when it raises, every item of
    the batch failed with that. An item whose asker has gone before its batch begins is left out.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]]) -> None:
        self._work = work
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._running: asyncio.Task[None] | None = None

    async def ask(self, item: Item) -> Result:
        """The result of `item`; raises what it failed with."""
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if self._running is None:
            # A batch is nobody's call: it must not run in the context of the asker who happened to be the first.
            self._running = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())
        return await done

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:_MOST_TOGETHER], self._waiting[_MOST_TOGETHER:]
                batch = [(item, done) for item, done in batch if not done.cancelled()]
                if batch:
                    await self._answer(batch)
        finally:
            self._running = None

    async def _answer(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        results: Sequence[Result | BaseException]
        try:
            results = await self._work([item for item, _ in batch])
        except BaseException as failure:  # a cancellation too: nobody may be left waiting
            results = [failure] * len(batch)
        for (_, done), result in zip(batch, results, strict=True):
            if done.cancelled():
                continue
            if isinstance(result, BaseException):
                done.set_exception(result)
            else:
                done.set_result(result)
