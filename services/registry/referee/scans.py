"""Scans of uploaded datasets, beside the referee's other steps: a large file must not hold them up."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.registry.records import Task
from services.registry.states import Metric
from services.registry.task_config import DatasetDigest
from tiltyard.datasets import Dataset, DatasetError, scan

_SHOWN_VIOLATIONS = 5
_AT_ONCE = 2


class DatasetFiles(Protocol):
    """Where the bytes of artifacts lie."""

    def local(self, sha256: str) -> AbstractContextManager[Path]:
        """A complete artifact as a file to be mapped into memory, while the context lasts."""
        ...


@dataclass(frozen=True)
class ScanResult:
    """What a scan found: the number of rows, or what is wrong in one sentence."""

    rows: int
    fault: str = ""


class DatasetScans:
    """Runs each scan once in a thread; `wake` is called when one is done.

    Two run at once, and one of each creator, so that nobody's many large datasets hold up others' tasks or uploads.
    """

    def __init__(self, files: DatasetFiles, wake: Callable[[], None]) -> None:
        self._files = files
        self._wake = wake
        self._running: dict[tuple[str, bytes], asyncio.Task[ScanResult]] = {}
        self._busy: set[str] = set()

    def look(self, task: Task, digest: DatasetDigest) -> ScanResult | None:
        """The result when there is one; else the scan is started, goes on, or waits until there is room for it.

        Raises OSError once, then starts anew.
        """
        key = (task.id, digest.sha256)
        running = self._running.get(key)
        if running is None:
            if len(self._busy) == _AT_ONCE or task.creator in self._busy:
                return None
            running = asyncio.ensure_future(asyncio.to_thread(self._scan, task, digest))
            running.add_done_callback(lambda done: self._end(task.creator))
            self._busy.add(task.creator)
            self._running[key] = running
        if not running.done():
            return None
        del self._running[key]
        return running.result()

    def _end(self, creator: str) -> None:
        self._busy.remove(creator)
        self._wake()

    def _scan(self, task: Task, digest: DatasetDigest) -> ScanResult:
        model = task.config.models[0]
        scale = max(abs(each.input_scale) for each in task.config.models)
        classes = model.outputs if task.config.metric is not Metric.WITHIN_BOUND else None
        try:
            with self._files.local(digest.sha256.hex()) as path:
                dataset = Dataset.open(path)
                violations = scan(dataset, model.input_shape, classes, targets=model.outputs, input_scale=scale)
        except DatasetError as error:
            return ScanResult(0, str(error))
        shown = "; ".join(f"{violation.field}: {violation.description}" for violation in violations[:_SHOWN_VIOLATIONS])
        return ScanResult(len(dataset), shown)
