"""A limited number of places, handed out to tasks in turn, so that a busy task cannot starve a quiet one."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSlots:
    """`limit` places; when one comes free, the tasks that wait are served round robin, each in its own order."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def hold(self, task: str) -> AsyncIterator[None]:
        """A place for `task`, as long as the block runs."""
        await self._acquire(task)
        try:
            yield
        finally:
            self._hand_on()

    async def _acquire(self, task: str) -> None:
        if self._free > 0:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(task, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._hand_on()
            raise

    def _hand_on(self) -> None:
        while self._waiting:
            task, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                # Its next one waits behind every other task.
                self._waiting[task] = turns
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
