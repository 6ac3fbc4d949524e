"""Whether the selector may have drawn somebody for a round of whom the registry has not heard."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rounds", sa.Column("unsure", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index("ix_rounds_unsure_task", "rounds", ["unsure", "task"])


def downgrade() -> None:
    op.drop_index("ix_rounds_unsure_task", "rounds")
    op.drop_column("rounds", "unsure")
