"""What lies in columns, and how to get at it fast: times as microseconds since 1970, weights as 16 bytes big-endian."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from operator import itemgetter
from typing import Any, cast

from sqlalchemy import Connection, Table
from sqlmodel import Session, SQLModel

from services.runtime.engines import placeholder

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WEIGHT_BYTES = 16
_CONNECTION = "connection"


def to_us(time: datetime) -> int:
    """Microseconds since 1970."""
    since = time - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def from_us(microseconds: int) -> datetime:
    """A time in UTC."""
    return _EPOCH + timedelta(microseconds=microseconds)


def weight_bytes(weight: int) -> bytes:
    """A weight below 2^128."""
    return weight.to_bytes(_WEIGHT_BYTES, "big")


def weight_of(column: bytes) -> int:
    """The weight in a column."""
    return int.from_bytes(column, "big")


def table_of(row: type[SQLModel]) -> Table:
    """The table of a row, for statements that do without objects: a draw is made of them."""
    return cast(Table, row.__table__)  # type: ignore[attr-defined]


def insert_rows(session: Session, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Inserts rows that name every column, without the compiler: it would take longer than the database."""
    if rows:
        names = tuple(table.c.keys())
        connection = connection_of(session)
        statement = _insertion(table.name, names, placeholder(connection))
        connection.exec_driver_sql(statement, list(map(itemgetter(*names), rows)))


@cache
def _insertion(table: str, names: tuple[str, ...], mark: str) -> str:
    return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join([mark] * len(names))})"  # noqa: S608 - names of ours


def connection_of(session: Session) -> Connection:
    """The session's connection, with everything written that the session still holds back."""
    session.flush()
    known: Connection | None = session.info.get(_CONNECTION)
    if known is None:
        # A session has one connection for its one transaction, and asking for it costs a third of a statement.
        known = session.info[_CONNECTION] = session.connection()
    return known
