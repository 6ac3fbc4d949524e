"""What becomes of an evaluation whose model server hangs, crashes or is killed, found as the validator finds it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio
from safetensors.numpy import save_file

from services.modelserver.spawn import READY_TIMEOUT_S, Child, Limits, Nursery
from services.validator import children
from services.validator.assignments import Order
from services.validator.children import NurseryAttempts
from services.validator.evaluation import CannotEvaluate, Job, find
from services.validator.runs import Fault, Finding, Progress
from tests.support.wiretap import Tap, labels_in
from tiltyard.modelspec import Convnet, Mlp, ModelSpec, tensor_shapes

# Wide enough to be caught in the middle.
SPEC = ModelSpec((8, 8), 10, Mlp((512, 512, 512)), input_scale=1 / 255)
ROWS = 60_000


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nursery() -> AsyncIterator[Nursery]:
    async with Nursery() as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def attempts(nursery: Nursery, tmp_path: Path) -> AsyncIterator[NurseryAttempts]:
    made = NurseryAttempts(nursery, folder=tmp_path / "children", threads=0, concurrency=1)
    yield made
    made.close()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    rng = np.random.default_rng(0)
    save_file({"x": rng.integers(0, 256, (ROWS, 8, 8), dtype=np.uint8), "y": np.zeros(ROWS, int)}, tmp_path / "d")
    save_file({n: rng.normal(size=s).astype(np.float32) for n, s in tensor_shapes(SPEC).items()}, tmp_path / "m")
    order = Order(
        dataset_digest="",
        dataset_bytes=0,
        model_digest="",
        model_bytes=0,
        spec=SPEC,
        max_cpu_s=60,
        max_memory_bytes=1 << 30,
    )
    return Job(order, tmp_path / "d", tmp_path / "m")


async def find_while(job: Job, attempts: NurseryAttempts, number: signal.Signals, *, times: int) -> Finding:
    """The finding, while the first `times` model servers get a signal as soon as they have answered a batch."""
    progress = Progress()
    finding = asyncio.create_task(find(job, attempts, progress))
    (zygote,) = [each for each in psutil.Process().children() if "--zygote" in each.cmdline()]
    struck: set[int] = set()
    while not finding.done():
        if progress.position and len(struck) < times:
            for child in zygote.children():
                if child.pid not in struck:
                    struck.add(child.pid)
                    progress.position = 0
                    os.kill(child.pid, number)
        await asyncio.wait([finding], timeout=0.01)
    assert len(struck) == times
    return finding.result()


@pytest.mark.parametrize(
    ("number", "times", "fault"),
    [
        # Nothing that the model did, as often as it may be.
        (signal.SIGKILL, 2, None),
        # A fault only when a fresh model server ends in one too.
        (signal.SIGSEGV, 1, None),
        (signal.SIGSEGV, 2, Fault.CRASHED),
        (signal.SIGSTOP, 1, None),
        (signal.SIGSTOP, 2, Fault.TOO_SLOW),
    ],
)
async def test_a_model_server_struck_in_the_middle(
    job: Job,
    attempts: NurseryAttempts,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    times: int,
    fault: Fault | None,
) -> None:
    monkeypatch.setattr(children, "stall_s", lambda order: 3.0)
    finding = await find_while(job, attempts, number, times=times)
    assert finding.fault == fault, finding.detail
    assert finding.counts is None if fault else finding.counts is not None and finding.counts.total == ROWS


async def test_a_model_that_computes_is_not_taken_for_one_that_hangs(
    job: Job, attempts: NurseryAttempts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec((64, 64), 2, Convnet((64, 64), kernel_size=11), 1 / 255)
    rows = np.random.default_rng(0).integers(0, 256, (64, 64, 64), dtype=np.uint8)
    save_file({"x": rows, "y": np.zeros(64, int)}, tmp_path / "long")
    save_file({n: np.ones(s, np.float32) for n, s in tensor_shapes(spec).items()}, tmp_path / "busy")
    # As on a machine that has so much to do that one batch takes longer than that.
    monkeypatch.setattr(children, "stall_s", lambda order: 0.2)
    order = replace(job.order, spec=spec)
    finding = await find(Job(order, tmp_path / "long", tmp_path / "busy"), attempts, Progress())
    assert finding.fault is None, finding.detail


async def test_model_servers_that_are_killed_again_and_again_are_the_platforms_trouble(
    job: Job, attempts: NurseryAttempts
) -> None:
    with pytest.raises(CannotEvaluate, match="no model server stays alive"):
        await find_while(job, attempts, signal.SIGKILL, times=3)


class TappedNursery(Nursery):
    """Children behind a tap: what goes to them and comes back is kept."""

    def __init__(self, nursery: Nursery) -> None:
        self._inner = nursery
        self.taps: list[Tap] = []

    async def spawn(self, folder: Path, limits: Limits, *, timeout_s: float = READY_TIMEOUT_S) -> Child:
        child = await self._inner.spawn(folder, limits, timeout_s=timeout_s)
        self.taps.append(Tap(child.address, f"{child.address}.tap"))
        return replace(child, address=self.taps[-1].address)


async def test_no_label_is_on_the_wire_to_a_model_server(tmp_path: Path, nursery: Nursery) -> None:
    rng = np.random.default_rng(0)
    spec = ModelSpec((8,), 50_000, Mlp((2,)))
    x, y = rng.normal(size=(1000, 8)).astype(np.float32), rng.permutation(np.arange(10_000, 50_000))[:1000]
    save_file({"x": x, "y": y}, tmp_path / "d")
    save_file({n: rng.normal(size=s).astype(np.float32) for n, s in tensor_shapes(spec).items()}, tmp_path / "m")
    order = Order("", 0, "", 0, spec, max_cpu_s=60, max_memory_bytes=1 << 30)
    tapped = TappedNursery(nursery)
    attempts = NurseryAttempts(tapped, folder=tmp_path / "children", threads=0, concurrency=1)
    found = await attempts.attempt(Job(order, tmp_path / "d", tmp_path / "m"), Progress())
    attempts.close()
    assert found.counts is not None
    (tap,) = tapped.taps
    wire = tap.sent
    tap.close()
    # The tap saw the features, whole rows of them, and the outputs.
    assert sum(row.tobytes() in wire for row in x[::50]) == 20
    assert len(tap.received) > 4 * 50_000 * len(x)
    labels = y.tolist()
    assert labels_in(wire, labels) == []
    for encoded in (y[4:8].astype("<i4").tobytes(), ",".join(map(str, labels[:9])).encode()):
        assert labels_in(wire[:1000] + encoded + wire[1000:2000], labels)


async def test_a_cache_on_another_disk_than_the_children_is_no_hindrance(
    attempts: NurseryAttempts, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Path, _target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    found = await attempts.attempt(job, Progress())
    assert found.counts is not None
    assert found.counts.total == ROWS
    assert list((tmp_path / "children").iterdir()) == []
