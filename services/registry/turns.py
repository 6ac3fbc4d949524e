"""One turn of a step of the referee over many items, of which one may fail without holding up the others."""

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from services.runtime.errors import Unavailable

Item = TypeVar("Item")


async def each(items: Iterable[Item], work: Callable[[Item], Awaitable[int]]) -> int:
    """Do `work` for every item and add up what was done.

    Unavailable ends the turn, since the next item would meet it too; other failures are raised together at the end.
    """
    done = 0
    failures: list[Exception] = []
    for item in items:
        try:
            done += await work(item)
        except Unavailable as error:
            failures.append(error)
            break
        except Exception as error:
            failures.append(error)
    if failures:
        raise ExceptionGroup("part of a turn failed", failures)
    return done
