"""Uses of quotas are counted, not looked up among the charges; fewer pages are written for each draw."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Counts the charges there are; takes indexes away that say nothing new."""
    op.create_table(
        "quota_uses",
        sa.Column("task", sa.String, primary_key=True, nullable=False),
        sa.Column("rate_window", sa.BigInteger, primary_key=True, nullable=False, autoincrement=False),
        sa.Column("participant", sa.String, primary_key=True, nullable=False),
        sa.Column("used", sa.BigInteger, nullable=False),
        sa.CheckConstraint("used >= 0", name="never_refunded_twice"),
        sqlite_with_rowid=False,
    )
    op.execute(
        "INSERT INTO quota_uses (task, rate_window, participant, used) "
        "SELECT task, rate_window, participant, count(*) FROM charges WHERE settlement != 'refunded' "
        "GROUP BY task, rate_window, participant"
    )
    op.drop_index("ix_charges_quota", "charges")
    with op.batch_alter_table("draws") as draws:
        # The draw's id is a hash of submission and round.
        draws.drop_constraint("one_draw_for_each_round", type_="unique")
    if op.get_context().dialect.name == "sqlite":
        _spare_sqlite_an_index()


def _spare_sqlite_an_index() -> None:
    """SQLite keeps a primary key beside the table, unless the key is the table's order: whole numbers named INTEGER, or
    a table that is nothing but its key's index.
    """
    with op.batch_alter_table("ledger_events") as events:
        events.alter_column("sequence", type_=sa.Integer, existing_type=sa.BigInteger, existing_nullable=False)
    op.create_table(
        "charges_by_draw",
        *(sa.Column(name, sa.String, primary_key=True, nullable=False) for name in ("draw", "participant")),
        sa.Column("task", sa.String, nullable=False),
        sa.Column("rate_window", sa.BigInteger, nullable=False),
        sa.Column("settlement", sa.String, nullable=False),
        sqlite_with_rowid=False,
    )
    columns = "draw, participant, task, rate_window, settlement"
    op.execute(f"INSERT INTO charges_by_draw ({columns}) SELECT {columns} FROM charges")  # noqa: S608 - names of ours
    op.drop_table("charges")
    op.rename_table("charges_by_draw", "charges")
