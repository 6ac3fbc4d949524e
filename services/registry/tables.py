"""The registry's tables; rows of them never leave `store.py`.

Times are microseconds since the Unix epoch, states the names of their enum's members, signed statements the bytes of
their protobuf message, and weights (unsigned 64 bit) decimal text.
"""

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, Text
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel

# SQLite numbers rows by itself in columns of the type INTEGER only.
POSITION = BigInteger().with_variant(Integer, "sqlite")


class Table(SQLModel, registry=registry()):
    """Base of all tables here: names are the registry's own, apart from those of other services in the same process."""


def _position() -> int | None:
    return Field(default=None, sa_column=Column(POSITION, primary_key=True, autoincrement=True))  # type: ignore[no-any-return]


class ParticipantRow(Table, table=True):
    __tablename__ = "participants"
    __table_args__ = (
        Index("ix_participants_create_time", "create_time", "position"),
        Index("ix_participants_display_name", "display_name", "position"),
        Index("ix_participants_named", "display_name", "create_time", "position"),
        Index("ix_participants_owner_create_time", "owner", "create_time", "position"),
    )

    position: int | None = _position()
    id: str = Field(unique=True)
    display_name: str
    public_key: bytes = Field(sa_type=LargeBinary)
    owner: str | None = None
    create_time: int = Field(sa_type=BigInteger)
    endpoint: str


class EndorsementRow(Table, table=True):
    __tablename__ = "endorsements"

    subject: str = Field(primary_key=True)
    endorser: str = Field(primary_key=True)
    field: str = Field(primary_key=True)
    create_time: int = Field(sa_type=BigInteger)


class TaskRow(Table, table=True):
    __tablename__ = "tasks"
    __table_args__ = (
        Index("ix_tasks_create_time", "create_time", "position"),
        Index("ix_tasks_update_time", "update_time", "position"),
        Index("ix_tasks_state_create_time", "state", "create_time", "position"),
        Index("ix_tasks_creator_create_time", "creator", "create_time", "position"),
    )

    position: int | None = _position()
    id: str = Field(unique=True)
    creator: str
    config: bytes = Field(sa_type=LargeBinary)
    state: str
    state_reason: str
    create_time: int = Field(sa_type=BigInteger)
    update_time: int = Field(sa_type=BigInteger)
    evaluation_rows: int = Field(sa_type=BigInteger)
    holdout: str
    holdout_rows: int = Field(sa_type=BigInteger)
    holdout_leaf: bytes = Field(sa_type=LargeBinary)
    ranking_round: int
    open_time: int | None = Field(default=None, sa_type=BigInteger)
    close_time: int | None = Field(default=None, sa_type=BigInteger)
    pool_open: bool
    revision: int = Field(sa_type=BigInteger)
    deadline: int | None = Field(default=None, sa_type=BigInteger, index=True)
    training_nodes: int = 0
    validators: int = 0
    submissions: int = 0


class MemberRow(Table, table=True):
    __tablename__ = "members"
    __table_args__ = (
        Index("ix_members_task_participant", "task", "participant", unique=True),
        Index("ix_members_task_create_time", "task", "create_time", "position"),
        Index("ix_members_state_removed", "state", "removed"),
    )

    position: int | None = _position()
    task: str
    participant: str
    role: str
    state: str
    statement: bytes | None = Field(default=None, sa_type=LargeBinary)
    create_time: int = Field(sa_type=BigInteger)
    locked_micros: int = Field(sa_type=BigInteger)
    weight: str
    owner_group: str
    removed: bool


class VerdictRow(Table, table=True):
    __tablename__ = "verdicts"

    position: int | None = _position()
    task: str = Field(index=True)
    verdict: bytes = Field(sa_type=LargeBinary)


class SubmissionRow(Table, table=True):
    __tablename__ = "submissions"
    __table_args__ = (
        Index("ix_submissions_state_commit_time", "state", "commit_time"),
        Index("ix_submissions_task_commit_time", "task", "commit_time", "number"),
        Index("ix_submissions_task_size_bytes", "task", "size_bytes", "number"),
        Index("ix_submissions_participant_commit_time", "participant", "commit_time"),
        Index("ix_submissions_task_model_digest", "task", "model_digest"),
        Index("ix_submissions_state_deadline", "state", "deadline"),
        Index("ix_submissions_task_hidden", "task", "hidden"),
    )

    task: str = Field(primary_key=True)
    number: int = Field(primary_key=True)
    participant: str
    state: str
    commitment: bytes = Field(sa_type=LargeBinary)
    commit_time: int = Field(sa_type=BigInteger)
    deadline: int | None = Field(default=None, sa_type=BigInteger)
    reason: str | None = None
    detail: str
    original: int | None = None
    model_digest: bytes = Field(sa_type=LargeBinary)
    size_bytes: int = Field(sa_type=BigInteger)
    format: str | None = None
    model_index: int
    salt: bytes = Field(sa_type=LargeBinary)
    reveal_leaf: bytes = Field(sa_type=LargeBinary)
    structure_checked: bool
    scores: str = Field(sa_type=Text)
    public_best: int | None = None
    hidden: bool = False
    score_salt: bytes = Field(default=b"", sa_type=LargeBinary)
    draws: str = Field(sa_type=Text)
    reveal_time: int | None = Field(default=None, sa_type=BigInteger)
    end_time: int | None = Field(default=None, sa_type=BigInteger)
    trace: str


class RoundRow(Table, table=True):
    __tablename__ = "rounds"
    __table_args__ = (
        Index("ix_rounds_state_deadline", "state", "deadline"),
        Index("ix_rounds_state_touched", "state", "touched"),
        Index("ix_rounds_unsure_task", "unsure", "task"),
    )

    task: str = Field(primary_key=True)
    number: int = Field(primary_key=True)
    round: int = Field(primary_key=True)
    state: str
    deadline: int = Field(sa_type=BigInteger)
    draw: str
    picks: int
    exhausted: bool
    wanted: int
    disputed: bool
    detail: str
    trace: str
    unsure: bool
    touched: int = Field(default=0, sa_type=BigInteger)
    """The sequence of the last change of the round, one of its assignments or evaluations."""


class AssignmentRow(Table, table=True):
    __tablename__ = "assignments"
    __table_args__ = (
        Index("ix_assignments_validator_sequence", "validator", "sequence"),
        Index("ix_assignments_state_deadline", "state", "deadline"),
        Index("ix_assignments_settled_state", "settled", "state"),
    )

    task: str = Field(primary_key=True)
    number: int = Field(primary_key=True)
    round: int = Field(primary_key=True)
    validator: str = Field(primary_key=True)
    state: str
    position: int
    create_time: int = Field(sa_type=BigInteger)
    update_time: int = Field(sa_type=BigInteger)
    deadline: int | None = Field(default=None, sa_type=BigInteger)
    opening: bool
    lease_token: str
    lease_holder: bytes = Field(sa_type=LargeBinary)
    settled: bool
    refund: bool
    sequence: int = Field(sa_type=BigInteger, unique=True)
    trace: str


class EvaluationRow(Table, table=True):
    __tablename__ = "evaluations"
    __table_args__ = (Index("ix_evaluations_validator_verdict", "validator", "verdict"),)

    task: str = Field(primary_key=True)
    number: int = Field(primary_key=True)
    round: int = Field(primary_key=True)
    validator: str = Field(primary_key=True)
    seal: bytes = Field(sa_type=LargeBinary)
    statement: bytes = Field(sa_type=LargeBinary)
    seal_time: int = Field(sa_type=BigInteger)
    report: bytes | None = Field(default=None, sa_type=LargeBinary)
    salt: bytes = Field(sa_type=LargeBinary)
    finding: str | None = Field(default=None, sa_type=Text)
    open_time: int | None = Field(default=None, sa_type=BigInteger)
    verdict: str | None = None
    disclosed: bool


class PredictionHashesRow(Table, table=True):
    """What was handed in beside reports; validators that agree share a row."""

    __tablename__ = "prediction_hashes"

    root: str = Field(primary_key=True)
    blocks: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    hashes: bytes = Field(sa_type=LargeBinary)


class ValidatorFaultRow(Table, table=True):
    __tablename__ = "validator_faults"
    __table_args__ = (
        Index("ix_validator_faults_task_time", "task", "time", "position"),
        Index("ix_validator_faults_validator_time", "validator", "time", "position"),
        Index("ix_validator_faults_slashed_position", "slashed", "position"),
    )

    position: int | None = _position()
    task: str
    number: int
    round: int
    validator: str
    kind: str
    time: int = Field(sa_type=BigInteger)
    slashed: bool | None = None
    """Whether the selector knows of it; None for what costs no stake."""


class DrawReceiptRow(Table, table=True):
    __tablename__ = "draw_receipts"

    draw: str = Field(primary_key=True)
    receipt: bytes = Field(sa_type=LargeBinary)


class ArtifactRow(Table, table=True):
    __tablename__ = "artifacts"

    sha256: str = Field(primary_key=True)
    size_bytes: int = Field(sa_type=BigInteger)
    create_time: int = Field(sa_type=BigInteger)


class ArtifactUseRow(Table, table=True):
    __tablename__ = "artifact_uses"

    sha256: str = Field(primary_key=True)
    task: str = Field(primary_key=True)
    purpose: str = Field(primary_key=True)
    number: int = Field(primary_key=True)
    owner: str = Field(primary_key=True, index=True)
    create_time: int = Field(sa_type=BigInteger)


class LeafRow(Table, table=True):
    __tablename__ = "log_leaves"

    index: int = Field(sa_column=Column(POSITION, primary_key=True, autoincrement=False))
    hash: bytes = Field(sa_type=LargeBinary)
    entry: bytes = Field(sa_type=LargeBinary)


class NodeRow(Table, table=True):
    """Complete subtrees of two leaves and more, so that proofs read a logarithmic number of rows."""

    __tablename__ = "log_nodes"

    level: int = Field(primary_key=True)
    index: int = Field(sa_column=Column(POSITION, primary_key=True, autoincrement=False))
    hash: bytes = Field(sa_type=LargeBinary)


class CountersRow(Table, table=True):
    """The one row of what grows: the log's frontier, the ledger's position, the last sequence, the time last alive."""

    __tablename__ = "counters"

    id: int = Field(primary_key=True)
    log_size: int = Field(sa_type=BigInteger)
    log_frontier: bytes = Field(sa_type=LargeBinary)
    ledger_position: int = Field(sa_type=BigInteger)
    ledger_digest: bytes | None = Field(default=None, sa_type=LargeBinary)
    assignment_sequence: int = Field(sa_type=BigInteger)
    alive_time: int | None = Field(default=None, sa_type=BigInteger)
