"""Scans of datasets: few at once, and one of each creator, so that nobody's many hold up the others'."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from services.registry.records import Task
from services.registry.referee.scans import DatasetScans
from services.registry.states import TaskState
from services.registry.task_config import DatasetDigest
from tests.support.registry_fakes import START
from tests.support.registry_world import SPEC, task_config
from tiltyard.datasets import DatasetError, write_dataset


class SlowFiles:
    """Files that are being opened until they are `ready`, and then are no datasets."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.opened: list[str] = []

    @contextmanager
    def local(self, sha256: str) -> Iterator[Path]:
        self.opened.append(bytes.fromhex(sha256).decode())
        self.ready.wait()
        raise DatasetError("it is none")
        yield Path()


def task(name: str, creator: str) -> Task:
    return Task(name, creator, task_config(), TaskState.PREPARING, create_time=START, update_time=START)


async def test_of_each_creator_one_dataset_is_scanned_and_two_in_all() -> None:
    files, woken = SlowFiles(), asyncio.Event()
    scans = DatasetScans(files, woken.set)
    waiting = {name: task(name, name[0]) for name in ("a1", "a2", "b1", "c1")}

    def look() -> None:
        for name, each in list(waiting.items()):
            found = scans.look(each, DatasetDigest(name.encode(), 100))
            if found is not None:
                assert found.fault == "it is none"
                del waiting[name]

    async with asyncio.timeout(20):
        while len(files.opened) < 2:
            look()
            await asyncio.sleep(0)
        look()
        assert sorted(files.opened) == ["a1", "b1"]
        files.ready.set()
        while waiting:
            await woken.wait()
            woken.clear()
            look()
    assert sorted(files.opened) == ["a1", "a2", "b1", "c1"]


async def test_a_dataset_is_scanned_for_the_model_that_scales_it_most(tmp_path: Path) -> None:
    class OneFile:
        @contextmanager
        def local(self, sha256: str) -> Iterator[Path]:
            yield tmp_path / "d"

    # What one model makes of it is finite; whoever trained the other would have been told that its outputs are NaN.
    scaled = tuple(replace(SPEC, input_scale=scale) for scale in (0.5, -1e6, 2.0))
    write_dataset(tmp_path / "d", np.full((2, *SPEC.input_shape), 3e33, np.float32), np.zeros(2, np.int64))
    woken = asyncio.Event()
    scans = DatasetScans(OneFile(), woken.set)
    for models, fault in ((scaled[::2], ""), (scaled, "multiplied by 1e+06")):
        judged = replace(task("t", "a"), config=replace(task_config(), models=models))
        assert scans.look(judged, DatasetDigest(bytes(32), 1)) is None
        await woken.wait()
        woken.clear()
        found = scans.look(judged, DatasetDigest(bytes(32), 1))
        assert found is not None
        assert (found.rows, fault in found.fault, bool(found.fault)) == (2, True, bool(fault))
