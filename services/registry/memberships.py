"""Who takes part in a task in which role, and the recorded verdicts on who may."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from services.registry.daily import Daily
from services.registry.eligibility_facts import facts_of, not_eligible
from services.registry.entries import MembershipChanged
from services.registry.listing import Listing, Place
from services.registry.participants import registered
from services.registry.records import Member, Task, Verdict
from services.registry.referee.turns import each
from services.registry.selection import Candidacy, EligibilityFacts, Selection
from services.registry.states import MembershipState, Role, SubmissionState, TaskState
from services.registry.task_states import ENDED, check_unended, known_task
from services.registry.tasks import record_verdict
from services.registry.transaction import Reading, Store, Writing
from services.runtime.errors import AlreadyExists, FailedPrecondition, NotFound, PermissionDenied
from tiltyard.identity import Envelope

# A membership that waits longer for the selector was left behind by a call that died.
_LEFT_BEHIND = timedelta(seconds=10)
_TAKING_PART = (MembershipState.ACTIVE, MembershipState.PAUSED)
_UNENDED = (SubmissionState.COMMITTED, SubmissionState.REVEALED, SubmissionState.EVALUATING)


@dataclass(frozen=True)
class Joined:
    """A membership with the verdict that it rests on."""

    member: Member
    verdict: Verdict


@dataclass(frozen=True)
class _Application:
    """What the selector is asked about a PENDING member."""

    member: Member
    facts: EligibilityFacts
    owner: str | None


class Memberships:
    """Lets participants in and out. The endorsements of `trusted` participants count for eligibility.

    `daily` counts every change, and refused verdicts: all but questions raise ResourceExhausted.
    """

    def __init__(
        self,
        store: Store,
        selection: Selection,
        clock: Callable[[], datetime],
        daily: Daily,
        *,
        trusted: Collection[str],
    ) -> None:
        self._store = store
        self._selection = selection
        self._clock = clock
        self._daily = daily
        self._trusted = frozenset(trusted)

    async def join(self, caller: str, *, task: str, role: Role, statement: Envelope) -> Joined:
        """Take one role in one task; the selector decides and locks the stake.

        Raises FailedPrecondition(NOT_REGISTERED, NOT_ELIGIBLE, TASK_ENDED, TASK_NOT_OPEN), AlreadyExists(ROLE_TAKEN).
        """

        def joinable(tx: Reading) -> Task:
            registered(tx, caller)
            found = known_task(tx, task)
            check_unended(found)
            _check_role_free(tx.member(task, caller), role)
            _check_joinable(found, role)
            return found

        def apply(tx: Writing) -> _Application:
            found = joinable(tx)
            member = Member(task, caller, role, MembershipState.PENDING, statement, create_time=tx.now)
            tx.put_member(member)
            return self._application(tx, member, found)

        if await self._foresees_refusal(caller, role, joinable):
            self._daily.count_stranger()
        else:
            self._daily.count_change()
        application = await self._store.write(apply, final=False)
        candidacy = await self._ask(application)
        if candidacy.verdict.eligible:
            return await self._store.write(lambda tx: _admit(tx, application.member, candidacy))
        await self._store.write(lambda tx: _refuse(tx, application.member, candidacy), final=False)
        raise not_eligible(candidacy.verdict)

    async def pause(self, caller: str, task: str, participant: str) -> Member:
        """Leave the caller out of new draws. Raises FailedPrecondition(NOT_A_MEMBER), PermissionDenied, NotFound."""
        return await self._change(caller, task, participant, MembershipState.PAUSED)

    async def resume(self, caller: str, task: str, participant: str) -> Member:
        """Take the caller back into new draws."""
        return await self._change(caller, task, participant, MembershipState.ACTIVE)

    async def leave(self, caller: str, task: str, participant: str) -> Member:
        """End the caller's membership; its stake is unlocked once its last duty has ended."""
        return await self._change(caller, task, participant, MembershipState.LEFT)

    async def members(self, task: str, listing: Listing) -> Sequence[tuple[Place, Member]]:
        """Members, each with its place. Raises NotFound."""

        def read(tx: Reading) -> Sequence[tuple[Place, Member]]:
            known_task(tx, task)
            return tx.members(task, listing)

        return await self._store.read(read)

    async def verdicts(self, task: str, *, after: int | None, limit: int) -> Sequence[tuple[int, Verdict]]:
        """Verdicts in the order given, those beyond a position; also on a task that was never created."""
        return await self._store.read(lambda tx: tx.verdicts(task, after=after or 0, limit=limit))

    async def finish_joining(self) -> int:
        """A step of the referee: what a call that died had begun with the selector."""
        before = self._clock() - _LEFT_BEHIND

        def left_behind(tx: Reading) -> list[_Application]:
            pending = [m for m in tx.members_in(MembershipState.PENDING, removed=False) if m.create_time <= before]
            return [self._application(tx, member, known_task(tx, member.task)) for member in pending]

        if not await self._store.finds(lambda tx: tx.members_in(MembershipState.PENDING, removed=False)):
            return 0
        return await each(await self._store.read(left_behind), self._finish)

    async def _finish(self, application: _Application) -> int:
        try:
            candidacy = await self._ask(application)
        except (AlreadyExists, FailedPrecondition, NotFound):
            return 1  # refused and recorded
        decide = _admit if candidacy.verdict.eligible else _refuse
        await self._store.write(lambda tx: decide(tx, application.member, candidacy))
        return 1

    async def remove_those_who_left(self) -> int:
        """A step of the referee: stakes of members who have left and have no duty any more are unlocked."""

        def free(tx: Reading) -> list[Member]:
            left = tx.members_in(MembershipState.LEFT, removed=False)
            return [member for member in left if not _has_duties(tx, member)]

        if not await self._store.finds(lambda tx: tx.members_in(MembershipState.LEFT, removed=False)):
            return 0
        return await each(await self._store.read(free), self._remove)

    async def _remove(self, member: Member) -> int:
        await self._selection.remove_candidate(task=member.task, participant=member.participant)

        def record(tx: Writing) -> int:
            found = tx.member(member.task, member.participant)
            if found is None or found.state is not MembershipState.LEFT:
                return 0
            tx.put_member(replace(found, locked_micros=0, weight=0, removed=True))
            return 1

        return await self._store.write(record)

    async def _foresees_refusal(self, caller: str, role: Role, joinable: Callable[[Reading], Task]) -> bool:
        """Asked before anything is written down: afterwards the referee ends what was begun, whoever is counted."""

        def ask(tx: Reading) -> tuple[Task, EligibilityFacts]:
            task = joinable(tx)
            return task, facts_of(tx, caller, field=task.config.field, trusted=self._trusted)

        task, facts = await self._store.read(ask)
        answer = await self._selection.check_eligibility(
            participant=caller, task=task.id, role=role, facts=facts, policy=task.config.selection
        )
        return not answer.verdict.eligible

    def _application(self, tx: Reading, member: Member, task: Task) -> _Application:
        participant = tx.participant(member.participant)
        facts = facts_of(tx, member.participant, field=task.config.field, trusted=self._trusted)
        return _Application(member, facts, None if participant is None else participant.owner)

    async def _ask(self, application: _Application) -> Candidacy:
        member = application.member
        try:
            return await self._selection.add_candidate(
                task=member.task,
                participant=member.participant,
                role=member.role,
                facts=application.facts,
                owner=application.owner,
            )
        except (AlreadyExists, FailedPrecondition, NotFound):
            # The pool is closed or gone, or knows the caller in another role: nothing was locked, and nothing will be.
            await self._store.write(lambda tx: _end_pending(tx, member, MembershipState.REFUSED), final=False)
            raise

    async def _change(self, caller: str, task: str, participant: str, state: MembershipState) -> Member:
        if caller != participant:
            raise PermissionDenied("NOT_THE_MEMBER", "this is somebody else's membership")

        def work(tx: Writing) -> Member:
            member = tx.member(task, participant)
            if member is None:
                raise NotFound("MEMBER_NOT_FOUND", f"the caller is no member of task {task}")
            if member.state is state:
                return member
            if member.state not in _TAKING_PART:
                raise FailedPrecondition("NOT_A_MEMBER", f"the membership is {member.state.name}")
            if member.role is Role.TASK_CREATOR:
                raise FailedPrecondition("CREATOR_STAYS", "the creator of a task always takes part in it")
            changed = replace(member, state=state)
            tx.put_member(changed)
            tx.append(MembershipChanged(task, participant, member.role, state))
            return changed

        if await self._store.look_up(lambda tx: tx.member(task, participant)) is not None:
            self._daily.count_change()
        return await self._store.write(work)


def _check_role_free(member: Member | None, role: Role) -> None:
    if member is None or member.state is MembershipState.REFUSED:
        return
    if member.state in _TAKING_PART or member.role is not role:
        raise AlreadyExists("ROLE_TAKEN", f"the caller is {member.role.name} in this task", role=member.role.name)
    if member.state is MembershipState.LEFT and not member.removed:
        raise FailedPrecondition("STILL_LEAVING", "the stake of the former membership has not been unlocked yet")


def _check_joinable(task: Task, role: Role) -> None:
    if task.state is TaskState.PREPARING:
        raise FailedPrecondition("TASK_NOT_OPEN", "the task has not been opened yet")
    if task.state is TaskState.CLOSED and role is Role.TRAINING_NODE:
        raise FailedPrecondition("TASK_NOT_OPEN", "the task is closed and takes no submissions any more")


def _pending(tx: Reading, member: Member) -> Member | None:
    found = tx.member(member.task, member.participant)
    fits = found is not None and found.state is MembershipState.PENDING and found.role is member.role
    return found if fits else None


def _admit(tx: Writing, member: Member, candidacy: Candidacy) -> Joined:
    pending = _pending(tx, member)
    if pending is None:
        # Somebody else has finished this; the selector's answer was the same to both.
        return Joined(tx.member(member.task, member.participant) or member, candidacy.verdict)
    admitted = replace(
        pending,
        state=MembershipState.ACTIVE,
        locked_micros=candidacy.locked_micros,
        weight=candidacy.weight,
        owner_group=candidacy.owner_group,
    )
    tx.put_member(admitted)
    record_verdict(tx, candidacy.verdict)
    tx.append(
        MembershipChanged(
            admitted.task, admitted.participant, admitted.role, admitted.state, statement=admitted.statement
        )
    )
    return Joined(admitted, candidacy.verdict)


def _refuse(tx: Writing, member: Member, candidacy: Candidacy) -> None:
    if _end_pending(tx, member, MembershipState.REFUSED):
        record_verdict(tx, candidacy.verdict)


def _end_pending(tx: Writing, member: Member, state: MembershipState) -> bool:
    pending = _pending(tx, member)
    if pending is None:
        return False
    tx.put_member(replace(pending, state=state))
    tx.append(MembershipChanged(pending.task, pending.participant, pending.role, state, statement=pending.statement))
    return True


def _has_duties(tx: Reading, member: Member) -> bool:
    task = tx.task(member.task)
    if task is None or task.state in ENDED:
        return False
    if any(a.task == member.task for a in tx.assignments_unended_of(member.participant)):
        return True
    return any(tx.submissions(member.task, state=state, participant=member.participant, limit=1) for state in _UNENDED)
