"""A registry's database with duties enough to seal: one task, and validators who hold the leases of all of theirs."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import insert
from sqlmodel import Session

from services.registry import rows
from services.registry.changes import ChangeBoard
from services.registry.convert.drafts import draft_of
from services.registry.records import Assignment, Round, Submission, Task
from services.registry.rows import COUNTERS_ID
from services.registry.states import AssignmentState, ModelFormat, RoundState, SubmissionState, TaskState
from services.registry.store import SqlStore
from services.registry.tables import AssignmentRow, CountersRow, RoundRow, SubmissionRow
from services.runtime.auth import utc_now
from services.runtime.database import Database
from tiltyard.identity import Key
from tiltyard.type.v1 import model_pb2, task_pb2

TASK = "t"
LEASE = "lease"
VALIDATORS, PER_SUBMISSION = 16, 3
SUBMISSIONS = 10_000


async def fill(folder: Path, keys: list[Key]) -> None:
    """A task in which every validator holds the leases of its duties."""
    now = utc_now()
    url = f"sqlite:///{folder / 'registry.db'}"
    database = Database.open(url, migrations="services.registry.migrations")
    store = SqlStore(database, ChangeBoard(), utc_now)
    digest = task_pb2.DatasetDigest(sha256=bytes(32), size_bytes=1000)
    config = task_pb2.TaskConfig(
        display_name="Benchmark",
        models=[model_pb2.ModelSpec(input_shape=[4], outputs=3, linear=model_pb2.Linear())],
        evaluation_dataset=digest,
    )
    draft = draft_of(config, now=now, max_dataset_bytes=1 << 20)
    task = Task(TASK, keys[0].id, draft, TaskState.OPEN, now, now, evaluation_rows=100, open_time=now)
    await store.write(lambda tx: tx.put_task(task))
    await database.write(lambda session: _insert_duties(session, keys, now))
    await database.close()


def _insert_duties(session: Session, keys: list[Key], now: datetime) -> None:
    end = now + timedelta(days=1)
    submissions: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    assignments: list[dict[str, Any]] = []
    for number in range(1, SUBMISSIONS + 1):
        submission = Submission(
            task=TASK,
            number=number,
            participant=keys[0].id,
            state=SubmissionState.EVALUATING,
            commitment=bytes(32),
            commit_time=now,
            deadline=end,
            model_digest=bytes(32),
            format=ModelFormat.SAFETENSORS,
            structure_checked=True,
        )
        submissions.append(rows.SUBMISSIONS.columns(submission))
        round_ = Round(TASK, number, 1, RoundState.SEALING, end, wanted=PER_SUBMISSION, picks=PER_SUBMISSION)
        rounds.append(rows.ROUNDS.columns(round_) | {"touched": 0})
        for position in range(PER_SUBMISSION):
            assignment = Assignment(
                task=TASK,
                number=number,
                round=1,
                validator=keys[(number + position) % VALIDATORS].id,
                state=AssignmentState.ACCEPTED,
                position=position,
                create_time=now,
                update_time=now,
                deadline=end,
                lease_token=LEASE,
                lease_holder=bytes(32),
                sequence=len(assignments) + 1,
            )
            assignments.append(rows.ASSIGNMENTS.columns(assignment))
    counters = {"id": COUNTERS_ID, "log_size": 0, "log_frontier": b"", "ledger_position": 0}
    counters["assignment_sequence"] = len(assignments)
    for table, values in (
        (SubmissionRow, submissions),
        (RoundRow, rounds),
        (AssignmentRow, assignments),
        (CountersRow, [counters]),
    ):
        session.connection().execute(insert(table), values)
