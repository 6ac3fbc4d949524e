"""What the registry could not hear, or not write, is not held against anybody: deadlines move by that time."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

import structlog

from services.registry.entries import OutageEnded
from services.registry.states import SubmissionState
from services.registry.transaction import Store, Writing

# How often the registry notes that it is at work. Being away for less than twice as long is not noticed.
_BEAT = timedelta(seconds=2)
# A process looks at the clock every second. Where that has moved by so much, nothing ran, or it was put forward.
_LOOK_EVERY_S = 1.0
_ASLEEP = timedelta(seconds=10)

_WITH_DEADLINE = (SubmissionState.COMMITTED, SubmissionState.REVEALED, SubmissionState.EVALUATING)

_log = structlog.get_logger("tiltyard.registry")


class Outages:
    """Notes that the registry is alive, and finds out for how long it was not: before its start, without a database to
    write to, or asleep with its machine."""

    def __init__(self, store: Store, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._clock = clock
        self._noted: datetime | None = None
        self._failing = False
        self._looked: datetime | None = None

    async def watch(self) -> None:
        """Without end: see that this process runs. The next beat takes for an outage what it has slept through.

        So does it where the clock is put forward: what was to last an hour lasts an hour.
        """
        while True:
            self._look()
            await asyncio.sleep(_LOOK_EVERY_S)

    def _look(self) -> None:
        now = self._clock()
        if self._looked is not None and now - self._looked >= _ASLEEP:
            self._failing = True
        self._looked = now

    async def beat(self) -> int:
        """What the referee begins each turn with: note every two seconds that the registry is at work.

        The first note after one that failed, or after a sleep, moves the deadlines, as `end` does: nothing could be
        taken in meanwhile.
        """
        if self._looked is not None:
            self._look()  # who wakes up first, this or the watch, is chance
        now = self._clock()
        if self._noted is not None and timedelta(0) <= now - self._noted < _BEAT:
            return 0
        failing, self._failing = self._failing, True
        if failing:
            await self.end()
        else:
            await self._store.write(lambda tx: tx.set_alive_time(tx.now), quick=True)
        self._noted, self._failing = now, False
        return 0

    async def end(self) -> timedelta:
        """Before anything is served or expires: move the deadlines that ran while the registry was away, by that time.

        Those of commitments, draws, assignments and rounds; tasks close when they said they would. Answers with how far
        they moved, 0 for no outage.
        """

        def write(tx: Writing) -> timedelta:
            alive = tx.alive_time()
            tx.set_alive_time(tx.now)
            if alive is None or tx.now - alive < 2 * _BEAT:
                return timedelta(0)
            away = tx.now - alive
            _move_deadlines(tx, alive, away)
            tx.append(OutageEnded(last_alive=alive, back=tx.now))
            return away

        away = await self._store.write(write)
        if away:
            _log.info("back after an outage, deadlines have moved", away_s=away.total_seconds())
        return away


def _move_deadlines(tx: Writing, alive: datetime, away: timedelta) -> None:
    for assignment in tx.assignments_running(alive):
        if assignment.deadline is not None:
            tx.put_assignment(replace(assignment, deadline=assignment.deadline + away))
    for round_ in tx.rounds_unconcluded():
        if round_.deadline > alive:
            tx.put_round(replace(round_, deadline=round_.deadline + away))
    for submission in tx.submissions_in(*_WITH_DEADLINE):
        if submission.deadline is not None and submission.deadline > alive:
            tx.put_submission(replace(submission, deadline=submission.deadline + away))
