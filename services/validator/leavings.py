"""Removes what a task has no more use for: its hidden datasets go when it is final, wherever they came from."""

import asyncio
from dataclasses import dataclass
from typing import Protocol

import structlog

from services.runtime.errors import ArenaError, NotFound
from services.validator.cache import Cache
from services.validator.runs import RunStore

_EVERY_S = 300.0

_log = structlog.get_logger("tiltyard.validator")


@dataclass(frozen=True)
class TaskDatasets:
    """The digests of a task's hidden datasets, and whether the task is FINAL or CANCELLED."""

    digests: frozenset[str]
    ended: bool


class Tasks(Protocol):
    """What the registry says of tasks."""

    async def datasets(self, task: str) -> TaskDatasets:
        """The datasets of a task. Raises ArenaError."""
        ...


class Leavings:
    """Asks for each task that this validator has worked for, until it has ended, and then forgets its datasets."""

    def __init__(self, tasks: Tasks, store: RunStore, cache: Cache, *, every_s: float = _EVERY_S) -> None:
        self._tasks = tasks
        self._store = store
        self._cache = cache
        self._every_s = every_s
        self._ended: set[str] = set()
        self._needed: dict[str, frozenset[str]] = {}
        self._useless: set[str] = set()

    async def run(self) -> None:
        """Looks again and again, until cancelled."""
        while True:
            await self.remove()
            await asyncio.sleep(self._every_s)

    async def remove(self) -> None:
        """Looks once. What cannot be asked for or removed, and what is in use, has its turn the next time.

        Of two tasks with one dataset both are to have ended. One that cannot be asked for counts as it stood before; at
        worst its dataset is fetched again.
        """
        needed: set[str] = set()
        for task in await self._store.tasks():
            if task in self._ended:
                continue
            try:
                found = await self._tasks.datasets(task)
            except NotFound:
                found = TaskDatasets(frozenset(), ended=True)
            except ArenaError as error:
                _log.info("a task could not be asked for", task=task, reason=error.reason)
                needed |= self._needed.get(task, frozenset())
                continue
            if found.ended:
                self._ended.add(task)
                self._needed.pop(task, None)
                self._useless |= found.digests
            else:
                self._needed[task] = found.digests
                needed |= found.digests
        self._useless -= {digest for digest in self._useless - needed if self._cache.remove(digest)}
