"""Children that strangers' weights have taken over: whatever they say or leave, the nursery and its others go on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.modelserver.spawn import ChildEnded, ExitKind, Limits, Nursery

LIMITS = Limits(memory_bytes=1 << 30, cpu_seconds=60)
PATIENCE_S = 120  # on a busy machine

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the nursery stands on Linux's process controls"),
    pytest.mark.asyncio(loop_scope="module"),
]

TAKEN_OVER = """#!{python}
# A zygote whose children do what the file of that name in their folder says, as one might that was taken over.
import sys
sys.path.insert(0, {sources!r})
from pathlib import Path
from services.modelserver import child, nursery

def live(order, report, zygote, readable, rehearsed):
    exec(Path(order.folder, "deeds").read_text(), {{"report": report, "zygote": zygote, "folder": order.folder}})
    return 1

child.live = live
nursery.main()
"""
HONEST = """
import os, signal
os.write(report, b'{"event": "ready"}\\n')
signal.pause()
"""
LINES = [
    b"no JSON\n",
    b"\xff\xfe\n",
    b"[" * 10_000 + b"\n",
    b"[]\n",
    b"{}\n",
    b'{"event": "ready"}\n{"event": "ready"}\n',
    b'{"event": "ended", "id": 0, "signal": 9, "code": 0, "garbled": false, "cpu_seconds": 0}\n',
    b'{"event": "warm"}\n',
    b'{"event": "fault"}\n',
    b'{"event": "fault", "code": "UNHEARD_OF", "detail": ""}\n',
    b'{"event": "fault", "code": "BAD_FORMAT", "detail": 7}\n',
    b'{"event": "fault", "code": "BAD_FORMAT", "detail": "' + b"x" * 100_000 + b'"}\n',
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def strange(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Nursery]:
    python = tmp_path_factory.mktemp("strange") / "python"
    python.write_text(TAKEN_OVER.format(python=sys.executable, sources=str(Path.cwd())))
    python.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        async with Nursery() as nursery:
            yield nursery


def told(folder: Path, deeds: str) -> Path:
    folder.mkdir()
    (folder / "deeds").write_text(deeds)
    return folder


@pytest.mark.parametrize(
    "line", [*LINES, b"x" * 10_000_000, b""], ids=[*map(str, range(len(LINES))), "endless", "more"]
)
async def test_a_child_that_talks_nonsense_ends_and_no_other_does(
    strange: Nursery, tmp_path: Path, line: bytes
) -> None:
    async with asyncio.timeout(PATIENCE_S):
        honest = await strange.spawn(told(tmp_path / "honest", HONEST), LIMITS)
        # The last says a good line, and goes on talking.
        (tmp_path / "line").write_bytes(line or b'{"event": "ready"}\n' + b'{"event": "ended"}\n' * 10_000)
        deeds = f"import os, signal; os.write(report, open({str(tmp_path / 'line')!r}, 'rb').read()); signal.pause()"
        with pytest.raises(ChildEnded) as caught:
            await strange.spawn(told(tmp_path / "other", deeds), LIMITS)
        assert caught.value.exit.kind is ExitKind.CRASHED
        assert (await honest.kill()).kind is ExitKind.OK


async def test_what_a_child_puts_in_its_folder_holds_nobody_up(strange: Nursery, tmp_path: Path) -> None:
    deeds = """
import os
os.chdir(folder)
os.mkfifo("model.log")
os.mkdir("model.sock")
os.write(report, b'{"event": "ready"}\\n')
"""
    async with asyncio.timeout(PATIENCE_S):
        child = await strange.spawn(told(tmp_path / "pipe", deeds), LIMITS)
        end = await child.wait()
        assert (end.kind, end.detail) == (ExitKind.CRASHED, "exited with status 1")
        secret = tmp_path / "secret"
        secret.write_text("kept to itself")
        link = f"import os; os.symlink({str(secret)!r}, folder + '/model.log')"
        with pytest.raises(ChildEnded) as caught:
            await strange.spawn(told(tmp_path / "link", link), LIMITS)
        assert caught.value.exit.detail == "exited with status 1"


@pytest.mark.parametrize(
    "words", [b"no JSON\n", b"x" * 1_000_000, b"[]\n", b"{}\n"], ids=["text", "long", "list", "empty"]
)
async def test_a_nursery_that_talks_nonsense_is_started_again(strange: Nursery, tmp_path: Path, words: bytes) -> None:
    (tmp_path / "words").write_bytes(words)
    deeds = f"""
import os, signal
output = os.open(f"/proc/{{zygote}}/fd/1", os.O_WRONLY)
os.write(output, open({str(tmp_path / "words")!r}, "rb").read())
signal.pause()
"""
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ChildEnded) as caught:
            await strange.spawn(told(tmp_path / "other", deeds), LIMITS)
        assert caught.value.exit.kind is ExitKind.KILLED
        child = await strange.spawn(told(tmp_path / "honest", HONEST), LIMITS)
        assert (await child.kill()).kind is ExitKind.OK
