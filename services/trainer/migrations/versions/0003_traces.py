"""The trace that a training belongs to."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Trainings that were there belong to none."""
    op.add_column("trainings", sa.Column("trace", sa.String, nullable=False, server_default=""))
