"""SHA-256 of a file: at once, or while something else is done with it."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

_PIECE_BYTES = 1024 * 1024


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file, 32 bytes. Reads it in pieces, so that its size does not matter."""
    return _digest_until(path, threading.Event())


@asynccontextmanager
async def hashing(path: Path) -> AsyncIterator[asyncio.Future[bytes]]:
    """The digest to come, computed in a thread that ends when this is left. To wait for it, shield it."""
    left = threading.Event()
    digest = asyncio.ensure_future(asyncio.to_thread(_digest_until, path, left))
    try:
        yield digest
    finally:
        left.set()
        await asyncio.wait((digest,))


def _digest_until(path: Path, left: threading.Event) -> bytes:
    digest = hashlib.sha256()
    piece = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while not left.is_set() and (count := file.readinto(piece)):
            digest.update(piece[:count])
    return digest.digest()
