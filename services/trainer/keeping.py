"""Removes what trainings have left behind, a while after their end, where the node is told for how long to keep it."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

import structlog

from services.runtime.errors import NotFound
from services.trainer.training import Training

_EVERY_S = 3600.0
# Nobody else can write meanwhile.
_HISTORIES_AT_ONCE = 100

_log = structlog.get_logger("tiltyard.trainer")


class WrittenDown(Protocol):
    """The trainings, which stay on record when their models go."""

    async def get(self, training: str) -> Training:
        """Raises NotFound."""
        ...

    async def forget_histories(self, *, ended_by: datetime, most: int) -> int:
        """Leaves of so many trainings that had ended by then the last point alone; how many they were."""
        ...


class OldTrainings:
    """What is left of trainings that ended more than `keep` ago: their folders, and their histories but for the end.

    With `keep` of nothing all stays for good. `forget` is told of a training before its folder goes: its model is no
    longer to be served. `clock` is None as long as nobody knows how late it is.
    """

    def __init__(
        self,
        folder: Path,
        trainings: WrittenDown,
        *,
        keep: timedelta,
        forget: Callable[[str], Awaitable[None]],
        clock: Callable[[], datetime | None],
    ) -> None:
        self._folder = folder
        self._trainings = trainings
        self._keep = keep
        self._forget = forget
        self._clock = clock

    async def run(self) -> None:
        """Looks once an hour, until cancelled; ends at once where nothing is ever to go."""
        while self._keep:
            await self.remove()
            await asyncio.sleep(_EVERY_S)

    async def remove(self) -> None:
        """Looks once. A removal that breaks off is gone on with at the next look, and holds up no other."""
        now = await asyncio.to_thread(self._clock)
        if now is None:
            return
        ended_by = now - self._keep
        for name in await asyncio.to_thread(self._names):
            if await self._is_old(name, ended_by):
                await self._forget(name)
                try:
                    await asyncio.to_thread(shutil.rmtree, self._folder / name)
                except OSError as error:
                    _log.warning("what a training left cannot be removed", training=name, error=str(error))
                else:
                    _log.info("what a training left is removed", training=name)
        while await self._trainings.forget_histories(ended_by=ended_by, most=_HISTORIES_AT_ONCE):
            pass

    async def _is_old(self, name: str, ended_by: datetime) -> bool:
        try:
            training = await self._trainings.get(name)
        except NotFound:
            return False  # nothing of ours
        return training.ended_at is not None and training.ended_at <= ended_by

    def _names(self) -> list[str]:
        return sorted(each.name for each in self._folder.iterdir() if each.is_dir())
