"""How much of everything is under way in the registry, and which duties were not done: counted for telemetry."""

import asyncio
from collections.abc import Callable, Mapping

from sqlalchemy import func
from sqlmodel import Session, col, select

from services.registry.states import AssignmentState, RoundState, SubmissionState, ValidatorFaultKind
from services.registry.tables import AssignmentRow, RoundRow, SubmissionRow, ValidatorFaultRow
from services.runtime.database import Database
from tiltyard.telemetry import metrics

_EVERY_S = 10.0

_SUBMISSIONS = metrics.Gauge(
    "tiltyard.submissions", unit="{submission}", description="Submissions under way, by state."
)
_ROUNDS = metrics.Gauge("tiltyard.rounds", unit="{round}", description="Rounds not concluded, by state.")
_LEASES = metrics.Gauge("tiltyard.assignments", unit="{assignment}", description="Assignments not ended, by state.")
FAULTS = metrics.Counter(
    "tiltyard.validator.faults",
    unit="{fault}",
    description="Duties that validators have not done, or have done wrongly, by kind.",
    told_at_zero=[{"kind": kind.name} for kind in ValidatorFaultKind],
)

_COUNTED = (
    (
        _SUBMISSIONS,
        SubmissionRow.state,
        (SubmissionState.COMMITTED, SubmissionState.REVEALED, SubmissionState.EVALUATING),
    ),
    (_ROUNDS, RoundRow.state, (RoundState.WAITING, RoundState.SEALING, RoundState.OPENING)),
    (_LEASES, AssignmentRow.state, (AssignmentState.OFFERED, AssignmentState.ACCEPTED, AssignmentState.SEALED)),
)


class DomainMetrics:
    """Counts every ten seconds where metrics are collected; ends at once where they are not."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._last_fault: int | None = None

    async def run(self) -> None:
        """Counts without end."""
        while metrics.collecting:
            await self.count()
            await asyncio.sleep(_EVERY_S)

    async def count(self) -> None:
        """What is under way now, and the faults since the last time; at the first time none."""
        await self._database.read(_count)
        if self._last_fault is None:
            self._last_fault = await self._database.read(_last_fault)
        self._last_fault, faults = await self._database.read(_faults_after(self._last_fault))
        for kind, number in faults.items():
            FAULTS.add(number, kind=kind)


def _count(session: Session) -> None:
    for gauge, state, states in _COUNTED:
        names = [each.name for each in states]
        query = select(state, func.count()).where(col(state).in_(names)).group_by(col(state))
        found = dict(session.exec(query).all())
        for name in names:
            gauge.set(found.get(name, 0), state=name)


def _last_fault(session: Session) -> int:
    return session.exec(select(func.max(ValidatorFaultRow.position))).one() or 0


def _faults_after(last: int) -> Callable[[Session], tuple[int, Mapping[str, int]]]:
    """The position of the newest fault, and how many of each kind lie behind the `last`."""

    def count(session: Session) -> tuple[int, Mapping[str, int]]:
        query = (
            select(ValidatorFaultRow.kind, func.count(), func.max(ValidatorFaultRow.position))
            .where(col(ValidatorFaultRow.position) > last)
            .group_by(ValidatorFaultRow.kind)
        )
        found = session.exec(query).all()
        newest = max((position or 0 for _, _, position in found), default=last)
        return newest, {kind: number for kind, number, _ in found}

    return count
