"""Whether the training node's own endpoint answered."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the column."""
    op.add_column("runs", sa.Column("node_endpoint", sa.Boolean, nullable=False, server_default=sa.false()))
