"""Batches of all callers in one queue: run one after another, small ones of one model together, within a bound."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from services.modelserver.loading import LoadedModel
from services.modelserver.running import Batch, Logits, joint_rows
from services.runtime.errors import ResourceExhausted

# What a batch of no size costs all the same: its message, its task, its place.
_ENTRY_BYTES = 4096
_SHORTEST_WAIT_S = 0.01
# How much the last run says of how fast the next one will be.
_NEWEST = 0.2

Run = Callable[[LoadedModel, Sequence[Batch]], list[Logits]]
"""Runs batches of one datatype as one, blocking; see `running.run_batches`."""


@dataclass(frozen=True, eq=False)
class _Entry:
    """A batch that waits for its turn, or runs."""

    model: LoadedModel
    batch: Batch
    answer: asyncio.Future[Logits]
    arrived: float

    @property
    def cost(self) -> int:
        return _ENTRY_BYTES + len(self.batch.data)

    @property
    def rows(self) -> int:
        return self.batch.shape[0]


class BatchQueue:
    """One thread that runs batches, and the queue before it, of at most `max_bytes`.

    What waits when the thread comes free is joined: batches of one model and datatype, smaller than `joint_rows` each,
    up to that many rows. With `delay_s` the thread waits so long for more to join, counted from the oldest one's
    arrival; without, a batch that finds the thread idle runs at once. Who stops waiting (a deadline, a broken call)
    loses its place, and its batch is never run.
    """

    def __init__(self, run: Run, *, max_bytes: int, delay_s: float = 0.0) -> None:
        self._run = run
        self._max_bytes = max_bytes
        self._delay_s = delay_s
        self._waiting: deque[_Entry] = deque()
        self._held_bytes = 0
        self._s_per_byte = 0.0
        self._arrival = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")

    @property
    def waiting(self) -> int:
        """Batches that wait for their turn."""
        return len(self._waiting)

    @property
    def wait_s(self) -> float:
        """Seconds until what is here now has been answered, by how fast it went lately."""
        return max(_SHORTEST_WAIT_S, self._held_bytes * self._s_per_byte)

    async def answer(self, model: LoadedModel, batch: Batch) -> Logits:
        """The outputs of a batch. Raises what running it raises, and ResourceExhausted when the queue is full."""
        loop = asyncio.get_running_loop()
        entry = _Entry(model, batch, loop.create_future(), loop.time())
        # An empty queue takes a batch of any size: who waits for nobody delays nobody.
        if self._held_bytes and self._held_bytes + entry.cost > self._max_bytes:
            raise ResourceExhausted(
                "QUEUE_FULL", f"{self._held_bytes} bytes of batches wait already", retry_after_s=self.wait_s
            )
        self._held_bytes += entry.cost
        self._waiting.append(entry)
        self._arrival.set()
        if self._pump is None:
            self._pump = asyncio.create_task(self._run_all())
        try:
            return await entry.answer
        finally:
            self._held_bytes -= entry.cost
            if entry in self._waiting:
                self._waiting.remove(entry)

    def close(self) -> None:
        """Ends the thread after the batch that it has."""
        self._worker.shutdown()

    async def _run_all(self) -> None:
        try:
            while self._waiting:
                await self._wait_for_more()
                # While it waited, the last one may have gone.
                if group := self._next_group():
                    await self._answer_group(group)
        finally:
            self._pump = None

    async def _wait_for_more(self) -> None:
        loop = asyncio.get_running_loop()
        while self._delay_s and self._waiting:
            first = self._waiting[0]
            left_s = first.arrived + self._delay_s - loop.time()
            if left_s <= 0 or sum(each.rows for each in self._joinable(first)) >= joint_rows(first.model):
                return
            self._arrival.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._arrival.wait()
            except TimeoutError:
                return

    def _next_group(self) -> list[_Entry]:
        if not self._waiting:
            return []
        group = self._joinable(self._waiting[0])
        for entry in group:
            self._waiting.remove(entry)
        return group

    def _joinable(self, first: _Entry) -> list[_Entry]:
        """The oldest entry, and those that can run with it as one."""
        group, rows, most = [first], first.rows, joint_rows(first.model)
        if rows >= most:
            return group
        for entry in self._waiting:
            alike = entry.model is first.model and entry.batch.datatype == first.batch.datatype
            if entry is not first and alike and rows + entry.rows <= most:
                group.append(entry)
                rows += entry.rows
        return group

    async def _answer_group(self, group: Sequence[_Entry]) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            answers = await loop.run_in_executor(
                self._worker, self._run, group[0].model, [each.batch for each in group]
            )
        except Exception as error:
            if len(group) == 1:
                _settle(group[0], error)
            else:
                # Nobody pays for a neighbour's rows.
                for entry in group:
                    if not entry.answer.done():
                        await self._answer_group([entry])
            return
        for entry, logits in zip(group, answers, strict=True):
            _settle(entry, logits)
        s_per_byte = (loop.time() - began) / sum(each.cost for each in group)
        self._s_per_byte += (_NEWEST if self._s_per_byte else 1.0) * (s_per_byte - self._s_per_byte)


def _settle(entry: _Entry, outcome: Logits | Exception) -> None:
    if entry.answer.done():
        return
    if isinstance(outcome, Exception):
        entry.answer.set_exception(outcome)
    else:
        entry.answer.set_result(outcome)
