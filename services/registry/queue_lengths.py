"""How much of everything is under way in the registry, counted for telemetry now and then."""

import asyncio

from sqlalchemy import func
from sqlmodel import Session, col, select

from services.registry.states import AssignmentState, RoundState, SubmissionState
from services.registry.tables import AssignmentRow, RoundRow, SubmissionRow
from services.runtime.database import Database
from tiltyard.telemetry import metrics

_EVERY_S = 10.0

_SUBMISSIONS = metrics.Gauge(
    "tiltyard.submissions", unit="{submission}", description="Submissions under way, by state."
)
_ROUNDS = metrics.Gauge("tiltyard.rounds", unit="{round}", description="Rounds not concluded, by state.")
_LEASES = metrics.Gauge("tiltyard.assignments", unit="{assignment}", description="Assignments not ended, by state.")

_COUNTED = (
    (
        _SUBMISSIONS,
        SubmissionRow.state,
        (SubmissionState.COMMITTED, SubmissionState.REVEALED, SubmissionState.EVALUATING),
    ),
    (_ROUNDS, RoundRow.state, (RoundState.WAITING, RoundState.SEALING, RoundState.OPENING)),
    (_LEASES, AssignmentRow.state, (AssignmentState.OFFERED, AssignmentState.ACCEPTED, AssignmentState.SEALED)),
)


class QueueLengths:
    """Sets the gauges every ten seconds where metrics are collected; ends at once where they are not."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self) -> None:
        """Counts without end."""
        while metrics.collecting:
            await self._database.read(_count)
            await asyncio.sleep(_EVERY_S)


def _count(session: Session) -> None:
    for gauge, state, states in _COUNTED:
        names = [each.name for each in states]
        query = select(state, func.count()).where(col(state).in_(names)).group_by(col(state))
        found = dict(session.exec(query).all())
        for name in names:
            gauge.set(found.get(name, 0), state=name)
