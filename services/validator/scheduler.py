"""Sees every assignment, starts a duty on each, and knows when to stop."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from services.runtime.errors import ArenaError, InvalidArgument, OutOfRange
from services.validator import validator_metrics
from services.validator.assignments import ENDED_ASSIGNMENTS, Assignment, AssignmentState
from services.validator.duties import Desk, Duty, Means
from services.validator.patience import TRANSIENT, Pauses, persist
from services.validator.runs import ENDED_RUNS, Run
from tiltyard.telemetry import tracing

_log = structlog.get_logger("tiltyard.validator")


@dataclass(frozen=True)
class _Active:
    duty: Duty
    task: asyncio.Task[None]


class Scheduler:
    """All duties of this validator. After `stop_after` ended runs it drains by itself (0: never).

    `run` is the background work and lives until it is cancelled; `on_drained` is called once, when a drain is over.
    """

    def __init__(self, means: Means, *, stop_after: int = 0, on_drained: Callable[[], None]) -> None:
        self._means = means
        self._stop_after = stop_after
        self._on_drained = on_drained
        self._active: dict[str, _Active] = {}
        self._given_back: set[str] = set()
        self._farewells: set[asyncio.Task[None]] = set()
        # Runs begun, and duties that may become such. Never more than stop_after, so that no work is left over when
        # that many have ended; what comes beyond is given back, since an offer that is left to run out is a fault.
        self._admitted = 0
        self._ended_here = 0
        self._taken_up = False
        self._drained = False
        self._news = asyncio.Event()
        self._desk = Desk(changed=self._announce, draining=lambda: self.draining)
        self.draining = False
        validator_metrics.follow(lambda: [active.duty for active in tuple(self._active.values())])

    def duties(self) -> list[Duty]:
        """The duties whose run has not ended, in the order in which they came."""
        return [active.duty for active in self._active.values() if active.duty.run is not None]

    def duty(self, assignment: str) -> Duty | None:
        """The duty on an assignment, if it has a run that has not ended."""
        active = self._active.get(assignment)
        return active.duty if active is not None and active.duty.run is not None else None

    def news(self) -> asyncio.Event:
        """Set at the next change of any run."""
        return self._news

    def drain(self) -> None:
        """Begins no further run and gives back what waits; once the last run has ended, `on_drained` is called."""
        self.draining = True
        for name, active in self._active.items():
            if active.duty.waiting:
                active.task.cancel()
                self._give_back(name, leased=active.duty.leased)
        self._stop_when_drained()

    async def run(self) -> None:
        """Takes up what the store left unfinished, then follows the registry."""
        try:
            await self._take_up()
            await self._follow()
        finally:
            tasks = [*(active.task for active in self._active.values()), *self._farewells]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._active.clear()

    async def _take_up(self) -> None:
        known = {each.name: each for each in await persist(self._means.registry.assignments, "list assignments")}
        for run in await self._means.store.unfinished():
            # What the registry has forgotten is over.
            forgotten = Assignment(run.assignment, run.task, AssignmentState.EXPIRED)
            self._start(known.get(run.assignment, forgotten), run)
        for assignment in known.values():
            await self._see(assignment)
        self._taken_up = True
        self._stop_when_drained()

    async def _follow(self) -> None:
        cursor = ""
        pauses = Pauses()
        while True:
            try:
                async for assignment, at in self._means.registry.watch(cursor):
                    cursor = at
                    pauses.reset()
                    await self._see(assignment)
            except (InvalidArgument, OutOfRange) as error:
                # A cursor that means nothing any more; from the beginning, then.
                _log.warning("the watch begins anew", reason=error.reason, detail=error.message)
                cursor = ""
            except TRANSIENT as error:
                _log.info("the watch broke", reason=error.reason)
            except ArenaError as error:
                _log.warning("the watch is refused", reason=error.reason, detail=error.message)
            await pauses.pause()

    async def _see(self, assignment: Assignment) -> None:
        active = self._active.get(assignment.name)
        if active is not None:
            active.duty.hear(assignment)
            return
        if assignment.state in ENDED_ASSIGNMENTS:
            self._given_back.discard(assignment.name)
            return
        # What is passed over here is not told again.
        run = await persist(lambda: self._means.store.get(assignment.name), "look up a run")
        if run is not None and run.state in ENDED_RUNS:
            return
        enough = self.draining or (self._stop_after and self._admitted >= self._stop_after)
        if run is None and enough:
            if assignment.state is not AssignmentState.SEALED:
                self._give_back(assignment.name, leased=assignment.state is AssignmentState.ACCEPTED)
            return
        if run is None:
            self._admitted += 1
        self._start(assignment, run)

    def _start(self, assignment: Assignment, run: Run | None) -> None:
        duty = Duty(assignment, run, self._means, self._desk)
        task = asyncio.create_task(_perform(duty, assignment))
        self._active[assignment.name] = _Active(duty, task)
        task.add_done_callback(lambda _: self._ended(assignment.name, duty, task))

    def _ended(self, name: str, duty: Duty, task: asyncio.Task[None]) -> None:
        if name in self._active and self._active[name].task is task:
            del self._active[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a duty died", assignment=name, exc_info=error)
        if duty.run is None:
            # Another may have its place.
            self._admitted -= 1
        if duty.run is not None and duty.run.state in ENDED_RUNS:
            validator_metrics.note_ended(duty.run)
            self._ended_here += 1
            if self._stop_after and self._ended_here >= self._stop_after and not self.draining:
                self.drain()
        self._announce()
        self._stop_when_drained()

    def _give_back(self, name: str, *, leased: bool) -> None:
        """Lets the next reserve have it at once, instead of after the time for acceptance, or of the lease."""
        if name in self._given_back:
            return
        self._given_back.add(name)
        task = asyncio.create_task(self._decline(name, leased=leased))
        self._farewells.add(task)
        task.add_done_callback(self._said_farewell)

    async def _decline(self, name: str, *, leased: bool) -> None:
        registry = self._means.registry
        try:
            # Who was cut off between accepting and storing a run has the lease, but not its token.
            token = (await registry.accept(name, self._means.lease_holder)).token if leased else ""
            await registry.decline(name, token, "the validator takes no further assignments")
        except ArenaError as error:
            _log.info("could not give an assignment back", assignment=name, reason=error.reason)

    def _said_farewell(self, task: asyncio.Task[None]) -> None:
        self._farewells.discard(task)
        self._stop_when_drained()

    def _stop_when_drained(self) -> None:
        if self.draining and self._taken_up and not self._active and not self._farewells and not self._drained:
            self._drained = True
            self._on_drained()

    def _announce(self) -> None:
        # Who waits has the old event.
        self._news.set()
        self._news = asyncio.Event()


async def _perform(duty: Duty, assignment: Assignment) -> None:
    with tracing.span("evaluate", parent=assignment.trace, assignment=assignment.name):
        await duty.perform()
