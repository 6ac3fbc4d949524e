"""Questions about participants, tasks and their members."""

from collections.abc import Collection, Sequence
from datetime import datetime

from services.registry.convert.times import micros_of
from services.registry.convert.verdicts import verdict_of
from services.registry.listing import Listing, Place
from services.registry.queries.asking import Asking
from services.registry.records import Endorsement, Member, Participant, Task, Verdict
from services.registry.rows import ENDORSEMENTS, MEMBERS, PARTICIPANTS, TASKS, VERDICTS
from services.registry.states import MembershipState, TaskState
from services.runtime.engines import Written, given
from tiltyard.type.v1 import participation_pb2

_P, _E, _T, _M, _V = PARTICIPANTS.c, ENDORSEMENTS.c, TASKS.c, MEMBERS.c, VERDICTS.c

_IN = Written(TASKS.query().where(_T.state == given("state")).order_by(_T.position))
_DUE = Written(TASKS.query().where(_T.deadline <= given("now")).order_by(_T.deadline))
_WITH_POOL = Written(
    TASKS.query()
    .where(_T.state.in_([TaskState.FINAL.name, TaskState.CANCELLED.name]), _T.pool_open)
    .order_by(_T.position)
)
_MEMBERS_IN = Written(
    MEMBERS.query().where(_M.state == given("state"), _M.removed == given("removed")).order_by(_M.position)
)


class TaskQuestions(Asking):
    """The part of `transaction.Reading` that is about who takes part in what."""

    def participant(self, participant: str) -> Participant | None:
        return self._load(PARTICIPANTS, participant)

    def participants(self, listing: Listing) -> Sequence[tuple[Place, Participant]]:
        return self._page(PARTICIPANTS, listing, number=_P.position)

    def endorsement(self, endorser: str, subject: str, field: str) -> Endorsement | None:
        return self._load(ENDORSEMENTS, subject, endorser, field)

    def endorsements(
        self, subject: str, *, by: Collection[str] | None = None, limit: int | None = None
    ) -> Sequence[Endorsement]:
        query = ENDORSEMENTS.query().where(_E.subject == subject)
        if by is not None:
            query = query.where(_E.endorser.in_(sorted(by)))
        return self._records(ENDORSEMENTS, query.order_by(_E.endorser, _E.field).limit(limit))

    def task(self, task: str) -> Task | None:
        return self._load(TASKS, task)

    def tasks(self, listing: Listing) -> Sequence[tuple[Place, Task]]:
        return self._page(TASKS, listing, number=_T.position)

    def tasks_in(self, state: TaskState) -> Sequence[Task]:
        return self._found(TASKS, _IN, state=state.name)

    def tasks_due(self, now: datetime) -> Sequence[Task]:
        return self._found(TASKS, _DUE, now=micros_of(now))

    def active_validators(self, task: str) -> int:
        found = self.task(task)
        return 0 if found is None else found.validators

    def tasks_ended_with_pool(self) -> Sequence[Task]:
        return self._found(TASKS, _WITH_POOL)

    def member(self, task: str, participant: str) -> Member | None:
        return self._load(MEMBERS, task, participant)

    def members(self, task: str, listing: Listing) -> Sequence[tuple[Place, Member]]:
        return self._page(MEMBERS, listing, _M.task == task, number=_M.position)

    def members_in(self, state: MembershipState, *, removed: bool) -> Sequence[Member]:
        return self._found(MEMBERS, _MEMBERS_IN, state=state.name, removed=removed)

    def verdicts(self, task: str, *, after: int, limit: int) -> Sequence[tuple[int, Verdict]]:
        query = VERDICTS.query(_V.position).where(_V.task == task, _V.position > after)
        return [
            (position, verdict_of(participation_pb2.EligibilityVerdict.FromString(kept.verdict)))
            for position, kept in self._placed(VERDICTS, query.order_by(_V.position).limit(limit))
        ]
