"""Scans of datasets: few at once, and one of each creator, so that nobody's many hold up the others'."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.registry.records import Task
from services.registry.referee.scans import DatasetScans
from services.registry.states import TaskState
from services.registry.task_config import DatasetDigest
from tests.support.registry_fakes import START
from tests.support.registry_world import task_config
from tiltyard.datasets import DatasetError


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
