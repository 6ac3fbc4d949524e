"""How a database would answer a question: each step of each statement's plan, told alike of SQLite and PostgreSQL."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import Connection

Question = Callable[[Connection], object]

# A small table is read as a whole, and a few rows are sorted, whatever indexes there are. Where a plan does so though
# this is switched off, there is no index that would do.
_WITHOUT_INDEX = ("seqscan", "hashjoin", "mergejoin")
_WITHOUT_ORDER = ("sort", "bitmapscan")
_FIRST_COLUMN = """
    SELECT attname FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
    WHERE indexrelid = CAST(%s AS regclass)
"""


@dataclass(frozen=True)
class Step:
    """One step of a plan. `text` is the database's own word."""

    text: str
    whole_table: bool = False
    """Reads all rows of a table as they lie."""
    whole_index: bool = False
    """Reads an index that no condition on its first column narrows: all of it, unless there is a limit."""
    sorts: bool = False
    rows: int = 0
    """How many rows it looked at; SQLite doesn't tell."""


class Plans:
    """Asks a database for its plans, for the schema and the rows that are there, if any."""

    def __init__(self, url: str) -> None:
        self._engine: Engine = create_engine(url)
        self._plans = _plans_of_sqlite if self._engine.dialect.name == "sqlite" else _plans_of_postgres

    def close(self) -> None:
        """Hang up."""
        self._engine.dispose()

    def of(self, ask: Question, *, in_order: bool = False) -> list[Step]:
        """The plan of each statement that a question takes; `in_order` where an index should give the order, too."""
        with self._engine.connect() as connection:
            return list(self._plans(connection, ask, in_order))


def _plans_of_sqlite(connection: Connection, ask: Question, in_order: bool) -> Iterator[Step]:
    asked: list[str] = []
    connection.begin()
    # The driver's own word, with the parameters written out: not every question goes through SQLAlchemy's events.
    driver: Any = connection.connection.driver_connection
    driver.set_trace_callback(asked.append)
    ask(connection)
    driver.set_trace_callback(None)
    for question in asked:
        for row in driver.execute(f"EXPLAIN QUERY PLAN {question}"):
            text = row[3]
            scan = text.startswith("SCAN") and "CONSTANT ROW" not in text
            indexed = "USING INDEX" in text or "USING COVERING INDEX" in text
            yield Step(text, scan and not indexed, scan and indexed, sorts="TEMP B-TREE" in text)


def _plans_of_postgres(connection: Connection, ask: Question, in_order: bool) -> Iterator[Step]:
    asked: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        asked.append((statement, parameters))

    for method in (*_WITHOUT_INDEX, *(_WITHOUT_ORDER if in_order else ())):
        connection.exec_driver_sql(f"SET enable_{method} = off")
    event.listen(connection, "before_cursor_execute", note)
    ask(connection)
    event.remove(connection, "before_cursor_execute", note)
    for statement, parameters in asked:
        explain = "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON, COSTS OFF)"
        plan = connection.exec_driver_sql(f"{explain} {statement}", parameters).scalar_one()
        yield from _steps_of_postgres(connection, plan[0]["Plan"])


def _steps_of_postgres(connection: Connection, node: dict[str, Any]) -> Iterator[Step]:
    kind = node["Node Type"]
    told = {name: value for name, value in node.items() if name not in ("Plans", "Parallel Aware", "Async Capable")}
    yield Step(
        str(told),
        whole_table=kind == "Seq Scan",
        whole_index="Index Name" in node
        and not _is_narrowed(connection, node["Index Name"], node.get("Index Cond", "")),
        sorts="Sort" in kind,
        rows=node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)),
    )
    for below in node.get("Plans", ()):
        yield from _steps_of_postgres(connection, below)


def _is_narrowed(connection: Connection, index: str, condition: str) -> bool:
    first: str = connection.exec_driver_sql(_FIRST_COLUMN, (index,)).scalar_one()
    return re.search(rf"\b{first}\b", condition) is not None
