"""The registry's store: works of the domain as transactions, states and leaves changed together."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Executable, update

from services.registry import rows
from services.registry.changes import ChangeBoard
from services.registry.convert.times import micros_of
from services.registry.convert.verdicts import verdict_message
from services.registry.entries import Entry
from services.registry.leaves import leaf_bytes
from services.registry.queries import FirstReading, SqlReading
from services.registry.records import (
    Artifact,
    ArtifactUse,
    Assignment,
    Endorsement,
    Evaluation,
    Member,
    Participant,
    Round,
    Submission,
    Task,
    ValidatorFault,
    Verdict,
)
from services.registry.rows import Counters, RowsOf
from services.registry.staging import RowStaging
from services.registry.states import MembershipState, Role
from services.registry.task_states import deadline_of
from services.registry.transaction import Leaf, Reading, Writing
from services.runtime.database import Database
from services.runtime.engines import Written
from services.runtime.writer import Group
from tiltyard.transparency import Frontier, leaf_hash

R = TypeVar("R")
T = TypeVar("T")


class SqlWriting(SqlReading):
    """`transaction.Writing` of one work, over its group's staging."""

    def __init__(self, group: Group, now: datetime) -> None:
        self._staging = group.staging(RowStaging)
        super().__init__(self._staging.connection)
        self._group = group
        self._now = now
        self.topics: set[str] = set()

    @property
    def now(self) -> datetime:
        return self._now

    def append(self, entry: Entry) -> Leaf:
        data = leaf_bytes(entry, self._now)
        leaf = Leaf(self._frontier().size, leaf_hash(data), data)
        self._staging.append(leaf)
        return leaf

    def put_participant(self, participant: Participant) -> None:
        self._staging.put(rows.PARTICIPANTS, participant)

    def put_endorsement(self, endorsement: Endorsement) -> None:
        self._staging.put(rows.ENDORSEMENTS, endorsement)

    def delete_endorsement(self, endorser: str, subject: str, field: str) -> bool:
        key = (subject, endorser, field)
        if self._load(rows.ENDORSEMENTS, *key) is None:
            return False
        self._staging.delete(rows.ENDORSEMENTS, key)
        return True

    def put_task(self, task: Task) -> Task:
        known = self.task(task.id)
        if known is not None:
            # The counters are the row's own: the caller's may be from before another member joined.
            task = replace(
                task,
                revision=known.revision,
                training_nodes=known.training_nodes,
                validators=known.validators,
                submissions=known.submissions,
            )
        return self._bump(task)

    def touch_task(self, task: str) -> None:
        known = self.task(task)
        if known is not None:
            self._bump(known)

    def _bump(self, task: Task) -> Task:
        bumped = replace(task, revision=task.revision + 1, update_time=self._now)
        self._keep_task(bumped)
        self.topics.add(f"tasks/{task.id}")
        return bumped

    def _keep_task(self, task: Task) -> None:
        deadline = deadline_of(task)
        self._staging.put(rows.TASKS, task, None if deadline is None else micros_of(deadline))

    def put_member(self, member: Member) -> None:
        before = self.member(member.task, member.participant)
        self._staging.put(rows.MEMBERS, member)
        task = self.task(member.task)
        if task is None:
            return
        nodes, validators = (
            int(_counts_as(member, role)) - int(_counts_as(before, role))
            for role in (Role.TRAINING_NODE, Role.VALIDATOR)
        )
        self._bump(replace(task, training_nodes=task.training_nodes + nodes, validators=task.validators + validators))

    def put_verdict(self, verdict: Verdict) -> None:
        message = verdict_message(verdict).SerializeToString(deterministic=True)
        self._staging.add(rows.VERDICTS, rows.KeptVerdict(verdict.task, message))

    def next_submission_number(self, task: str) -> int:
        known = self.task(task)
        if known is None:
            raise LookupError(f"there is no task {task}")
        self._keep_task(replace(known, submissions=known.submissions + 1))
        return known.submissions + 1

    def put_submission(self, submission: Submission) -> None:
        self._staging.put(rows.SUBMISSIONS, submission)
        self.touch_task(submission.task)

    def put_round(self, round_: Round) -> None:
        self._staging.put(rows.ROUNDS, round_)
        self._touch_round(round_.task, round_.number, round_.round)

    def _touch_round(self, task: str, number: int, round_: int) -> int:
        """Tell the background loop that a round is worth a look; the new sequence."""
        sequence = self._counters().assignment_sequence + 1
        self._count(assignment_sequence=sequence)
        self._staging.touch((task, number, round_), sequence)
        return sequence

    def put_assignment(self, assignment: Assignment) -> Assignment:
        sequence = self._touch_round(assignment.task, assignment.number, assignment.round)
        put = replace(assignment, sequence=sequence, update_time=self._now)
        self._staging.put(rows.ASSIGNMENTS, put)
        self.topics.add(f"validators/{assignment.validator}")
        return put

    def put_evaluation(self, evaluation: Evaluation) -> None:
        self._staging.put(rows.EVALUATIONS, evaluation)
        self._touch_round(evaluation.task, evaluation.number, evaluation.round)

    def put_prediction_hashes(self, root: str, blocks: int, hashes: bytes) -> None:
        if self._load(rows.PREDICTION_HASHES, root, blocks) is None:
            self._staging.put(rows.PREDICTION_HASHES, rows.KeptHashes(root, blocks, hashes))

    def put_validator_fault(self, fault: ValidatorFault, *, costs_stake: bool) -> None:
        self._staging.add(rows.VALIDATOR_FAULTS, fault, False if costs_stake else None)

    def note_slashed(self, position: int) -> None:
        faults = rows.VALIDATOR_FAULTS.c
        self._staging.settle()
        self._group.session.connection().execute(
            update(faults.slashed.table).where(faults.position == position).values(slashed=True)
        )

    def put_draw_receipt(self, draw: str, receipt: bytes) -> None:
        self._staging.put(rows.DRAW_RECEIPTS, rows.KeptReceipt(draw, receipt))

    def put_artifact(self, artifact: Artifact) -> None:
        self._staging.put(rows.ARTIFACTS, artifact)

    def put_artifact_use(self, use: ArtifactUse) -> None:
        self._staging.put(rows.ARTIFACT_USES, use)

    def delete_artifact(self, sha256: str) -> None:
        for use in self.artifact_uses(sha256):
            self._staging.delete(rows.ARTIFACT_USES, rows.ARTIFACT_USES.key_of(use))
        self._staging.delete(rows.ARTIFACTS, (sha256,))

    def set_ledger_position(self, sequence: int, digest: bytes) -> None:
        self._count(ledger_position=sequence, ledger_digest=digest)

    def set_alive_time(self, time: datetime) -> None:
        self._count(alive_time=micros_of(time))

    def _count(self, **changes: Any) -> None:
        self._staging.put(rows.COUNTERS, replace(self._counters(), **changes))

    # Questions see what was put off.

    def _load(self, kind: RowsOf[R], *key: Any) -> R | None:
        return self._staging.load(kind, key)

    def _execute(self, statement: str, values: tuple[Any, ...]) -> Sequence[Any]:
        self._staging.settle()
        return super()._execute(statement, values)

    def _rows(self, question: Written, **values: Any) -> Sequence[Any]:
        self._staging.settle()
        return super()._rows(question, **values)

    def _ask(self, query: Executable) -> Sequence[Any]:
        self._staging.settle()
        return super()._ask(query)

    def _counters(self) -> Counters:
        return self._staging.counters()

    def _frontier(self) -> Frontier:
        return self._staging.frontier()


def _counts_as(member: Member | None, role: Role) -> bool:
    return member is not None and member.role is role and member.state is MembershipState.ACTIVE


class SqlStore:
    """`transaction.Store` over the process's database; announces what a committed work has changed."""

    def __init__(self, database: Database, changes: ChangeBoard, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._changes = changes
        self._clock = clock

    async def write(self, work: Callable[[Writing], T], *, final: bool = True, quick: bool = False) -> T:
        """Run `work` in one durable transaction; see `transaction.Store`."""
        topics: set[str] = set()

        def run(group: Group) -> T:
            # It may run more than once before it counts.
            writing = SqlWriting(group, self._clock())
            result = work(writing)
            topics.update(writing.topics)
            return result

        def announce() -> None:
            self._changes.announce(topics)

        return await self._database.write_staged(run, final=final, quick=quick, committed=announce)

    async def read(self, work: Callable[[Reading], T]) -> T:
        """Run `work` on one consistent snapshot."""
        return await self._database.query(lambda connection: work(SqlReading(connection)))

    async def finds(self, question: Callable[[Reading], Collection[object]]) -> bool:
        """Whether `question` finds anything; see `transaction.Store`."""
        return bool(await self._database.lookup(lambda connection: question(FirstReading(connection))))

    async def look_up(self, work: Callable[[Reading], T]) -> T:
        """Run `work`, which reads a few rows by their keys, on one consistent snapshot; see `transaction.Store`."""
        return await self._database.lookup(lambda connection: work(SqlReading(connection)))
