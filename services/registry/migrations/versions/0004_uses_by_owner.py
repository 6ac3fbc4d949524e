"""Uses of artifacts by their owner and since when: base models that no task has named yet belong to nobody else."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_BEFORE = "sha256, task, purpose, number, owner"


def upgrade() -> None:
    # A new primary key: SQLite takes one with a new table only.
    op.rename_table("artifact_uses", "artifact_uses_before")
    op.create_table(
        "artifact_uses",
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", "task", "purpose", "number", "owner", name="pk_artifact_uses_by_owner"),
    )
    op.execute(
        f"INSERT INTO artifact_uses ({_BEFORE}, create_time) "  # noqa: S608 (constants)
        "SELECT u.sha256, u.task, u.purpose, u.number, u.owner, COALESCE(a.create_time, 0) "
        "FROM artifact_uses_before u LEFT JOIN artifacts a ON a.sha256 = u.sha256"
    )
    op.drop_table("artifact_uses_before")
    op.create_index("ix_artifact_uses_owner", "artifact_uses", ["owner"])


def downgrade() -> None:
    op.drop_index("ix_artifact_uses_owner", table_name="artifact_uses")
    op.rename_table("artifact_uses", "artifact_uses_after")
    op.create_table(
        "artifact_uses",
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", "task", "purpose", "number", name="pk_artifact_uses"),
    )
    # What no task has named is for the version that knows of it.
    op.execute(
        f"INSERT INTO artifact_uses ({_BEFORE}) SELECT {_BEFORE} FROM artifact_uses_after WHERE task <> ''"  # noqa: S608
    )
    op.drop_table("artifact_uses_after")
