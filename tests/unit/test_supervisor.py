"""What the supervisor does with files, apart from its processes."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from tiltyard.cli import supervisor
from tiltyard.cli.supervisor import Program, Supervisor, bound_log


def test_a_log_is_put_aside_when_it_is_too_long_and_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "registry.log"
    bound_log(path, 10)
    # As a child writes to the descriptor that it was started with.
    with path.open("ab", buffering=0) as log:
        for line in (b"short\n", b"longer than that\n", b"after\n", b"the second time\n", b"end\n"):
            log.write(line)
            bound_log(path, 10)
    assert path.read_bytes() == b"end\n"
    assert (tmp_path / "registry.log.1").read_bytes() == b"after\nthe second time\n"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["registry.log", "registry.log.1"]


async def test_what_died_while_there_was_no_room_for_a_process_is_started_when_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_LONGEST_PAUSE_S", 0.1)
    spawned, refused = 0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    told: asyncio.Queue[str] = asyncio.Queue()
    opened = Supervisor._open_log

    def open_log(self: Supervisor, name: str) -> int:
        nonlocal spawned
        spawned += 1
        if spawned in (2, 3):
            raise refused
        return opened(self, name)

    monkeypatch.setattr(Supervisor, "_open_log", open_log)
    async with Supervisor(tmp_path, report=told.put_nowait) as keeping:
        # A module that ends at once.
        await keeping.start([Program("clock", "this", 0)])
        async with asyncio.timeout(60):
            lines = [await told.get() for _ in range(4)]
    died, again = "clock died (status 0), it starts again", "clock cannot be started (No space left on device)"
    assert lines == [died, f"{again}, it is tried again", f"{again}, it is tried again", died]
