"""How questions are asked: one record by its key, or a list in SQL, on one connection."""

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import Executable, Select
from sqlalchemy.engine import Connection

from services.registry.rows import RowsOf
from services.runtime.engines import placeholder

R = TypeVar("R")


class Asking:
    """What all questions stand on; what they answer are records, never rows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _load(self, kind: RowsOf[R], *key: Any) -> R | None:
        """The record with this key."""
        rows = self._execute(kind.reading(placeholder(self._connection)), key)
        return kind.record(rows[0]) if rows else None

    def _all(self, kind: RowsOf[R], *, order: tuple[str, ...], **where: Any) -> list[R]:
        """All records with these values in these columns: for lists that are read with every other call."""
        statement = kind.listing(placeholder(self._connection), tuple(where), order)
        return [kind.record(row) for row in self._execute(statement, tuple(where.values()))]

    def _execute(self, statement: str, values: tuple[Any, ...]) -> Sequence[Any]:
        return self._connection.exec_driver_sql(statement, values).all()

    def _ask(self, query: Executable) -> Sequence[Any]:
        """The rows that a query finds."""
        return self._connection.execute(query).all()

    def _one(self, query: Select[Any]) -> Any:
        """The first column of the first row that a query finds, None where there is none."""
        found = self._ask(query)
        return found[0][0] if found else None

    def _records(self, kind: RowsOf[R], query: Select[Any]) -> list[R]:
        """The records that a `kind.query()` finds."""
        return [kind.record(row) for row in self._ask(query)]

    def _placed(self, kind: RowsOf[R], query: Select[Any]) -> list[tuple[int, R]]:
        """As `_records`, each with its position, for a `kind.query(kind.c.position)`."""
        return [(row.position, kind.record(row)) for row in self._ask(query)]
