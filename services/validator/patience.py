"""Goes on trying while a peer is away, or our own disk is full."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from services.runtime.errors import Aborted, ArenaError, ResourceExhausted, Unauthenticated, Unavailable

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0

# Unauthenticated may be a clock that is being set right; nothing is gained by giving up on it.
TRANSIENT = (Unavailable, Aborted, Unauthenticated, ResourceExhausted)

_log = structlog.get_logger("tiltyard.validator")


class Pauses:
    """Growing pauses with jitter, so that validators do not come back all at once."""

    def __init__(self) -> None:
        self._next_s = FIRST_PAUSE_S

    def reset(self) -> None:
        """The peer has answered."""
        self._next_s = FIRST_PAUSE_S

    async def pause(self, at_least_s: float = 0.0) -> None:
        """Waits, longer each time."""
        # Not for secrets.
        await asyncio.sleep(max(self._next_s * random.uniform(0.5, 1.0), at_least_s))  # noqa: S311
        self._next_s = min(2 * self._next_s, LONGEST_PAUSE_S)


async def persist(call: Callable[[], Awaitable[T]], what: str) -> T:
    """Awaits `call()`, again and again while it fails for a passing reason; cancel it to stop. Raises ArenaError.

    A reason is logged when it comes, and not at every try: a thousand leases may wait for one registry.
    """
    pauses, said = Pauses(), ""
    while True:
        try:
            return await call()
        except TRANSIENT as error:
            if error.reason != said:
                said = error.reason
                _log.info("it is tried again", call=what, reason=said)
            await pauses.pause(_wanted_pause_s(error))


def _wanted_pause_s(error: ArenaError) -> float:
    return error.retry_after_s or 0.0 if isinstance(error, ResourceExhausted) else 0.0
