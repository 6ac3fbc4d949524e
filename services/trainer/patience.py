"""Tries again what a full disk, an absent registry, a wrong clock or a used-up quota stops for a while."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.runtime.errors import Aborted, DiskFull, ResourceExhausted, Unauthenticated, Unavailable
from services.trainer import fulldisk

T = TypeVar("T")

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0
# A quota may be raised meanwhile, so it is asked again.
_LONGEST_WAIT_S = 600.0


async def persist(work: Callable[[], Awaitable[T]], *, say: Callable[[str], Awaitable[None]]) -> T:
    """Calls `work` until nothing that passes stops it; says once what it waits for, and when a full disk has room.

    Raises what does not pass: every other error, and a ResourceExhausted that names no wait.
    """
    pause_s, said, full = FIRST_PAUSE_S, "", False
    while True:
        try:
            result = await work()
        except DiskFull as error:
            trouble, wait_s, full = fulldisk.paused(error.message), fulldisk.RETRY_S, True
        except ResourceExhausted as error:
            if error.retry_after_s is None:
                raise
            trouble = f"waits {math.ceil(error.retry_after_s)} s: {error.message}"
            wait_s = min(error.retry_after_s, _LONGEST_WAIT_S)
        except (Unavailable, Aborted, Unauthenticated) as error:
            # The last may be a clock that is yet to be set: a token that is not of now is nobody's.
            trouble = f"tries again: {error.message}"
            wait_s, pause_s = pause_s, min(2 * pause_s, LONGEST_PAUSE_S)
        except OSError as error:
            if not fulldisk.is_full(error):
                raise
            trouble, wait_s, full = fulldisk.paused(fulldisk.described(error)), fulldisk.RETRY_S, True
        else:
            if full:
                await say(fulldisk.RESUMED)
            return result
        if trouble != said:
            said = trouble
            await say(trouble)
        await asyncio.sleep(wait_s)
