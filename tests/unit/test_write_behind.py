"""What is put arrives in order, is held back when there is too much of it, and is not lost when something fails."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from tiltyard.writebehind import Chunk, WriteBehind

MIB = bytes(1 << 20)


class Slow:
    """Writes when it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.began = threading.Event()
        self.written = bytearray()
        self.fails: Exception | None = None
        self.calls = 0

    def __call__(self, chunks: Sequence[Chunk]) -> None:
        self.calls += 1
        self.began.set()
        assert self.may.wait(20)
        if self.fails is not None:
            raise self.fails
        for chunk in chunks:
            self.written += chunk


async def begun(slow: Slow) -> None:
    assert await asyncio.to_thread(slow.began.wait, 20)


async def test_all_arrives_in_order() -> None:
    slow = Slow()
    slow.may.set()
    behind = WriteBehind(slow)
    for number in range(2000):
        await behind.put(number.to_bytes(4, "big"))
        if number % 7 == 0:
            # The thread may find nothing more at any moment.
            await asyncio.sleep(0)
    await behind.flush()
    assert slow.written == b"".join(number.to_bytes(4, "big") for number in range(2000))
    await behind.put(b"after")
    await behind.flush()
    assert slow.written.endswith(b"after")


async def test_no_more_is_held_than_one_write_and_what_gathers_meanwhile() -> None:
    slow = Slow()
    behind = WriteBehind(slow)
    await behind.put(MIB)
    await begun(slow)
    for _ in range(3):
        await behind.put(MIB)
    fifth = asyncio.create_task(behind.put(MIB))
    done, _ = await asyncio.wait((fifth,), timeout=0.2)
    assert not done
    slow.may.set()
    await fifth
    await behind.flush()
    assert (len(slow.written), slow.calls) == (5 << 20, 2)


async def test_a_failure_comes_out_and_nothing_is_written_after_it() -> None:
    slow = Slow()
    slow.fails = OSError(28, "no space left")
    slow.may.set()
    behind = WriteBehind(slow)
    await behind.put(b"one")
    with pytest.raises(OSError, match="no space"):
        await behind.flush()
    slow.fails = None
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            await behind.put(b"two")
    with pytest.raises(OSError, match="no space"):
        await behind.flush()
    assert (slow.written, slow.calls) == (b"", 1)


async def test_a_failure_frees_who_waits_for_room() -> None:
    slow = Slow()
    slow.fails = OSError(28, "no space left")
    behind = WriteBehind(slow)
    await behind.put(MIB)
    await begun(slow)
    for _ in range(3):
        await behind.put(MIB)
    waits = asyncio.create_task(behind.put(MIB))
    await asyncio.sleep(0)
    slow.may.set()
    await waits
    with pytest.raises(OSError, match="no space"):
        await behind.put(MIB)


async def test_a_cancelled_flush_waits_to_the_end() -> None:
    slow = Slow()
    behind = WriteBehind(slow)
    await behind.put(b"one")
    await begun(slow)
    flushing = asyncio.create_task(behind.flush())
    await asyncio.sleep(0)
    flushing.cancel()
    await asyncio.wait((flushing,), timeout=0.2)
    assert not flushing.done()
    slow.may.set()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    assert slow.written == b"one"


async def test_more_streams_than_threads_take_turns() -> None:
    writers = [Slow() for _ in range(40)]

    async def stream(slow: Slow) -> None:
        slow.may.set()
        behind = WriteBehind(slow)
        for number in range(50):
            await behind.put(bytes([number]) * 1000)
        await behind.flush()

    async with asyncio.timeout(20):
        await asyncio.gather(*map(stream, writers))
    whole = b"".join(bytes([number]) * 1000 for number in range(50))
    assert all(slow.written == whole for slow in writers)
