"""What has queued up is done as one group, in a thread or begun in the event loop, and each asker is answered."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Sequence
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


Steps = Generator[None, None, Sequence[Outcome[Result]]]
"""What becomes of a group, in the end. It pauses before whatever may take long."""


class GroupTurns(Generic[Item, Result]):
    """As `GroupThread`, for one event loop, which itself begins those groups of which every item is quick.

    `work` goes on in the loop up to its first pause, and from there in the thread: where the two take turns with the
    interpreter, each step of a work waits for it anew. Of each item that has not failed, `done` is told in the loop,
    also where its asker has gone.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Steps[Result]],
        *,
        is_quick: Callable[[Item], bool],
        done: Callable[[Item], None],
        name: str,
    ) -> None:
        self._work = work
        self._is_quick = is_quick
        self._done = done
        self._asked: list[tuple[Item, asyncio.Future[Result]]] = []
        self._at_work_in: asyncio.AbstractEventLoop | None = None
        self._idle: asyncio.Future[None] | None = None
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def ask(self, item: Item) -> Result:
        """The result of `item`; raises what it failed with."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Result] = loop.create_future()
        if self._at_work_in is None or self._at_work_in.is_closed():
            # What was asked in a loop that is closed has nobody waiting.
            self._asked = []
            self._at_work_in = loop
            loop.call_soon(self._begin, loop)
        self._asked.append((item, answer))
        return await answer

    async def close(self) -> None:
        """Finishes what is queued and ends the thread; ask for nothing afterwards."""
        if self._at_work_in is not None and not self._at_work_in.is_closed():
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """The next group, in the loop."""
        asked, self._asked = self._asked[:_GROUP_SIZE], self._asked[_GROUP_SIZE:]
        group = [entry for entry in asked if not entry[1].cancelled()]
        if group:
            self._answer(loop, group)
        elif self._asked:
            loop.call_soon(self._begin, loop)
        else:
            self._at_work_in = None
            if self._idle is not None:
                self._idle.set_result(None)

    def _answer(self, loop: asyncio.AbstractEventLoop, group: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        items = [item for item, _ in group]
        steps = self._work(items)
        if all(map(self._is_quick, items)):
            outcomes = _advanced(steps, len(items))
            if outcomes is not None:
                self._end(loop, group, outcomes)
                return

        def go_on() -> None:
            while (outcomes := _advanced(steps, len(items))) is None:
                pass
            # A loop that was closed has nobody waiting.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._end, loop, group, outcomes)

        self._queue.put(go_on)

    def _end(
        self,
        loop: asyncio.AbstractEventLoop,
        group: list[tuple[Item, asyncio.Future[Result]]],
        outcomes: Sequence[Outcome[Result]],
    ) -> None:
        try:
            for (item, _), (_, failure) in zip(group, outcomes, strict=True):
                if failure is None:
                    self._done(item)
        finally:
            _resolve([(answer, outcome) for (_, answer), outcome in zip(group, outcomes, strict=True)])
            # Behind those who have been answered.
            loop.call_soon(self._begin, loop)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()


def _advanced(steps: Steps[Result], count: int) -> Sequence[Outcome[Result]] | None:
    """Goes on to the next pause; what has become of a group of so many items, where there is none."""
    try:
        next(steps)
    except StopIteration as end:
        outcomes: Sequence[Outcome[Result]] = end.value
        return outcomes
    except BaseException as failure:  # whatever an item raises, the next group goes on and everybody hears of it
        return [(None, failure)] * count
    return None
