"""Wakes those who watch the registry: streams of tasks and assignments, and the background loop."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress


class ChangeBoard:
    """`transaction.Changes` within one process and event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self._referee = asyncio.Event()

    async def wait(self, topic: str, timeout_s: float) -> None:
        """Return at the next change of the topic after this call, or when the time is over."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[topic].add(woken)
        try:
            await asyncio.wait((woken,), timeout=timeout_s)
        finally:
            waiting = self._waiting[topic]
            waiting.discard(woken)
            if not waiting:
                self._waiting.pop(topic, None)

    def announce(self, topics: Iterable[str]) -> None:
        """Wake those who wait for one of the topics, and the background loop."""
        for topic in topics:
            for woken in self._waiting.get(topic, ()):
                if not woken.done():
                    woken.set_result(None)
        self.wake_referee()

    def wake_referee(self) -> None:
        """There may be work for the background loop."""
        self._referee.set()

    async def wait_for_referee(self, timeout_s: float) -> None:
        """Return at the next wake-up, also one from before this call that nobody has seen, or when the time is over."""
        # Not wait_for: on Python 3.11 it loses a cancellation that comes together with the wake-up.
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._referee.wait()
        self._referee.clear()
