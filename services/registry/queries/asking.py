"""How questions are asked: one record by its key, or a list in SQL, on one connection."""

from collections.abc import Sequence
from operator import eq, ge, gt, le, lt
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Executable, Select, tuple_
from sqlalchemy.engine import Connection

from services.registry.listing import Condition, Listing, Place
from services.registry.rows import RowsOf
from services.runtime.engines import Written, found_rows, placeholder

R = TypeVar("R")

_COMPARISONS = {"=": eq, "<": lt, "<=": le, ">": gt, ">=": ge}


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
        return found_rows(self._connection, statement, values)

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

    def _found(self, kind: RowsOf[R], question: Written, **values: Any) -> list[R]:
        """The records that a `kind.query()` finds which is asked over and over."""
        return [kind.record(row) for row in self._rows(question, **values)]

    def _rows(self, question: Written, **values: Any) -> Sequence[Any]:
        return question.ask(self._connection, **values)

    def _placed(self, kind: RowsOf[R], query: Select[Any]) -> list[tuple[int, R]]:
        """As `_records`, each with its position, for a `kind.query(kind.c.position)`."""
        return [(row.position, kind.record(row)) for row in self._ask(query)]

    def _page(
        self, kind: RowsOf[R], listing: Listing, *where: Any, number: ColumnElement[int]
    ) -> list[tuple[Place, R]]:
        """The records of a page, each with its place. `number` is the column that tells those of one value apart."""
        order = kind.c[listing.order] if listing.order else number
        query = kind.query(number.label("place_number"), order.label("place_value"))
        query = query.where(*where, *(_fulfilled(kind, condition) for condition in listing.conditions))
        if listing.after is not None:
            beyond = lt if listing.descending else gt
            value, last = listing.after
            query = query.where(
                beyond(number, last) if order is number else beyond(tuple_(order, number), tuple_(value, last))
            )
        columns = (number,) if order is number else (order, number)
        query = query.order_by(*(column.desc() if listing.descending else column.asc() for column in columns))
        rows = self._ask(query.limit(listing.limit))
        return [((row.place_value, row.place_number), kind.record(row)) for row in rows]


def _fulfilled(kind: RowsOf[Any], condition: Condition) -> ColumnElement[bool]:
    column, value = kind.c[condition.field], kind.encoded(condition.field, condition.value)
    if condition.operator == "!=":
        return column.is_distinct_from(value)
    fulfilled: ColumnElement[bool] = _COMPARISONS[condition.operator](column, value)
    return fulfilled
