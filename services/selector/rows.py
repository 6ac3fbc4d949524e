"""The selector's tables. Times are microseconds since 1970, weights 16 bytes big-endian; rows never leave the store."""

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData
from sqlmodel import Field, SQLModel


def _bytes() -> Column[bytes]:
    return Column(LargeBinary, nullable=False)


def _large() -> Column[int]:
    return Column(BigInteger, nullable=False)


class SelectorRow(SQLModel):
    """Keeps the tables apart from those of another service in the same process."""

    metadata = MetaData()


class AccountsRow(SelectorRow, table=True):
    """Where one participant's micro-units lie."""

    __tablename__ = "accounts"

    participant: str = Field(primary_key=True)
    available_micros: int = Field(sa_column=_large())
    locked_micros: int = Field(sa_column=_large())
    unbonding_micros: int = Field(sa_column=_large())
    slashed_micros: int = Field(sa_column=_large())


class DepositRow(SelectorRow, table=True):
    """A payment. `total_micros` is the sum of all deposits up to this one, in order of `number`."""

    __tablename__ = "deposits"

    reference: str = Field(primary_key=True)
    number: int = Field(unique=True)
    participant: str
    amount_micros: int = Field(sa_column=_large())
    funding_account: str
    total_micros: int = Field(sa_column=_large())


class UnbondingRow(SelectorRow, table=True):
    """Stake on its way out."""

    __tablename__ = "unbondings"

    participant: str = Field(primary_key=True)
    number: int = Field(primary_key=True)
    amount_micros: int = Field(sa_column=_large())
    release_time_us: int = Field(sa_column=_large())


class SlashRow(SelectorRow, table=True):
    """A punishment by its evidence."""

    __tablename__ = "slashes"

    participant: str = Field(primary_key=True)
    evidence: str = Field(primary_key=True)
    fault: str
    taken_micros: int = Field(sa_column=_large())


class EventRow(SelectorRow, table=True):
    """A ledger event."""

    __tablename__ = "ledger_events"

    # SQLite orders a table by a key that is called INTEGER, and keeps any other beside it.
    sequence: int = Field(
        sa_column=Column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False)
    )
    kind: str
    time_us: int = Field(sa_column=_large())
    participant: str
    amount_micros: int = Field(sa_column=_large())
    task: str
    draw: str
    owner_group: str
    weight: bytes = Field(sa_column=_bytes())
    reference: str
    funding_account: str
    fault: str


class OwnerGroupRow(SelectorRow, table=True):
    """The owner group of a participant that does not stand alone, or stood alone before others joined it."""

    __tablename__ = "owner_groups"

    participant: str = Field(primary_key=True)
    owner_group: str = Field(index=True)


class FundingAccountRow(SelectorRow, table=True):
    """The first participant who was funded from an account."""

    __tablename__ = "funding_accounts"

    funding_account: str = Field(primary_key=True)
    participant: str


class PoolRow(SelectorRow, table=True):
    """A task's pool with its policy."""

    __tablename__ = "pools"

    task: str = Field(primary_key=True)
    curve: str
    alpha_millis: int
    validator_min_stake_micros: int = Field(sa_column=_large())
    training_node_min_stake_micros: int = Field(sa_column=_large())
    window_us: int = Field(sa_column=_large())
    quota_limit: int = Field(sa_column=_large())
    reference_stake_micros: int = Field(sa_column=_large())
    open_time_us: int = Field(sa_column=_large())
    creator: str
    closed: bool
    version: int = Field(sa_column=_large())
    leaf_count: int = Field(sa_column=_large())
    root: bytes = Field(sa_column=_bytes())


class CandidateRow(SelectorRow, table=True):
    """A member of a pool, there or gone."""

    __tablename__ = "candidates"

    task: str = Field(primary_key=True)
    participant: str = Field(primary_key=True, index=True)
    role: str
    evidence: str
    """JSON list."""
    explanation: str
    decide_time_us: int = Field(sa_column=_large())
    locked_micros: int = Field(sa_column=_large())
    weight: bytes = Field(sa_column=_bytes())
    active: bool


class LeafRow(SelectorRow, table=True):
    """A group's leaf from one version of its pool on."""

    __tablename__ = "leaves"

    task: str = Field(primary_key=True)
    version: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    leaf_index: int = Field(sa_column=_large())
    owner_group: str
    stake_micros: int = Field(sa_column=_large())
    weight: bytes = Field(sa_column=_bytes())


class SeatRow(SelectorRow, table=True):
    """That a participant can be picked by way of a leaf, from version `since` until before `until`."""

    __tablename__ = "seats"

    task: str = Field(primary_key=True)
    participant: str = Field(primary_key=True)
    since: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    until: int | None = Field(sa_column=Column(BigInteger, nullable=True))
    leaf_index: int = Field(sa_column=_large())


class DrawRow(SelectorRow, table=True):
    """A draw with all places so far."""

    __tablename__ = "draws"

    draw: str = Field(primary_key=True)
    task: str
    submission: str
    round: int
    anchor: bytes = Field(sa_column=_bytes())
    sigma: bytes = Field(sa_column=_bytes())
    reveal_salt: bytes = Field(sa_column=_bytes())
    seed: bytes = Field(sa_column=_bytes())
    pool_root: bytes = Field(sa_column=_bytes())
    pool_weight: bytes = Field(sa_column=_bytes())
    pool_size: int = Field(sa_column=_large())
    pool_version: int = Field(sa_column=_large())
    curve: str
    alpha_millis: int
    assigned: int
    submitter: str
    places: str
    """JSON list."""
    draw_time_us: int = Field(sa_column=_large())


class ChargeRow(SelectorRow, table=True):
    """One use of a quota."""

    __tablename__ = "charges"

    draw: str = Field(primary_key=True)
    participant: str = Field(primary_key=True)
    task: str
    rate_window: int = Field(sa_column=_large())
    settlement: str


class QuotaUseRow(SelectorRow, table=True):
    """How many charges of a participant in one rate window stand."""

    __tablename__ = "quota_uses"

    task: str = Field(primary_key=True)
    rate_window: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    participant: str = Field(primary_key=True)
    used: int = Field(sa_column=_large())
