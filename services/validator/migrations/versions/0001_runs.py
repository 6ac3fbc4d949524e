"""Runs, and the answers remembered for repeated requests."""

import sqlalchemy as sa
from alembic import op

from services.runtime.database import create_remembered_requests

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Creates the tables."""
    create_remembered_requests(op)
    op.create_table(
        "runs",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("assignment", sa.String, nullable=False, unique=True),
        sa.Column("task", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("start_us", sa.BigInteger, nullable=False),
        sa.Column("end_us", sa.BigInteger),
        sa.Column("detail", sa.String, nullable=False),
        sa.Column("finding_detail", sa.String, nullable=False),
        sa.Column("fault", sa.String),
        sa.Column("correct", sa.BigInteger),
        sa.Column("total", sa.BigInteger),
        sa.Column("ambiguous", sa.BigInteger),
        sa.Column("loss_sum_micros", sa.BigInteger),
        sa.Column("report", sa.LargeBinary),
        sa.Column("salt", sa.LargeBinary),
        sa.Column("seal", sa.LargeBinary),
    )
    op.create_index("ix_runs_state", "runs", ["state"])
