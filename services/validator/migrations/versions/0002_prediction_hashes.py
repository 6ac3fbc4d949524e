"""The hashes of predictions, beside the report whose root is over them."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds the column."""
    op.add_column("runs", sa.Column("hashes", sa.LargeBinary))
