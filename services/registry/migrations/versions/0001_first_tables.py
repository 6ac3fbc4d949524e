"""Participants, tasks and members, submissions with their judging, artifacts, and the record log."""

import sqlalchemy as sa
from alembic import op

from services.runtime.database import create_remembered_requests

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# SQLite numbers rows by itself in columns of the type INTEGER only.
_POSITION = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    create_remembered_requests(op)
    op.create_table(
        "artifact_uses",
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", "task", "purpose", "number"),
    )
    op.create_table(
        "artifacts",
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sha256"),
    )
    op.create_table(
        "assignments",
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("validator", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("update_time", sa.BigInteger(), nullable=False),
        sa.Column("deadline", sa.BigInteger(), nullable=True),
        sa.Column("opening", sa.Boolean(), nullable=False),
        sa.Column("lease_token", sa.String(), nullable=False),
        sa.Column("lease_holder", sa.LargeBinary(), nullable=False),
        sa.Column("settled", sa.Boolean(), nullable=False),
        sa.Column("refund", sa.Boolean(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("task", "number", "round", "validator"),
        sa.UniqueConstraint("sequence"),
    )
    op.create_index("ix_assignments_settled_state", "assignments", ["settled", "state"], unique=False)
    op.create_index("ix_assignments_state_deadline", "assignments", ["state", "deadline"], unique=False)
    op.create_index("ix_assignments_validator_sequence", "assignments", ["validator", "sequence"], unique=False)
    op.create_table(
        "counters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("log_size", sa.BigInteger(), nullable=False),
        sa.Column("log_frontier", sa.LargeBinary(), nullable=False),
        sa.Column("ledger_position", sa.BigInteger(), nullable=False),
        sa.Column("assignment_sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "draw_receipts",
        sa.Column("draw", sa.String(), nullable=False),
        sa.Column("receipt", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("draw"),
    )
    op.create_table(
        "endorsements",
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("endorser", sa.String(), nullable=False),
        sa.Column("field", sa.String(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("subject", "endorser", "field"),
    )
    op.create_table(
        "evaluations",
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("validator", sa.String(), nullable=False),
        sa.Column("seal", sa.LargeBinary(), nullable=False),
        sa.Column("statement", sa.LargeBinary(), nullable=False),
        sa.Column("seal_time", sa.BigInteger(), nullable=False),
        sa.Column("report", sa.LargeBinary(), nullable=True),
        sa.Column("salt", sa.LargeBinary(), nullable=False),
        sa.Column("finding", sa.Text(), nullable=True),
        sa.Column("open_time", sa.BigInteger(), nullable=True),
        sa.Column("verdict", sa.String(), nullable=True),
        sa.Column("disclosed", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("task", "number", "round", "validator"),
    )
    op.create_index("ix_evaluations_validator_verdict", "evaluations", ["validator", "verdict"], unique=False)
    op.create_table(
        "log_leaves",
        sa.Column("index", _POSITION, autoincrement=False, nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("entry", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("index"),
    )
    op.create_table(
        "log_nodes",
        sa.Column("level", sa.Integer(), nullable=False),
        sa.Column("index", _POSITION, autoincrement=False, nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("level", "index"),
    )
    op.create_table(
        "members",
        sa.Column("position", _POSITION, autoincrement=True, nullable=False),
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("participant", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("statement", sa.LargeBinary(), nullable=True),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("locked_micros", sa.BigInteger(), nullable=False),
        sa.Column("weight", sa.String(), nullable=False),
        sa.Column("owner_group", sa.String(), nullable=False),
        sa.Column("removed", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("position"),
    )
    op.create_index("ix_members_state_removed", "members", ["state", "removed"], unique=False)
    op.create_index("ix_members_task_participant", "members", ["task", "participant"], unique=True)
    op.create_table(
        "participants",
        sa.Column("position", _POSITION, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("display_name", sa.String(), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("owner", sa.String(), nullable=True),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("position"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_participants_owner", "participants", ["owner"], unique=False)
    op.create_table(
        "rounds",
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("deadline", sa.BigInteger(), nullable=False),
        sa.Column("draw", sa.String(), nullable=False),
        sa.Column("picks", sa.Integer(), nullable=False),
        sa.Column("exhausted", sa.Boolean(), nullable=False),
        sa.Column("wanted", sa.Integer(), nullable=False),
        sa.Column("disputed", sa.Boolean(), nullable=False),
        sa.Column("detail", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("task", "number", "round"),
    )
    op.create_index("ix_rounds_state_deadline", "rounds", ["state", "deadline"], unique=False)
    op.create_table(
        "submissions",
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("participant", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("commitment", sa.LargeBinary(), nullable=False),
        sa.Column("commit_time", sa.BigInteger(), nullable=False),
        sa.Column("deadline", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("detail", sa.String(), nullable=False),
        sa.Column("original", sa.Integer(), nullable=True),
        sa.Column("model_digest", sa.LargeBinary(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("format", sa.String(), nullable=True),
        sa.Column("model_index", sa.Integer(), nullable=False),
        sa.Column("salt", sa.LargeBinary(), nullable=False),
        sa.Column("reveal_leaf", sa.LargeBinary(), nullable=False),
        sa.Column("structure_checked", sa.Boolean(), nullable=False),
        sa.Column("scores", sa.Text(), nullable=False),
        sa.Column("draws", sa.Text(), nullable=False),
        sa.Column("reveal_time", sa.BigInteger(), nullable=True),
        sa.Column("end_time", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("task", "number"),
    )
    op.create_index(
        "ix_submissions_participant_commit_time", "submissions", ["participant", "commit_time"], unique=False
    )
    op.create_index("ix_submissions_state_commit_time", "submissions", ["state", "commit_time"], unique=False)
    op.create_index("ix_submissions_state_deadline", "submissions", ["state", "deadline"], unique=False)
    op.create_index("ix_submissions_task_model_digest", "submissions", ["task", "model_digest"], unique=False)
    op.create_table(
        "tasks",
        sa.Column("position", _POSITION, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("creator", sa.String(), nullable=False),
        sa.Column("config", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("state_reason", sa.String(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("update_time", sa.BigInteger(), nullable=False),
        sa.Column("evaluation_rows", sa.BigInteger(), nullable=False),
        sa.Column("holdout", sa.String(), nullable=False),
        sa.Column("holdout_rows", sa.BigInteger(), nullable=False),
        sa.Column("holdout_leaf", sa.LargeBinary(), nullable=False),
        sa.Column("ranking_round", sa.Integer(), nullable=False),
        sa.Column("open_time", sa.BigInteger(), nullable=True),
        sa.Column("close_time", sa.BigInteger(), nullable=True),
        sa.Column("pool_open", sa.Boolean(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("deadline", sa.BigInteger(), nullable=True),
        sa.Column("training_nodes", sa.Integer(), nullable=False),
        sa.Column("validators", sa.Integer(), nullable=False),
        sa.Column("submissions", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("position"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_tasks_creator", "tasks", ["creator"], unique=False)
    op.create_index("ix_tasks_deadline", "tasks", ["deadline"], unique=False)
    op.create_index("ix_tasks_state", "tasks", ["state"], unique=False)
    op.create_table(
        "verdicts",
        sa.Column("position", _POSITION, autoincrement=True, nullable=False),
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("verdict", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("position"),
    )
    op.create_index("ix_verdicts_task", "verdicts", ["task"], unique=False)


def downgrade() -> None:
    for table in (
        "artifact_uses",
        "artifacts",
        "assignments",
        "counters",
        "draw_receipts",
        "endorsements",
        "evaluations",
        "log_leaves",
        "log_nodes",
        "members",
        "participants",
        "rounds",
        "submissions",
        "tasks",
        "verdicts",
        "remembered_requests",
    ):
        op.drop_table(table)
