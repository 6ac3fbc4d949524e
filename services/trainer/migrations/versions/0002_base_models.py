"""The base model that a training begins with."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Trainings that were there began with fresh weights."""
    op.add_column("trainings", sa.Column("base_model", sa.String, nullable=False, server_default=""))
