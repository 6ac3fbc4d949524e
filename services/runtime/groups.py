"""What has queued up is done as one group, in a thread of its own, and each asker is answered."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Outcome = tuple[Result, None] | tuple[None, BaseException]
"""What became of one item: its result, or what it failed with."""

_GROUP_SIZE = 64


class GroupThread(Generic[Item, Result]):
    """Calls `work` with all items that queued up while it was busy, 64 at most.

    `work` returns an outcome for each item, in order; when it raises, every item of the group failed with that. An item
    whose asker has gone before its group begins is left out.
    """

    def __init__(self, work: Callable[[list[Item]], Sequence[Outcome[Result]]], *, name: str) -> None:
        self._work = work
        self._queue: queue.SimpleQueue[tuple[Item, asyncio.Future[Result]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def ask(self, item: Item) -> Result:
        """The result of `item`; raises what it failed with."""
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.put((item, done))
        return await done

    async def close(self) -> None:
        """Finishes what is queued and ends the thread; ask for nothing afterwards."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        open_for_more = True
        while open_for_more:
            asked = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(asked) < _GROUP_SIZE and asked[-1] is not None:
                    asked.append(self._queue.get_nowait())
            open_for_more = asked[-1] is not None
            group = [entry for entry in asked if entry is not None and not entry[1].cancelled()]
            if group:
                self._answer(group)

    def _answer(self, group: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        outcomes: Sequence[Outcome[Result]]
        try:
            outcomes = self._work([item for item, _ in group])
        except BaseException as failure:  # whatever an item raises, the thread lives on and everybody hears of it
            outcomes = [(None, failure)] * len(group)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Result], Outcome[Result]]]] = {}
        for (_, done), outcome in zip(group, outcomes, strict=True):
            by_loop.setdefault(done.get_loop(), []).append((done, outcome))
        for loop, answers in by_loop.items():
            # Waking a loop costs more than answering: once a group. One that was closed has nobody waiting.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_resolve, answers)


def _resolve(answers: list[tuple[asyncio.Future[Result], Outcome[Result]]]) -> None:
    for done, (result, failure) in answers:
        if done.cancelled():
            continue
        if failure is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(failure)
