"""What the validator says of itself: its status, its history, a run as it goes on."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from services.runtime.errors import NotFound
from services.runtime.names import format_participant
from services.validator.runs import ENDED_RUNS, RunStore, RunView, view
from services.validator.scheduler import Scheduler

_TICK_S = 0.25


@dataclass(frozen=True)
class Status:
    """What the validator does now; `ended` runs since the state folder was made."""

    participant: str
    draining: bool
    active: tuple[RunView, ...]
    ended: int
    isolation: str


@dataclass(frozen=True)
class RunPage:
    """One page of the history, newest first; `next_below` is where the next page begins, None on the last."""

    runs: tuple[RunView, ...]
    next_below: int | None


class Validation:
    """Answers the owner of this validator. `isolation` says how model servers are confined on this machine."""

    def __init__(
        self, participant_id: str, scheduler: Scheduler, store: RunStore, *, isolation: Callable[[], str]
    ) -> None:
        self._participant = format_participant(participant_id)
        self._scheduler = scheduler
        self._store = store
        self._isolation = isolation

    async def status(self) -> Status:
        """What the validator does now."""
        return Status(
            participant=self._participant,
            draining=self._scheduler.draining,
            active=self._active(),
            ended=await self._store.count_ended(),
            isolation=self._isolation(),
        )

    async def history(self, *, below: int | None, size: int) -> RunPage:
        """At most `size` runs numbered below `below` (None: from the newest), those in progress as they are now."""
        runs = await self._store.page(below=below, size=size + 1)
        now = {each.run.assignment: each for each in self._active()}
        shown = runs[:size]
        return RunPage(
            runs=tuple(now.get(run.assignment, view(run)) for run in shown),
            next_below=shown[-1].number if len(runs) > size else None,
        )

    async def watch(self, assignment: str) -> AsyncIterator[RunView]:
        """The run on an assignment now, and again as it moves, until it has ended. Raises NotFound."""
        shown: RunView | None = None
        while True:
            news = self._scheduler.news()
            current = await self._view(assignment)
            if current is None:
                raise NotFound("RUN_NOT_FOUND", f"this validator has no run on {assignment}", assignment=assignment)
            if current != shown:
                shown = current
                yield current
            if current.run.state in ENDED_RUNS:
                return
            # Positions move without news; states do not.
            try:
                async with asyncio.timeout(_TICK_S):
                    await news.wait()
            except TimeoutError:
                continue

    def drain(self) -> int:
        """Begins no further run, and stops the process after the last; returns how many are in progress."""
        self._scheduler.drain()
        return len(self._scheduler.duties())

    def _active(self) -> tuple[RunView, ...]:
        return tuple(view(duty.run, duty.progress) for duty in self._scheduler.duties() if duty.run is not None)

    async def _view(self, assignment: str) -> RunView | None:
        duty = self._scheduler.duty(assignment)
        if duty is not None and duty.run is not None:
            return view(duty.run, duty.progress)
        run = await self._store.get(assignment)
        return None if run is None else view(run)
