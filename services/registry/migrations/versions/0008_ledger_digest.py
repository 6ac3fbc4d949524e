"""The digest of the last ledger event in the record log, by which another ledger is told from the one followed."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("counters", sa.Column("ledger_digest", sa.LargeBinary(), nullable=True))


def downgrade() -> None:
    op.drop_column("counters", "ledger_digest")
