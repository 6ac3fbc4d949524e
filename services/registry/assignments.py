"""Duties of validators as leases: offered, accepted with a token, renewed while work goes on, or given back."""

import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from services.registry.duty_watch import Told, tell, told_all
from services.registry.records import Assignment, Round, Submission, Task
from services.registry.rounds import FIRST_ROUND, end_assignment, log_assignment
from services.registry.states import AssignmentState, MembershipState, Metric, ModelFormat, Role, RoundState
from services.registry.task_config import DatasetDigest, Limits
from services.registry.transaction import Changes, Reading, Store, Writing
from services.registry.watching import watch
from services.runtime.errors import AlreadyExists, FailedPrecondition, NotFound, PermissionDenied, Unavailable
from services.runtime.names import AssignmentId
from tiltyard.commitments import matches
from tiltyard.modelspec import ModelSpec

_WATCH_PAGE = 1000


@dataclass(frozen=True)
class EvaluationOrder:
    """All that a lease holder needs to evaluate."""

    dataset: DatasetDigest
    model_sha256: str
    model_size_bytes: int
    format: ModelFormat
    spec: ModelSpec
    limits: Limits
    metric: Metric
    top_k: int
    bound: float
    node: str
    node_endpoint: str


@dataclass(frozen=True)
class Lease:
    """An accepted assignment with its token and what is to be done."""

    assignment: Assignment
    order: EvaluationOrder


class Assignments:
    """Hands out duties, to their validator alone."""

    def __init__(self, store: Store, changes: Changes) -> None:
        self._store = store
        self._changes = changes

    async def watch(self, caller: str, *, after: Told | None) -> AsyncIterator[tuple[Assignment, Told]]:
        """The caller's assignments that have not ended, then each change, without end; each with what is told by then.

        With `after` only what is not told yet. What comes together is in turn by task. Several changes of one
        assignment in a short time may show as the last of them.
        """
        told = after or Told()
        if after is None:
            begun, unended = await self._store.read(
                lambda tx: (tx.assignment_sequence(), tx.assignments_unended_of(caller))
            )
            told = Told(begun=begun)
            for watched in tell(unended, told, reach=begun):
                yield watched
            told = told_all(told, reach=begun)

        async def changed() -> Sequence[Assignment]:
            return await self._store.read(lambda tx: tx.assignments_of(caller, after=told.seen, limit=_WATCH_PAGE))

        async for page in watch(self._changes, f"validators/{caller}", changed):
            reach = max((assignment.sequence for assignment in page), default=told.seen)
            for watched in tell(page, told, reach=reach):
                yield watched
            told = told_all(told, reach=reach)

    async def page(
        self, caller: str, submission: tuple[str, int] | None, *, after: tuple[int, int], limit: int
    ) -> Sequence[Assignment]:
        """The assignments of a submission by round and position, or the caller's over all tasks by their last change.

        Those beyond `after`: round and position in a submission, 0 and the sequence over all tasks.
        """

        def read(tx: Reading) -> Sequence[Assignment]:
            if submission is None:
                return tx.assignments_of(caller, after=max(0, after[1]), limit=limit)
            task, number = submission
            if tx.submission(task, number) is None:
                raise NotFound("SUBMISSION_NOT_FOUND", f"task {task} has no submission {number}")
            return [a for a in tx.assignments(task, number) if (a.round, a.position) > after][:limit]

        return await self._store.read(read)

    async def accept(self, caller: str, assignment: AssignmentId, *, holder: bytes) -> Lease:
        """Take the lease, or get it again as the same holder; `holder` is a secret of 32 bytes."""
        token = secrets.token_urlsafe(32)
        # The hash is enough to know the holder again.
        holder_hash = hashlib.sha256(holder).digest()

        def write(tx: Writing) -> Lease:
            found = own_assignment(tx, assignment, caller)
            round_, task, submission = _surroundings(tx, found)
            running = found.deadline is not None and tx.now < found.deadline
            if not running or found.state not in (AssignmentState.OFFERED, AssignmentState.ACCEPTED):
                raise ended(found)
            _check_joined(tx, found)
            held = found.state is AssignmentState.ACCEPTED
            if held and not matches(found.lease_holder, holder_hash):
                raise AlreadyExists("LEASE_HELD", "the lease is held by another process of this validator")
            leased = tx.put_assignment(
                replace(
                    found,
                    state=AssignmentState.ACCEPTED,
                    deadline=_lease_end(tx, task, round_),
                    lease_token=found.lease_token if held else token,
                    lease_holder=holder_hash,
                    update_time=tx.now,
                )
            )
            if not held:
                log_assignment(tx, leased)
            return Lease(leased, _order(tx, task, submission, leased.round))

        return await self._store.write(write, quick=True)

    async def renew(self, caller: str, assignment: AssignmentId, *, token: str) -> Assignment:
        """Prolong a running lease by the task's lease time, never beyond the deadline of the round."""

        def write(tx: Writing) -> Assignment:
            found = own_assignment(tx, assignment, caller)
            check_lease(tx, found, token)
            round_, task, _ = _surroundings(tx, found)
            return tx.put_assignment(replace(found, deadline=_lease_end(tx, task, round_), update_time=tx.now))

        return await self._store.write(write, quick=True)

    async def decline(self, caller: str, assignment: AssignmentId, *, token: str) -> Assignment:
        """Give a duty back that was offered, or whose lease the caller holds."""

        def write(tx: Writing) -> Assignment:
            found = own_assignment(tx, assignment, caller)
            if found.state is AssignmentState.ACCEPTED:
                check_lease(tx, found, token)
            elif found.state is not AssignmentState.OFFERED:
                raise ended(found)
            return end_assignment(tx, found, AssignmentState.DECLINED)

        return await self._store.write(write, quick=True)


def own_assignment(tx: Reading, assignment: AssignmentId, caller: str) -> Assignment:
    """The caller's assignment. Raises PermissionDenied for another's, whether it is there or not."""
    if assignment.participant != caller:
        raise PermissionDenied("NOT_YOUR_ASSIGNMENT", "the assignment is another validator's")
    found = tx.assignment(assignment.task, assignment.number, assignment.round, assignment.participant)
    if found is None:
        raise NotFound("ASSIGNMENT_NOT_FOUND", "there is no such assignment")
    return found


def _check_joined(tx: Reading, assignment: Assignment) -> None:
    """Raises Unavailable while the record log does not say that the validator takes part, FailedPrecondition for none.

    The selector draws from its pool, which a validator enters a moment before its membership is in the log.
    """
    member = tx.member(assignment.task, assignment.validator)
    if member is None or member.role is not Role.VALIDATOR or member.state is MembershipState.REFUSED:
        raise FailedPrecondition("NOT_A_MEMBER", f"the caller is no validator of task {assignment.task}: join it again")
    if member.state is MembershipState.PENDING:
        raise Unavailable("STILL_JOINING", "the caller's membership has not been confirmed yet, try again")


def check_lease(tx: Writing, assignment: Assignment, token: str) -> None:
    """Raises FailedPrecondition unless a lease is running, PermissionDenied unless `token` is its token."""
    if assignment.state is AssignmentState.OFFERED or not assignment.lease_token:
        raise FailedPrecondition("NO_LEASE", f"the assignment is {assignment.state.name} and was never accepted")
    if not matches(assignment.lease_token.encode(), token.encode()):
        raise PermissionDenied("WRONG_LEASE_TOKEN", "the token is not that of the lease")
    late = assignment.deadline is None or tx.now >= assignment.deadline
    if assignment.state is not AssignmentState.ACCEPTED or late:
        raise FailedPrecondition(
            "LEASE_LOST", f"the lease is over, the assignment is {assignment.state.name}", state=assignment.state.name
        )


def ended(assignment: Assignment) -> FailedPrecondition:
    """The answer to whoever comes too late."""
    state = assignment.state.name
    return FailedPrecondition("ASSIGNMENT_ENDED", f"the assignment is {state}, or its time is over", state=state)


def _surroundings(tx: Reading, assignment: Assignment) -> tuple[Round, Task, Submission]:
    round_ = tx.round(assignment.task, assignment.number, assignment.round)
    task, submission = tx.task(assignment.task), tx.submission(assignment.task, assignment.number)
    if round_ is None or task is None or submission is None:
        raise LookupError(f"the assignment of {assignment.validator} has no round")
    if round_.state is not RoundState.SEALING:
        raise ended(assignment)
    return round_, task, submission


def _lease_end(tx: Writing, task: Task, round_: Round) -> datetime:
    return min(tx.now + task.config.schedule.lease_time, round_.deadline)


def _order(tx: Writing, task: Task, submission: Submission, round_: int) -> EvaluationOrder:
    dataset = dataset_of(task, round_)
    if submission.format is None:
        raise LookupError(f"submission {submission.number} of {task.id} has not been revealed")
    return EvaluationOrder(
        dataset=dataset,
        model_sha256=submission.model_digest.hex(),
        model_size_bytes=submission.size_bytes,
        format=submission.format,
        spec=task.config.models[submission.model_index],
        limits=task.config.limits,
        metric=task.config.metric,
        top_k=task.config.top_k,
        bound=task.config.bound,
        node=submission.participant,
        node_endpoint=_endpoint_of(tx, submission.participant) if task.config.allow_node_endpoint else "",
    )


def _endpoint_of(tx: Writing, participant: str) -> str:
    known = tx.participant(participant)
    return "" if known is None else known.endpoint


def dataset_of(task: Task, round_: int) -> DatasetDigest:
    """The evaluation dataset of a round: D_eval in the first, the holdout in the second."""
    dataset = task.config.evaluation_dataset if round_ == FIRST_ROUND else task.config.holdout
    if dataset is None:
        raise LookupError(f"task {task.id} has no dataset for round {round_}")
    return dataset
