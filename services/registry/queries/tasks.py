"""Questions about participants, tasks and their members."""

from collections.abc import Sequence
from datetime import datetime

from services.registry.convert.times import micros_of
from services.registry.convert.verdicts import verdict_of
from services.registry.listing import Listing, Place
from services.registry.queries.asking import Asking
from services.registry.records import Endorsement, Member, MembershipState, Participant, Task, TaskState, Verdict
from services.registry.rows import ENDORSEMENTS, MEMBERS, PARTICIPANTS, TASKS, VERDICTS
from tiltyard.type.v1 import participation_pb2

_P, _E, _T, _M, _V = PARTICIPANTS.c, ENDORSEMENTS.c, TASKS.c, MEMBERS.c, VERDICTS.c


class TaskQuestions(Asking):
    """The part of `transaction.Reading` that is about who takes part in what."""

    def participant(self, participant: str) -> Participant | None:
        return self._load(PARTICIPANTS, participant)

    def participants(self, listing: Listing) -> Sequence[tuple[Place, Participant]]:
        return self._page(PARTICIPANTS, listing, number=_P.position)

    def endorsements(self, subject: str) -> Sequence[Endorsement]:
        query = ENDORSEMENTS.query().where(_E.subject == subject)
        return self._records(ENDORSEMENTS, query.order_by(_E.create_time, _E.endorser, _E.field))

    def task(self, task: str) -> Task | None:
        return self._load(TASKS, task)

    def tasks(self, listing: Listing) -> Sequence[tuple[Place, Task]]:
        return self._page(TASKS, listing, number=_T.position)

    def tasks_in(self, *states: TaskState) -> Sequence[Task]:
        query = TASKS.query().where(_T.state.in_([state.name for state in states]))
        return self._records(TASKS, query.order_by(_T.position))

    def tasks_due(self, now: datetime) -> Sequence[Task]:
        query = TASKS.query().where(_T.deadline <= micros_of(now))
        return self._records(TASKS, query.order_by(_T.deadline))

    def active_validators(self, task: str) -> int:
        found = self.task(task)
        return 0 if found is None else found.validators

    def tasks_ended_with_pool(self) -> Sequence[Task]:
        ended = [state.name for state in (TaskState.FINAL, TaskState.CANCELLED)]
        query = TASKS.query().where(_T.state.in_(ended), _T.pool_open)
        return self._records(TASKS, query.order_by(_T.position))

    def member(self, task: str, participant: str) -> Member | None:
        return self._load(MEMBERS, task, participant)

    def members(self, task: str, listing: Listing) -> Sequence[tuple[Place, Member]]:
        return self._page(MEMBERS, listing, _M.task == task, number=_M.position)

    def members_in(self, state: MembershipState, *, removed: bool) -> Sequence[Member]:
        query = MEMBERS.query().where(_M.state == state.name, _M.removed == removed)
        return self._records(MEMBERS, query.order_by(_M.position))

    def verdicts(self, task: str, *, after: int, limit: int) -> Sequence[tuple[int, Verdict]]:
        query = VERDICTS.query(_V.position).where(_V.task == task, _V.position > after)
        return [
            (position, verdict_of(participation_pb2.EligibilityVerdict.FromString(kept.verdict)))
            for position, kept in self._placed(VERDICTS, query.order_by(_V.position).limit(limit))
        ]
