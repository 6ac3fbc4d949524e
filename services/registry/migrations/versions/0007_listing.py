"""Indexes for lists in any of their documented orders; those that they stand in for go."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_NEW = (
    ("ix_participants_create_time", "participants", ["create_time", "position"]),
    ("ix_participants_display_name", "participants", ["display_name", "position"]),
    ("ix_participants_named", "participants", ["display_name", "create_time", "position"]),
    ("ix_participants_owner_create_time", "participants", ["owner", "create_time", "position"]),
    ("ix_tasks_create_time", "tasks", ["create_time", "position"]),
    ("ix_tasks_update_time", "tasks", ["update_time", "position"]),
    ("ix_tasks_state_create_time", "tasks", ["state", "create_time", "position"]),
    ("ix_tasks_creator_create_time", "tasks", ["creator", "create_time", "position"]),
    ("ix_members_task_create_time", "members", ["task", "create_time", "position"]),
    ("ix_submissions_task_commit_time", "submissions", ["task", "commit_time", "number"]),
    ("ix_submissions_task_size_bytes", "submissions", ["task", "size_bytes", "number"]),
    ("ix_validator_faults_task_time", "validator_faults", ["task", "time", "position"]),
    ("ix_validator_faults_validator_time", "validator_faults", ["validator", "time", "position"]),
)
_OLD = (
    ("ix_participants_owner", "participants", ["owner"]),
    ("ix_tasks_state", "tasks", ["state"]),
    ("ix_tasks_creator", "tasks", ["creator"]),
    ("ix_members_task_position", "members", ["task", "position"]),
    ("ix_validator_faults_task_position", "validator_faults", ["task", "position"]),
    ("ix_validator_faults_validator_position", "validator_faults", ["validator", "position"]),
)


def upgrade() -> None:
    for name, table, columns in _NEW:
        op.create_index(name, table, columns)
    for name, table, _ in _OLD:
        op.drop_index(name, table_name=table)


def downgrade() -> None:
    for name, table, columns in _OLD:
        op.create_index(name, table, columns)
    for name, table, _ in _NEW:
        op.drop_index(name, table_name=table)
