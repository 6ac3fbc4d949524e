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
        row = self._connection.exec_driver_sql(kind.reading(placeholder(self._connection)), key).first()
        return None if row is None else kind.record(row)

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
