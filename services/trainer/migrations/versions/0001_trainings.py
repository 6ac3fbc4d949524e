"""Trainings and their histories."""

import sqlalchemy as sa
from alembic import op

from services.runtime.database import create_remembered_requests

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates everything."""
    create_remembered_requests(op)
    op.create_table(
        "trainings",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("task", sa.String, nullable=False),
        sa.Column("model_index", sa.Integer, nullable=False),
        sa.Column("dataset", sa.String, nullable=False),
        sa.Column("dataset_mark", sa.String, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("loss", sa.String, nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("submit", sa.Boolean, nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("model_digest", sa.LargeBinary, nullable=False),
        sa.Column("submission", sa.String, nullable=False),
        sa.Column("warnings", sa.Text, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("device", sa.String, nullable=False),
        sa.Column("ended_at_us", sa.BigInteger, nullable=True),
    )
    op.create_index("ix_trainings_state", "trainings", ["state"])
    op.create_table(
        "training_histories",
        sa.Column("training", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("points", sa.Text, nullable=False),
        sa.Column("newest", sa.Text, nullable=False),
    )
