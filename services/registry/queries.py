"""The questions of `transaction.Reading`, asked in SQL within one session."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import TextClause, func, or_, text
from sqlalchemy import select as sa_select
from sqlmodel import Session, col, select

from services.registry import rows
from services.registry.convert.times import micros_of, moment_of
from services.registry.convert.verdicts import verdict_of
from services.registry.records import (
    Artifact,
    ArtifactUse,
    Assignment,
    AssignmentState,
    Endorsement,
    Evaluation,
    EvaluationVerdict,
    Member,
    MembershipState,
    Participant,
    RejectionReason,
    Round,
    RoundState,
    Submission,
    SubmissionState,
    Task,
    TaskState,
    ValidatorFault,
    Verdict,
)
from services.registry.tables import (
    ArtifactRow,
    ArtifactUseRow,
    AssignmentRow,
    CountersRow,
    DrawReceiptRow,
    EndorsementRow,
    EvaluationRow,
    LeafRow,
    MemberRow,
    NodeRow,
    ParticipantRow,
    PredictionHashesRow,
    RoundRow,
    SubmissionRow,
    TaskRow,
    ValidatorFaultRow,
    VerdictRow,
)
from services.registry.transaction import Leaf
from services.runtime import names
from services.runtime.names import AssignmentId
from tiltyard.transparency import HASH_BYTES, Frontier, Node
from tiltyard.type.v1 import participation_pb2

COUNTERS_ID = 1
_COUNTERS = sa_select(
    col(CountersRow.log_size),
    col(CountersRow.log_frontier),
    col(CountersRow.ledger_position),
    col(CountersRow.assignment_sequence),
    col(CountersRow.alive_time),
).where(col(CountersRow.id) == COUNTERS_ID)
_LEAF_HASHES = sa_select(col(LeafRow.index), col(LeafRow.hash))
_TRACK_RECORD = 10
_PLATFORM_FAULTS = (RejectionReason.VALIDATORS_UNAVAILABLE.name, RejectionReason.TASK_CANCELLED.name)
_UNENDED = (AssignmentState.OFFERED.name, AssignmentState.ACCEPTED.name, AssignmentState.SEALED.name)
_LEASED = (AssignmentState.OFFERED.name, AssignmentState.ACCEPTED.name)
_ENDED = (
    AssignmentState.OPENED.name,
    AssignmentState.DECLINED.name,
    AssignmentState.EXPIRED.name,
    AssignmentState.RELEASED.name,
)


@cache
def _node_hashes(count: int) -> TextClause:
    """The question for so many nodes: SQLite looks up each, where for a list of pairs it would read the whole table."""
    any_of = " OR ".join(f'(level = :l{place} AND "index" = :i{place})' for place in range(count))
    return text(f'SELECT level, "index", hash FROM log_nodes WHERE {any_of}')  # noqa: S608 - placeholders alone


@dataclass
class Counters:
    """What grows: the log with its frontier, the ledger's position, the last sequence, the time last alive."""

    log_size: int = 0
    log_frontier: bytes = b""
    ledger_position: int = 0
    assignment_sequence: int = 0
    alive_time: int | None = None
    stored: bool = False
    """Whether the database has the row already."""


class SessionReading:
    """`transaction.Reading` over a session; what it answers are records, never rows."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def participant(self, participant: str) -> Participant | None:
        row = self._participant_row(participant)
        return None if row is None else rows.PARTICIPANTS.record(row)

    def participants(self, *, after: int, limit: int) -> Sequence[tuple[int, Participant]]:
        query = (
            select(ParticipantRow).where(col(ParticipantRow.position) > after).order_by(col(ParticipantRow.position))
        )
        found = self._session.exec(query.limit(limit))
        return [(row.position or 0, rows.PARTICIPANTS.record(row)) for row in found]

    def endorsements(self, subject: str) -> Sequence[Endorsement]:
        query = select(EndorsementRow).where(EndorsementRow.subject == subject)
        query = query.order_by(col(EndorsementRow.create_time), col(EndorsementRow.endorser), col(EndorsementRow.field))
        return [rows.ENDORSEMENTS.record(row) for row in self._session.exec(query)]

    # Tasks and their members.

    def task(self, task: str) -> Task | None:
        row = self._task_row(task)
        return None if row is None else rows.TASKS.record(row)

    def tasks(
        self, *, before: int | None, limit: int, state: TaskState | None = None, creator: str | None = None
    ) -> Sequence[tuple[int, Task]]:
        query = select(TaskRow).order_by(col(TaskRow.position).desc()).limit(limit)
        if before is not None:
            query = query.where(col(TaskRow.position) < before)
        if state is not None:
            query = query.where(TaskRow.state == state.name)
        if creator is not None:
            query = query.where(TaskRow.creator == creator)
        return [(row.position or 0, rows.TASKS.record(row)) for row in self._session.exec(query)]

    def tasks_in(self, *states: TaskState) -> Sequence[Task]:
        query = select(TaskRow).where(col(TaskRow.state).in_(_names(states))).order_by(col(TaskRow.position))
        return [rows.TASKS.record(row) for row in self._session.exec(query)]

    def tasks_due(self, now: datetime) -> Sequence[Task]:
        query = select(TaskRow).where(col(TaskRow.deadline) <= micros_of(now)).order_by(col(TaskRow.deadline))
        return [rows.TASKS.record(row) for row in self._session.exec(query)]

    def active_validators(self, task: str) -> int:
        return self._session.exec(select(TaskRow.validators).where(TaskRow.id == task)).one_or_none() or 0

    def tasks_ended_with_pool(self) -> Sequence[Task]:
        ended = _names((TaskState.FINAL, TaskState.CANCELLED))
        query = select(TaskRow).where(col(TaskRow.state).in_(ended), col(TaskRow.pool_open))
        return [rows.TASKS.record(row) for row in self._session.exec(query.order_by(col(TaskRow.position)))]

    def member(self, task: str, participant: str) -> Member | None:
        row = self._member_row(task, participant)
        return None if row is None else rows.MEMBERS.record(row)

    def members(self, task: str, *, after: int, limit: int) -> Sequence[tuple[int, Member]]:
        query = select(MemberRow).where(MemberRow.task == task, col(MemberRow.position) > after)
        found = self._session.exec(query.order_by(col(MemberRow.position)).limit(limit))
        return [(row.position or 0, rows.MEMBERS.record(row)) for row in found]

    def all_members(self, task: str) -> Sequence[Member]:
        query = select(MemberRow).where(MemberRow.task == task).order_by(col(MemberRow.position))
        return [rows.MEMBERS.record(row) for row in self._session.exec(query)]

    def members_in(self, state: MembershipState, *, removed: bool) -> Sequence[Member]:
        query = select(MemberRow).where(MemberRow.state == state.name, MemberRow.removed == removed)
        return [rows.MEMBERS.record(row) for row in self._session.exec(query.order_by(col(MemberRow.position)))]

    def verdicts(self, task: str, *, after: int, limit: int) -> Sequence[tuple[int, Verdict]]:
        query = select(VerdictRow).where(VerdictRow.task == task, col(VerdictRow.position) > after)
        found = self._session.exec(query.order_by(col(VerdictRow.position)).limit(limit))
        return [
            (row.position or 0, verdict_of(participation_pb2.EligibilityVerdict.FromString(row.verdict)))
            for row in found
        ]

    # Submissions.

    def submission(self, task: str, number: int) -> Submission | None:
        row = self._session.get(SubmissionRow, (task, number))
        return None if row is None else rows.SUBMISSIONS.record(row)

    def submissions(
        self,
        task: str,
        *,
        after: int = 0,
        limit: int | None = None,
        state: SubmissionState | None = None,
        participant: str | None = None,
    ) -> Sequence[Submission]:
        query = select(SubmissionRow).where(SubmissionRow.task == task, SubmissionRow.number > after)
        if state is not None:
            query = query.where(SubmissionRow.state == state.name)
        if participant is not None:
            query = query.where(SubmissionRow.participant == participant)
        query = query.order_by(col(SubmissionRow.number)).limit(limit)
        return [rows.SUBMISSIONS.record(row) for row in self._session.exec(query)]

    def submissions_in(self, *states: SubmissionState) -> Sequence[Submission]:
        query = select(SubmissionRow).where(col(SubmissionRow.state).in_(_names(states)))
        query = query.order_by(col(SubmissionRow.commit_time), col(SubmissionRow.task), col(SubmissionRow.number))
        return [rows.SUBMISSIONS.record(row) for row in self._session.exec(query)]

    def submissions_with_digest(self, task: str, model_digest: bytes) -> Sequence[Submission]:
        query = select(SubmissionRow).where(SubmissionRow.task == task, SubmissionRow.model_digest == model_digest)
        return [rows.SUBMISSIONS.record(row) for row in self._session.exec(query.order_by(col(SubmissionRow.number)))]

    def count_submissions(self, task: str, participant: str, *, since: datetime) -> int:
        counted = self._counted(task, participant, since)
        return self._session.exec(select(func.count()).select_from(SubmissionRow).where(*counted)).one()

    def oldest_submission_since(self, task: str, participant: str, *, since: datetime) -> datetime | None:
        counted = self._counted(task, participant, since)
        oldest = self._session.exec(select(func.min(SubmissionRow.commit_time)).where(*counted)).one()
        return None if oldest is None else moment_of(oldest)

    def _counted(self, task: str, participant: str, since: datetime) -> Sequence[Any]:
        return (
            SubmissionRow.task == task,
            SubmissionRow.participant == participant,
            SubmissionRow.commit_time >= micros_of(since),
            or_(col(SubmissionRow.reason).is_(None), col(SubmissionRow.reason).not_in(_PLATFORM_FAULTS)),
        )

    def track_record(self, participant: str, *, outside_owner_group_of: str) -> Sequence[str]:
        inside = self._owner_group(outside_owner_group_of)
        scored = (
            select(SubmissionRow.commit_time, SubmissionRow.task, SubmissionRow.number)
            .join(TaskRow, col(TaskRow.id) == col(SubmissionRow.task))
            .where(SubmissionRow.participant == participant, SubmissionRow.state == SubmissionState.SCORED.name)
            .where(col(TaskRow.creator).not_in(inside))
            .order_by(col(SubmissionRow.commit_time).desc())
            .limit(_TRACK_RECORD)
        )
        agreed = (
            select(EvaluationRow.seal_time, EvaluationRow.task, EvaluationRow.number, EvaluationRow.round)
            .join(TaskRow, col(TaskRow.id) == col(EvaluationRow.task))
            .where(EvaluationRow.validator == participant, EvaluationRow.verdict == EvaluationVerdict.AGREED.name)
            .where(col(TaskRow.creator).not_in(inside))
            .order_by(col(EvaluationRow.seal_time).desc())
            .limit(_TRACK_RECORD)
        )
        found = [(time, names.format_submission(task, number)) for time, task, number in self._session.exec(scored)]
        for time, task, number, round_ in self._session.exec(agreed):
            found.append((time, names.format_evaluation(AssignmentId(task, number, round_, participant))))
        found.sort(reverse=True)
        return [name for _, name in found[:_TRACK_RECORD]]

    def _owner_group(self, participant: str) -> set[str]:
        row = self._participant_row(participant)
        owner = None if row is None else row.owner
        group = {participant, owner or participant}
        query = select(ParticipantRow.id).where(col(ParticipantRow.owner).in_(sorted(group)))
        return group | set(self._session.exec(query))

    def submissions_due(self, state: SubmissionState, now: datetime) -> Sequence[Submission]:
        query = select(SubmissionRow).where(SubmissionRow.state == state.name)
        query = query.where(col(SubmissionRow.deadline) <= micros_of(now)).order_by(col(SubmissionRow.deadline))
        return [rows.SUBMISSIONS.record(row) for row in self._session.exec(query)]

    def submissions_unchecked(self) -> Sequence[Submission]:
        query = select(SubmissionRow).where(SubmissionRow.state == SubmissionState.REVEALED.name)
        query = query.where(col(SubmissionRow.structure_checked).is_(False))
        query = query.order_by(col(SubmissionRow.commit_time), col(SubmissionRow.task), col(SubmissionRow.number))
        return [rows.SUBMISSIONS.record(row) for row in self._session.exec(query)]

    def public_best(self, task: str, participant: str) -> int | None:
        query = select(func.max(SubmissionRow.public_best)).where(SubmissionRow.task == task)
        return self._session.exec(query.where(SubmissionRow.participant == participant)).one()

    def submissions_hidden(self, task: str, *, limit: int) -> Sequence[Submission]:
        query = select(SubmissionRow).where(SubmissionRow.task == task, col(SubmissionRow.hidden).is_(True))
        query = query.order_by(col(SubmissionRow.number)).limit(limit)
        return [rows.SUBMISSIONS.record(row) for row in self._session.exec(query)]

    def submissions_without_round(self, task: str, round_: int) -> Sequence[Submission]:
        judged = select(RoundRow.number).where(
            RoundRow.task == task, RoundRow.number == SubmissionRow.number, RoundRow.round == round_
        )
        query = select(SubmissionRow).where(SubmissionRow.task == task, ~judged.exists())
        query = query.where(SubmissionRow.state == SubmissionState.SCORED.name).order_by(col(SubmissionRow.number))
        return [rows.SUBMISSIONS.record(row) for row in self._session.exec(query)]

    # Rounds, assignments, evaluations.

    def round(self, task: str, number: int, round_: int) -> Round | None:
        row = self._session.get(RoundRow, (task, number, round_))
        return None if row is None else rows.ROUNDS.record(row)

    def rounds_unconcluded(self) -> Sequence[Round]:
        query = select(RoundRow).where(RoundRow.state != RoundState.CONCLUDED.name)
        query = query.order_by(col(RoundRow.deadline), col(RoundRow.task), col(RoundRow.number))
        return [rows.ROUNDS.record(row) for row in self._session.exec(query)]

    def rounds_touched(self, state: RoundState, *, after: int) -> Sequence[Round]:
        query = select(RoundRow).where(RoundRow.state == state.name, RoundRow.touched > after)
        return [rows.ROUNDS.record(row) for row in self._session.exec(query.order_by(col(RoundRow.touched)))]

    def rounds_due(self, state: RoundState, now: datetime) -> Sequence[Round]:
        query = select(RoundRow).where(RoundRow.state == state.name, RoundRow.deadline <= micros_of(now))
        return [rows.ROUNDS.record(row) for row in self._session.exec(query.order_by(col(RoundRow.deadline)))]

    def rounds_unconcluded_in(self, task: str, round_: int) -> bool:
        query = select(RoundRow.number).where(RoundRow.task == task, RoundRow.round == round_)
        query = query.where(RoundRow.state != RoundState.CONCLUDED.name)
        return self._session.exec(query.limit(1)).first() is not None

    def assignment(self, task: str, number: int, round_: int, validator: str) -> Assignment | None:
        row = self._session.get(AssignmentRow, (task, number, round_, validator))
        return None if row is None else rows.ASSIGNMENTS.record(row)

    def assignments(self, task: str, number: int, round_: int | None = None) -> Sequence[Assignment]:
        query = select(AssignmentRow).where(AssignmentRow.task == task, AssignmentRow.number == number)
        if round_ is not None:
            query = query.where(AssignmentRow.round == round_)
        return self._assignments(query.order_by(col(AssignmentRow.round), col(AssignmentRow.position)))

    def assignments_of(self, validator: str, *, after: int, limit: int) -> Sequence[Assignment]:
        query = select(AssignmentRow).where(AssignmentRow.validator == validator, AssignmentRow.sequence > after)
        return self._assignments(query.order_by(col(AssignmentRow.sequence)).limit(limit))

    def assignment_sequence(self) -> int:
        return self._counters().assignment_sequence

    def assignments_unended_of(self, validator: str) -> Sequence[Assignment]:
        query = select(AssignmentRow).where(AssignmentRow.validator == validator)
        query = query.where(col(AssignmentRow.state).in_(_UNENDED))
        return self._assignments(query.order_by(col(AssignmentRow.sequence)))

    def assignments_due(self, now: datetime) -> Sequence[Assignment]:
        query = select(AssignmentRow).where(col(AssignmentRow.state).in_(_LEASED))
        query = query.where(col(AssignmentRow.deadline) <= micros_of(now))
        return self._assignments(query.order_by(col(AssignmentRow.deadline), col(AssignmentRow.sequence)))

    def assignments_running(self, since: datetime) -> Sequence[Assignment]:
        query = select(AssignmentRow).where(col(AssignmentRow.state).in_(_UNENDED))
        query = query.where(col(AssignmentRow.deadline) > micros_of(since))
        return self._assignments(query.order_by(col(AssignmentRow.sequence)))

    def assignments_unsettled(self, *, task: str | None = None, limit: int | None = None) -> Sequence[Assignment]:
        query = select(AssignmentRow).where(col(AssignmentRow.settled).is_(False))
        query = query.where(col(AssignmentRow.state).in_(_ENDED))
        if task is not None:
            query = query.where(AssignmentRow.task == task)
        return self._assignments(query.order_by(col(AssignmentRow.sequence)).limit(limit))

    def _assignments(self, query: Any) -> list[Assignment]:
        return [rows.ASSIGNMENTS.record(row) for row in self._session.exec(query)]

    def evaluation(self, task: str, number: int, round_: int, validator: str) -> Evaluation | None:
        row = self._session.get(EvaluationRow, (task, number, round_, validator))
        return None if row is None else rows.EVALUATIONS.record(row)

    def evaluations(self, task: str, number: int, round_: int | None = None) -> Sequence[Evaluation]:
        query = select(EvaluationRow).where(EvaluationRow.task == task, EvaluationRow.number == number)
        if round_ is not None:
            query = query.where(EvaluationRow.round == round_)
        query = query.order_by(col(EvaluationRow.round), col(EvaluationRow.validator))
        return [rows.EVALUATIONS.record(row) for row in self._session.exec(query)]

    def prediction_hashes(self, root: str, blocks: int) -> bytes:
        row = self._session.get(PredictionHashesRow, (root, blocks))
        return b"" if row is None else row.hashes

    def validator_faults(
        self, *, task: str | None, validator: str | None, after: int, limit: int
    ) -> Sequence[tuple[int, ValidatorFault]]:
        query = select(ValidatorFaultRow).where(col(ValidatorFaultRow.position) > after)
        if task is not None:
            query = query.where(ValidatorFaultRow.task == task)
        if validator is not None:
            query = query.where(ValidatorFaultRow.validator == validator)
        found = self._session.exec(query.order_by(col(ValidatorFaultRow.position)).limit(limit))
        return [(row.position or 0, rows.VALIDATOR_FAULTS.record(row)) for row in found]

    def faults_unslashed(self, *, limit: int) -> Sequence[tuple[int, ValidatorFault]]:
        query = select(ValidatorFaultRow).where(col(ValidatorFaultRow.slashed).is_(False))
        found = self._session.exec(query.order_by(col(ValidatorFaultRow.position)).limit(limit))
        return [(row.position or 0, rows.VALIDATOR_FAULTS.record(row)) for row in found]

    def draw_receipt(self, draw: str) -> bytes | None:
        row = self._session.get(DrawReceiptRow, draw)
        return None if row is None else row.receipt

    # Artifacts.

    def artifact(self, sha256: str) -> Artifact | None:
        row = self._session.get(ArtifactRow, sha256)
        return None if row is None else rows.ARTIFACTS.record(row)

    def artifact_uses(self, sha256: str) -> Sequence[ArtifactUse]:
        query = select(ArtifactUseRow).where(ArtifactUseRow.sha256 == sha256)
        query = query.order_by(col(ArtifactUseRow.task), col(ArtifactUseRow.purpose), col(ArtifactUseRow.number))
        return [rows.ARTIFACT_USES.record(row) for row in self._session.exec(query)]

    def artifacts_of(self, owner: str) -> Sequence[tuple[ArtifactUse, int]]:
        query = select(ArtifactUseRow, ArtifactRow.size_bytes).where(ArtifactUseRow.owner == owner)
        query = query.join(ArtifactRow, col(ArtifactRow.sha256) == col(ArtifactUseRow.sha256))
        return [(rows.ARTIFACT_USES.record(row), size) for row, size in self._session.exec(query)]

    def artifacts_with(self, prefix: str) -> Sequence[str]:
        # Digests are hex: `g` is after each of them.
        query = select(ArtifactRow.sha256).where(ArtifactRow.sha256 >= prefix, ArtifactRow.sha256 < f"{prefix}g")
        return self._session.exec(query).all()

    # The record log.

    def ledger_position(self) -> int:
        return self._counters().ledger_position

    def alive_time(self) -> datetime | None:
        alive = self._counters().alive_time
        return None if alive is None else moment_of(alive)

    def log_size(self) -> int:
        return self._counters().log_size

    def leaves(self, *, start: int, limit: int) -> Sequence[Leaf]:
        query = select(LeafRow).where(LeafRow.index >= start).order_by(col(LeafRow.index)).limit(limit)
        return [Leaf(row.index, row.hash, row.entry) for row in self._session.exec(query)]

    def log_root(self) -> tuple[int, bytes]:
        frontier = self._frontier()
        return frontier.size, frontier.root()

    def log_node(self, level: int, index: int) -> bytes:
        row = self._session.get(NodeRow, (level, index)) if level else self._session.get(LeafRow, index)
        if row is None:
            raise LookupError(f"the log has no complete subtree {index} at level {level}")
        return row.hash

    def log_nodes(self, nodes: Collection[Node]) -> Mapping[Node, bytes]:
        # Past the unit of work, in two questions: a proof from a million leaves takes twenty nodes.
        connection = self._session.connection()
        leaves = [index for level, index in nodes if level == 0]
        above = [node for node in nodes if node[0]]
        found: dict[Node, bytes] = {}
        if leaves:
            for index, value in connection.execute(_LEAF_HASHES.where(col(LeafRow.index).in_(leaves))):
                found[0, index] = value
        if above:
            wanted = {
                f"{name}{place}": n for place, node in enumerate(above) for name, n in zip("li", node, strict=True)
            }
            for level, index, value in connection.execute(_node_hashes(len(above)), wanted):
                found[level, index] = value
        for level, index in nodes:
            if (level, index) not in found:
                raise LookupError(f"the log has no complete subtree {index} at level {level}")
        return found

    def next_deadline(self) -> datetime | None:
        committed = SubmissionState.COMMITTED.name
        unchecked = SubmissionState.REVEALED.name
        moments: Iterable[int | None] = (
            self._session.exec(select(func.min(TaskRow.deadline))).one(),
            self._session.exec(select(func.min(SubmissionRow.deadline)).where(SubmissionRow.state == committed)).one(),
            self._session.exec(
                select(func.min(SubmissionRow.deadline)).where(
                    SubmissionRow.state == unchecked, col(SubmissionRow.structure_checked).is_(False)
                )
            ).one(),
            # One by one: each is then the first entry of an index.
            *(
                self._session.exec(select(func.min(RoundRow.deadline)).where(RoundRow.state == state.name)).one()
                for state in (RoundState.WAITING, RoundState.SEALING, RoundState.OPENING)
            ),
            *(
                self._session.exec(select(func.min(AssignmentRow.deadline)).where(AssignmentRow.state == state)).one()
                for state in _LEASED
            ),
        )
        known = [micros for micros in moments if micros is not None]
        return moment_of(min(known)) if known else None

    # Rows, for the writing half.

    def _participant_row(self, participant: str) -> ParticipantRow | None:
        return self._session.exec(select(ParticipantRow).where(ParticipantRow.id == participant)).one_or_none()

    def _task_row(self, task: str) -> TaskRow | None:
        return self._session.exec(select(TaskRow).where(TaskRow.id == task)).one_or_none()

    def _member_row(self, task: str, participant: str) -> MemberRow | None:
        query = select(MemberRow).where(MemberRow.task == task, MemberRow.participant == participant)
        return self._session.exec(query).one_or_none()

    def _counters(self) -> Counters:
        # Asked in Core: every write needs it, and the unit of work costs more than the question.
        row = self._session.connection().execute(_COUNTERS).one_or_none()
        return Counters() if row is None else Counters(*row, stored=True)

    def _frontier(self) -> Frontier:
        counters = self._counters()
        kept = counters.log_frontier
        return Frontier(counters.log_size, [kept[at : at + HASH_BYTES] for at in range(0, len(kept), HASH_BYTES)])


def _names(states: Iterable[Any]) -> list[str]:
    return [state.name for state in states]
