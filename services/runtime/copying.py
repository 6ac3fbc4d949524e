"""All rows of one database into another, of whatever kind the two are."""

from pathlib import Path
from types import ModuleType

from sqlalchemy import MetaData, Table, func, insert, select, text
from sqlalchemy.engine import Connection

from services.runtime.engines import migrate, reading_engine, writing_engine

_VERSION = "alembic_version"
_ROWS_AT_ONCE = 1000


class CopyRefused(Exception):
    """Databases that cannot be copied from or to."""


def copy_database(source: str, target: str, migrations: Path | ModuleType | str) -> None:
    """Copies one snapshot of the database at URL `source`, in use or not, into the one at `target`, in one transaction.

    `target` is brought to the newest version first, must hold no rows, and holds none when the copy fails. Raises
    CopyRefused for a source of another version or a target with rows.
    """
    migrate(target, migrations)
    reading, writing = reading_engine(source, readers=1), writing_engine(target)
    try:
        with reading.connect() as rows, writing.begin() as written:
            _copy(rows, written)
    finally:
        reading.dispose()
        writing.dispose()


def holds_rows(url: str) -> bool:
    """Whether any table of a database, which need not have one, holds a row."""
    engine = reading_engine(url, readers=1)
    try:
        with engine.connect() as connection:
            return any(_has_rows(connection, table) for table in _tables(connection).values())
    finally:
        engine.dispose()


def _copy(source: Connection, target: Connection) -> None:
    theirs, ours = _tables(source), _tables(target)
    if _version(source) != _version(target):
        raise CopyRefused(
            f"the database is of version {_version(source)}, this program of {_version(target)}: start the service once"
        )
    for name, table in ours.items():
        if _has_rows(target, table):
            raise CopyRefused(f"the database to copy into holds {name} already")
        rows = source.execution_options(yield_per=_ROWS_AT_ONCE).execute(select(theirs[name])).mappings()
        for some in rows.partitions():
            target.execute(insert(table), [dict(row) for row in some])
        if target.dialect.name == "postgresql":
            _go_on_counting(target, table)


def _go_on_counting(target: Connection, table: Table) -> None:
    """PostgreSQL numbers rows by a sequence, which knows nothing of rows that came with their numbers."""
    for column in table.primary_key:
        named = {"table": table.name, "column": column.name}
        sequence = target.execute(text("SELECT pg_get_serial_sequence(:table, :column)"), named).scalar()
        last = target.execute(select(func.max(column))).scalar() if sequence else None
        if last is not None:
            target.execute(text("SELECT setval(:sequence, :last)"), {"sequence": sequence, "last": last})


def _tables(connection: Connection) -> dict[str, Table]:
    found = MetaData()
    found.reflect(connection)
    return {table.name: table for table in found.sorted_tables if table.name != _VERSION}


def _has_rows(connection: Connection, table: Table) -> bool:
    return connection.execute(select(func.count()).select_from(select(table).limit(1).subquery())).scalar_one() > 0


def _version(connection: Connection) -> str | None:
    version: str | None = connection.execute(text(f"SELECT version_num FROM {_VERSION}")).scalar()  # noqa: S608
    return version
