"""Work on the bytes of artifacts, which blocks: done in a thread, to its end."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from services.runtime.errors import Unavailable

T = TypeVar("T")


async def stored(work: Callable[[], T]) -> T:
    """Run `work` in a thread to its end, also when the caller is cancelled meanwhile: no two threads on one file.

    Raises Unavailable(STORAGE_FAILED) for an OSError.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        raise
    except OSError as error:
        raise storage_failed(error) from error


def storage_failed(error: OSError) -> Unavailable:
    """What a caller is told of a disk or a bucket that fails."""
    return Unavailable("STORAGE_FAILED", f"the bytes cannot be kept or read now: {error.strerror}")
