"""The registry's store: works of the domain as transactions, states and leaves changed together."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import bindparam, insert, update
from sqlmodel import Session, SQLModel, col, select

from services.registry import rows
from services.registry.changes import ChangeBoard
from services.registry.convert.times import micros_of
from services.registry.convert.verdicts import verdict_message
from services.registry.entries import Entry
from services.registry.leaves import leaf_bytes
from services.registry.queries import COUNTERS_ID, Counters, SessionReading
from services.registry.records import (
    Artifact,
    ArtifactUse,
    Assignment,
    Endorsement,
    Evaluation,
    Member,
    MembershipState,
    Participant,
    Role,
    Round,
    Submission,
    Task,
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
    NodeRow,
    PredictionHashesRow,
    RoundRow,
    SubmissionRow,
    TaskRow,
    ValidatorFaultRow,
    VerdictRow,
)
from services.registry.task_states import deadline_of
from services.registry.transaction import Leaf, Reading, Writing
from services.runtime.database import Database
from tiltyard.transparency import Frontier, Node, leaf_hash

T = TypeVar("T")

_TOUCH = (
    update(RoundRow)
    .where(
        col(RoundRow.task) == bindparam("of_task"),
        col(RoundRow.number) == bindparam("of_number"),
        col(RoundRow.round) == bindparam("of_round"),
    )
    .values(touched=bindparam("sequence"))
)


class SessionWriting(SessionReading):
    """`transaction.Writing` over a session. `close` puts the counters back: call it when the work is done."""

    def __init__(self, session: Session, now: datetime) -> None:
        super().__init__(session)
        self._now = now
        self._own_counters: Counters | None = None
        self._new_leaves: list[dict[str, Any]] = []
        self._new_nodes: list[dict[str, Any]] = []
        self._own_frontier: Frontier | None = None
        self._touched: dict[tuple[str, int, int], int] = {}
        self.topics: set[str] = set()

    @property
    def now(self) -> datetime:
        return self._now

    def append(self, entry: Entry) -> Leaf:
        frontier = self._frontier()
        data = leaf_bytes(entry, self._now)
        leaf = Leaf(frontier.size, leaf_hash(data), data)
        for (level, index), value in frontier.append(leaf.hash)[1:]:
            self._new_nodes.append({"level": level, "index": index, "hash": value})
        self._new_leaves.append({"index": leaf.index, "hash": leaf.hash, "entry": data})
        return leaf

    def put_participant(self, participant: Participant) -> None:
        row = self._participant_row(participant.id)
        if row is None:
            self._session.add(rows.PARTICIPANTS.row(participant))
        else:
            rows.PARTICIPANTS.update(row, participant)

    def put_endorsement(self, endorsement: Endorsement) -> None:
        key = (endorsement.subject, endorsement.endorser, endorsement.field)
        self._put(rows.ENDORSEMENTS, EndorsementRow, key, endorsement)

    def delete_endorsement(self, endorser: str, subject: str, field: str) -> bool:
        row = self._session.get(EndorsementRow, (subject, endorser, field))
        if row is None:
            return False
        self._session.delete(row)
        return True

    def put_task(self, task: Task) -> Task:
        row = self._task_row(task.id)
        deadline = deadline_of(task)
        due = None if deadline is None else micros_of(deadline)
        columns = rows.TASKS.columns(task)
        if row is None:
            row = TaskRow(**{**columns, "deadline": due})
            self._session.add(row)
        else:
            # The counters are the row's own: the caller's may be from before another member joined.
            for name in ("revision", "training_nodes", "validators", "submissions"):
                columns.pop(name)
            for name, value in columns.items():
                setattr(row, name, value)
            row.deadline = due
        self._bump(row)
        return rows.TASKS.record(row)

    def touch_task(self, task: str) -> None:
        row = self._task_row(task)
        if row is not None:
            self._bump(row)

    def _bump(self, row: TaskRow) -> None:
        row.revision += 1
        row.update_time = micros_of(self._now)
        self.topics.add(f"tasks/{row.id}")

    def put_member(self, member: Member) -> None:
        row = self._member_row(member.task, member.participant)
        before = None if row is None else rows.MEMBERS.record(row)
        if row is None:
            self._session.add(rows.MEMBERS.row(member))
        else:
            rows.MEMBERS.update(row, member)
        task = self._task_row(member.task)
        if task is None:
            return
        for role, column in ((Role.TRAINING_NODE, "training_nodes"), (Role.VALIDATOR, "validators")):
            change = int(_counts_as(member, role)) - int(_counts_as(before, role))
            setattr(task, column, getattr(task, column) + change)
        self._bump(task)

    def put_verdict(self, verdict: Verdict) -> None:
        message = verdict_message(verdict).SerializeToString(deterministic=True)
        self._session.add(VerdictRow(task=verdict.task, verdict=message))

    def next_submission_number(self, task: str) -> int:
        row = self._task_row(task)
        if row is None:
            raise LookupError(f"there is no task {task}")
        row.submissions += 1
        return row.submissions

    def put_submission(self, submission: Submission) -> None:
        self._put(rows.SUBMISSIONS, SubmissionRow, (submission.task, submission.number), submission)
        self.touch_task(submission.task)

    def put_round(self, round_: Round) -> None:
        self._put(rows.ROUNDS, RoundRow, (round_.task, round_.number, round_.round), round_)
        self._touch_round(round_.task, round_.number, round_.round)

    def _touch_round(self, task: str, number: int, round_: int) -> int:
        """Tell the background loop that a round is worth a look; the new sequence."""
        counters = self._counters()
        counters.assignment_sequence += 1
        self._touched[task, number, round_] = counters.assignment_sequence
        return counters.assignment_sequence

    def put_assignment(self, assignment: Assignment) -> Assignment:
        key = (assignment.task, assignment.number, assignment.round, assignment.validator)
        row = self._put(rows.ASSIGNMENTS, AssignmentRow, key, assignment)
        row.sequence = self._touch_round(assignment.task, assignment.number, assignment.round)
        row.update_time = micros_of(self._now)
        self.topics.add(f"validators/{assignment.validator}")
        return rows.ASSIGNMENTS.record(row)

    def put_evaluation(self, evaluation: Evaluation) -> None:
        key = (evaluation.task, evaluation.number, evaluation.round, evaluation.validator)
        self._put(rows.EVALUATIONS, EvaluationRow, key, evaluation)
        self._touch_round(evaluation.task, evaluation.number, evaluation.round)

    def put_prediction_hashes(self, root: str, blocks: int, hashes: bytes) -> None:
        if self._session.get(PredictionHashesRow, (root, blocks)) is None:
            self._session.add(PredictionHashesRow(root=root, blocks=blocks, hashes=hashes))

    def put_validator_fault(self, fault: ValidatorFault, *, costs_stake: bool) -> None:
        self._session.add(rows.VALIDATOR_FAULTS.row(fault, slashed=False if costs_stake else None))

    def note_slashed(self, position: int) -> None:
        row = self._session.get(ValidatorFaultRow, position)
        if row is not None:
            row.slashed = True

    def put_draw_receipt(self, draw: str, receipt: bytes) -> None:
        row = self._session.get(DrawReceiptRow, draw)
        if row is None:
            self._session.add(DrawReceiptRow(draw=draw, receipt=receipt))
        else:
            row.receipt = receipt

    def put_artifact(self, artifact: Artifact) -> None:
        self._put(rows.ARTIFACTS, ArtifactRow, artifact.sha256, artifact)

    def put_artifact_use(self, use: ArtifactUse) -> None:
        key = (use.sha256, use.task, use.purpose.name, use.number, use.owner)
        self._put(rows.ARTIFACT_USES, ArtifactUseRow, key, use)

    def delete_artifact(self, sha256: str) -> None:
        for use in self._session.exec(select(ArtifactUseRow).where(ArtifactUseRow.sha256 == sha256)):
            self._session.delete(use)
        row = self._session.get(ArtifactRow, sha256)
        if row is not None:
            self._session.delete(row)

    def set_ledger_position(self, sequence: int) -> None:
        self._counters().ledger_position = sequence

    def set_alive_time(self, time: datetime) -> None:
        self._counters().alive_time = micros_of(time)

    def close(self) -> None:
        """Put back what was kept in memory."""
        self._insert_log()
        self._update_touched()
        if self._own_counters is None:
            return
        values = asdict(self._own_counters)
        stored = values.pop("stored")
        if self._own_frontier is not None:
            values |= {"log_size": self._own_frontier.size, "log_frontier": b"".join(self._own_frontier.hashes)}
        connection = self._session.connection()
        if stored:
            connection.execute(update(CountersRow).where(col(CountersRow.id) == COUNTERS_ID).values(values))
        else:
            connection.execute(insert(CountersRow).values(id=COUNTERS_ID, **values))

    def _insert_log(self) -> None:
        for table, new in ((LeafRow, self._new_leaves), (NodeRow, self._new_nodes)):
            if new:
                self._session.connection().execute(insert(table), new)
                new.clear()

    def _update_touched(self) -> None:
        if not self._touched:
            return
        # The rows of new rounds first.
        self._session.flush()
        touched = [
            {"of_task": task, "of_number": number, "of_round": round_, "sequence": sequence}
            for (task, number, round_), sequence in self._touched.items()
        ]
        self._session.connection().execute(_TOUCH, touched)

    def leaves(self, *, start: int, limit: int) -> Sequence[Leaf]:
        self._insert_log()
        return super().leaves(start=start, limit=limit)

    def log_node(self, level: int, index: int) -> bytes:
        self._insert_log()
        return super().log_node(level, index)

    def log_nodes(self, nodes: Collection[Node]) -> Mapping[Node, bytes]:
        self._insert_log()
        return super().log_nodes(nodes)

    def _put(self, kind: Any, table: type[SQLModel], key: Any, record: Any) -> Any:
        row = self._session.get(table, key)
        if row is None:
            row = kind.row(record)
            self._session.add(row)
        else:
            kind.update(row, record)
        return row

    def _counters(self) -> Counters:
        if self._own_counters is None:
            self._own_counters = super()._counters()
        return self._own_counters

    def _frontier(self) -> Frontier:
        if self._own_frontier is None:
            self._own_frontier = super()._frontier()
        return self._own_frontier

    def log_size(self) -> int:
        return self._frontier().size


def _counts_as(member: Member | None, role: Role) -> bool:
    return member is not None and member.role is role and member.state is MembershipState.ACTIVE


class SqlStore:
    """`transaction.Store` over the process's database; announces what a committed work has changed."""

    def __init__(self, database: Database, changes: ChangeBoard, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._changes = changes
        self._clock = clock

    async def write(self, work: Callable[[Writing], T], *, final: bool = True) -> T:
        """Run `work` in one durable transaction; see `transaction.Store`."""
        topics: set[str] = set()

        def run(session: Session) -> T:
            writing = SessionWriting(session, self._clock())
            result = work(writing)
            writing.close()
            topics.update(writing.topics)
            return result

        written = asyncio.ensure_future(self._database.write(run, final=final))
        # Announced even when the caller has gone: what is committed is for the others to see.
        written.add_done_callback(lambda done: self._announce(done, topics))
        return await asyncio.shield(written)

    async def read(self, work: Callable[[Reading], T]) -> T:
        """Run `work` on one consistent snapshot."""
        return await self._database.read(lambda session: work(SessionReading(session)))

    def _announce(self, done: "asyncio.Future[Any]", topics: set[str]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._changes.announce(topics)
