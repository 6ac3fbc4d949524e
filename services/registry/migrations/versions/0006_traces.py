"""The trace that a submission and all that follows from it belong to."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_TABLES = ("submissions", "rounds", "assignments")


def upgrade() -> None:
    for table in _TABLES:
        op.add_column(table, sa.Column("trace", sa.String(), nullable=False, server_default=""))


def downgrade() -> None:
    for table in _TABLES:
        op.drop_column(table, "trace")
