"""One turn of a step of the referee over many items, of which one may fail without holding up the others."""

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from services.registry.records import Assignment, Round
from services.runtime.errors import Unavailable
from services.runtime.names import format_submission
from tiltyard.telemetry import tracing

Item = TypeVar("Item")

# Writes that wait together are committed together.
_AT_ONCE = 8


def traced(step: str, duty: Round | Assignment) -> tracing.Span:
    """The span of one step for one submission, in the trace that its reveal belongs to."""
    submission = format_submission(duty.task, duty.number)
    return tracing.span(step, parent=duty.trace, submission=submission, round=duty.round)


def fairly(items: Iterable[Item], *, by: Callable[[Item], object]) -> list[Item]:
    """The items in turn by what they belong to: the first of each, then the second of each; else in their order."""
    queues: dict[object, deque[Item]] = defaultdict(deque)
    for item in items:
        queues[by(item)].append(item)
    ordered: list[Item] = []
    while queues:
        for owner in list(queues):
            ordered.append(queues[owner].popleft())
            if not queues[owner]:
                del queues[owner]
    return ordered


async def each(
    items: Iterable[Item], work: Callable[[Item], Awaitable[int]], *, undone: Callable[[Item], None] = lambda item: None
) -> int:
    """Do `work` for every item, several at once, and add up what was done.

    Unavailable ends the turn, since the next item would meet it too; other failures are raised together at the end.
    `undone` is told of every item that failed or was not begun.
    """
    waiting = deque(items)
    failures: list[Exception] = []
    done = 0

    async def work_off() -> None:
        nonlocal done
        while waiting and not any(isinstance(failure, Unavailable) for failure in failures):
            item = waiting.popleft()
            try:
                more = await work(item)
                done += more
            except Exception as error:
                failures.append(error)
                undone(item)
            except BaseException:
                undone(item)
                raise

    try:
        await _together([work_off for _ in range(min(_AT_ONCE, len(waiting)))])
    finally:
        for item in waiting:
            undone(item)
    if failures:
        raise ExceptionGroup("part of a turn failed", failures)
    return done


async def _together(works: list[Callable[[], Awaitable[None]]]) -> None:
    """Run all to their end; the first one that raises ends the others."""
    if len(works) <= 1:
        for work in works:
            await work()
        return
    running = [asyncio.ensure_future(work()) for work in works]
    try:
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        for task in running:
            with suppress(BaseException):
                await task
