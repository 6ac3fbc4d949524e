"""Hashes of predictions, faults of validators, scores that are hidden until close, and what the referee needs."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_POSITION = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "prediction_hashes",
        sa.Column("root", sa.String(), nullable=False),
        sa.Column("blocks", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("hashes", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("root", "blocks"),
    )
    op.create_table(
        "validator_faults",
        sa.Column("position", _POSITION, autoincrement=True, nullable=False),
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("validator", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("slashed", sa.Boolean(), nullable=True),
        sa.PrimaryKeyConstraint("position"),
    )
    op.create_index("ix_validator_faults_task_position", "validator_faults", ["task", "position"])
    op.create_index("ix_validator_faults_validator_position", "validator_faults", ["validator", "position"])
    op.create_index("ix_validator_faults_slashed_position", "validator_faults", ["slashed", "position"])
    op.add_column("submissions", sa.Column("public_best", sa.Integer(), nullable=True))
    op.add_column("submissions", sa.Column("hidden", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("submissions", sa.Column("score_salt", sa.LargeBinary(), nullable=False, server_default=""))
    op.create_index("ix_submissions_task_hidden", "submissions", ["task", "hidden"])
    op.add_column("rounds", sa.Column("touched", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("ix_rounds_state_touched", "rounds", ["state", "touched"])
    op.add_column("counters", sa.Column("alive_time", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("counters", "alive_time")
    op.drop_index("ix_rounds_state_touched", "rounds")
    op.drop_column("rounds", "touched")
    op.drop_index("ix_submissions_task_hidden", "submissions")
    for column in ("score_salt", "hidden", "public_best"):
        op.drop_column("submissions", column)
    op.drop_table("validator_faults")
    op.drop_table("prediction_hashes")
