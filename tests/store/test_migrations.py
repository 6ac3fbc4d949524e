"""Every service's database goes up from every earlier revision with data in all its tables, and keeps them."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Boolean, Column, Integer, LargeBinary, MetaData, Numeric, create_engine, inspect, select

from services.runtime.database import Database

SERVICES = ("registry", "selector", "trainer", "validator")
ROWS = 3
# Beyond every key that a migration makes itself.
FIRST_KEY = 1000


def versions(service: str) -> list[Path]:
    """A service's migrations, the first one first."""
    package = import_module(f"services.{service}.migrations")
    return sorted((Path(package.__path__[0]) / "versions").glob("[0-9]*.py"))


EARLIER = [(service, number) for service in SERVICES for number in range(1, len(versions(service)))]


def value(column: Column[Any], row: int) -> Any:
    """Something that tells this row from the others, of the column's type."""
    if isinstance(column.type, Boolean):
        return bool(row % 2)
    if isinstance(column.type, LargeBinary):
        return bytes([row]) * 16
    if isinstance(column.type, Integer | Numeric):
        return FIRST_KEY + row
    return f"{column.name} {row}"


def contents(url: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of every table, in the order of the key."""
    engine = create_engine(url)
    tables = MetaData()
    with engine.connect() as connection:
        tables.reflect(connection)
        found = {
            table.name: [
                dict(row) for row in connection.execute(select(table).order_by(*table.primary_key.columns)).mappings()
            ]
            for table in tables.sorted_tables
            if not table.name.startswith("alembic")
        }
    engine.dispose()
    return found


def schema(url: str) -> dict[str, Any]:
    """Columns, keys and indexes of every table."""
    engine = create_engine(url)
    looked = inspect(engine)
    found = {
        name: (
            {each["name"]: (str(each["type"]), each["nullable"]) for each in looked.get_columns(name)},
            sorted(looked.get_pk_constraint(name)["constrained_columns"]),
            sorted((str(each["name"]), tuple(each["column_names"])) for each in looked.get_indexes(name)),
        )
        for name in looked.get_table_names()
        if not name.startswith("alembic")
    }
    engine.dispose()
    return found


@pytest.mark.parametrize(("service", "number"), EARLIER, ids=[f"{service}-{number:04}" for service, number in EARLIER])
async def test_an_earlier_database_goes_up_with_its_data(
    service: str, number: int, database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "earlier/versions").mkdir(parents=True)
    for migration in versions(service)[:number]:
        shutil.copy(migration, tmp_path / "earlier/versions")
    await Database.open(database_url, migrations=tmp_path / "earlier").close()
    engine = create_engine(database_url)
    tables = MetaData()
    with engine.begin() as connection:
        tables.reflect(connection)
        for table in tables.sorted_tables:
            if not table.name.startswith("alembic"):
                rows = [{column.name: value(column, row) for column in table.columns} for row in range(ROWS)]
                connection.execute(table.insert(), rows)
    engine.dispose()
    before = contents(database_url)

    await Database.open(database_url, migrations=f"services.{service}.migrations").close()

    after = contents(database_url)
    for table_name, rows in before.items():
        assert len(rows) >= ROWS
        kept = [{name: row[name] for name in rows[0] if name in row} for row in after[table_name]]
        wanted = [{name: row[name] for name in kept[0]} for row in rows]
        assert kept == wanted, table_name
    fresh = f"sqlite:///{tmp_path}/fresh.db"
    if database_url.startswith("sqlite"):
        await Database.open(fresh, migrations=f"services.{service}.migrations").close()
        assert schema(database_url) == schema(fresh)
