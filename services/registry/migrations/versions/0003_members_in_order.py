"""An index for the pages of a task's members."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_members_task_position", "members", ["task", "position"])


def downgrade() -> None:
    op.drop_index("ix_members_task_position", table_name="members")
