"""Watching a state: read it, yield it, wait for the next change of its topic, without missing one in between."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from services.registry.transaction import Changes

S = TypeVar("S")

# A change that nobody announced (another process, a clock) is seen this late at most.
_LOOK_AGAIN_S = 30.0


async def watch(changes: Changes, topic: str, read: Callable[[], Awaitable[S]]) -> AsyncGenerator[S, None]:
    """What `read` answers now and after each change of the topic, until the watcher goes; repeats are its to drop."""
    while True:
        # Waiting begins before reading: a change that comes after the read's snapshot ends this wait.
        change = asyncio.ensure_future(changes.wait(topic, _LOOK_AGAIN_S))
        try:
            yield await read()
            await change
        finally:
            change.cancel()
            with suppress(asyncio.CancelledError):
                await change
