"""Accounts and events, owner groups, pools with the history of their leaves, draws and charges."""

import sqlalchemy as sa
from alembic import op

from services.runtime.database import create_remembered_requests

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _text(name: str, *, primary_key: bool = False) -> "sa.Column[str]":
    return sa.Column(name, sa.String, primary_key=primary_key, nullable=False)


def _large(name: str, *, primary_key: bool = False, nullable: bool = False) -> "sa.Column[int]":
    return sa.Column(name, sa.BigInteger, primary_key=primary_key, nullable=nullable, autoincrement=False)


def _bytes(name: str) -> "sa.Column[bytes]":
    return sa.Column(name, sa.LargeBinary, nullable=False)


def _flag(name: str) -> "sa.Column[bool]":
    return sa.Column(name, sa.Boolean, nullable=False)


def upgrade() -> None:
    """Creates everything."""
    create_remembered_requests(op)
    _create_stakes()
    _create_groups()
    _create_pools()
    _create_draws()


def _create_stakes() -> None:
    op.create_table(
        "accounts",
        _text("participant", primary_key=True),
        _large("available_micros"),
        _large("locked_micros"),
        _large("unbonding_micros"),
        _large("slashed_micros"),
        sa.CheckConstraint(
            "available_micros >= 0 AND locked_micros >= 0 AND unbonding_micros >= 0 AND slashed_micros >= 0",
            name="never_below_zero",
        ),
    )
    op.create_table(
        "deposits",
        _text("reference", primary_key=True),
        sa.Column("number", sa.Integer, nullable=False, unique=True),
        _text("participant"),
        _large("amount_micros"),
        _text("funding_account"),
        _large("total_micros"),
    )
    op.create_table(
        "unbondings",
        _text("participant", primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        _large("amount_micros"),
        _large("release_time_us"),
    )
    op.create_table(
        "slashes",
        _text("participant", primary_key=True),
        _text("evidence", primary_key=True),
        _text("fault"),
        _large("taken_micros"),
    )
    op.create_table(
        "ledger_events",
        _large("sequence", primary_key=True),
        _text("kind"),
        _large("time_us"),
        _text("participant"),
        _large("amount_micros"),
        _text("task"),
        _text("draw"),
        _text("owner_group"),
        _bytes("weight"),
        _text("reference"),
        _text("funding_account"),
        _text("fault"),
    )


def _create_groups() -> None:
    op.create_table("owner_groups", _text("participant", primary_key=True), _text("owner_group"))
    op.create_index("ix_owner_groups_owner_group", "owner_groups", ["owner_group"])
    op.create_table("funding_accounts", _text("funding_account", primary_key=True), _text("participant"))


def _create_pools() -> None:
    op.create_table(
        "pools",
        _text("task", primary_key=True),
        _text("curve"),
        sa.Column("alpha_millis", sa.Integer, nullable=False),
        _large("validator_min_stake_micros"),
        _large("training_node_min_stake_micros"),
        _large("window_us"),
        _large("quota_limit"),
        _large("reference_stake_micros"),
        _large("open_time_us"),
        _text("creator"),
        _flag("closed"),
        _large("version"),
        _large("leaf_count"),
        _bytes("root"),
    )
    op.create_table(
        "candidates",
        _text("task", primary_key=True),
        _text("participant", primary_key=True),
        _text("role"),
        _text("evidence"),
        _text("explanation"),
        _large("decide_time_us"),
        _large("locked_micros"),
        _bytes("weight"),
        _flag("active"),
    )
    op.create_index("ix_candidates_participant", "candidates", ["participant"])
    op.create_table(
        "leaves",
        _text("task", primary_key=True),
        _large("version", primary_key=True),
        _large("leaf_index"),
        _text("owner_group"),
        _large("stake_micros"),
        _bytes("weight"),
    )
    op.create_index("ix_leaves_owner_group", "leaves", ["task", "owner_group", "version"])
    op.create_table(
        "seats",
        _text("task", primary_key=True),
        _text("participant", primary_key=True),
        _large("since", primary_key=True),
        _large("until", nullable=True),
        _large("leaf_index"),
    )
    op.create_index("ix_seats_leaf_index", "seats", ["task", "leaf_index"])


def _create_draws() -> None:
    op.create_table(
        "draws",
        _text("draw", primary_key=True),
        _text("task"),
        _text("submission"),
        sa.Column("round", sa.Integer, nullable=False),
        *(_bytes(name) for name in ("anchor", "sigma", "reveal_salt", "seed", "pool_root", "pool_weight")),
        _large("pool_size"),
        _large("pool_version"),
        _text("curve"),
        sa.Column("alpha_millis", sa.Integer, nullable=False),
        sa.Column("assigned", sa.Integer, nullable=False),
        _text("submitter"),
        sa.Column("places", sa.Text, nullable=False),
        _large("draw_time_us"),
        sa.UniqueConstraint("submission", "round", name="one_draw_for_each_round"),
    )
    op.create_table(
        "charges",
        _text("draw", primary_key=True),
        _text("participant", primary_key=True),
        _text("task"),
        _large("rate_window"),
        _text("settlement"),
    )
    op.create_index("ix_charges_quota", "charges", ["task", "rate_window", "participant", "settlement"])
