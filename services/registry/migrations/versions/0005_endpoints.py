"""The inference endpoint of a participant."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("participants", sa.Column("endpoint", sa.String(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("participants", "endpoint")
