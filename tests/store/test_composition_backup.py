"""A database's backup as deploy/backup makes it: one that was cut off is never taken for whole."""

import os
import re
import subprocess
from pathlib import Path

import psycopg
import pytest

from tests.support.postgres_server import PostgresServer, programs

SCRIPT = Path(__file__).parents[2] / "deploy/backup"
ROWS = 2000


def command(beginning: str) -> str:
    """What the script has run in the database's container: the one command that begins so."""
    (found,) = re.findall(rf"({re.escape(beginning)}[^\"<>\n]*)", SCRIPT.read_text())
    assert isinstance(found, str)
    return found.strip()


def run(asked: str, url: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs a command of the script with the database of that URL in the place of the arena's."""
    name, host = re.findall(r"///(\w+)\?host=([^&]+)", url)[0]
    for here, there in (("127.0.0.1", host), ("--username $name", "--username postgres"), ("$name", name)):
        asked = asked.replace(here, there)
    path = f"{programs()}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["sh", "-c", asked], input=given, capture_output=True, env={**os.environ, "PATH": path})


def tables(url: str) -> list[tuple[str, int]]:
    """The tables, each with its number of rows."""
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        names = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1").fetchall()
        counts = [connection.execute(f"SELECT count(*) FROM {name}").fetchall() for (name,) in names]  # type: ignore[arg-type, unused-ignore]
    return [(name, count) for (name,), ((count,),) in zip(names, counts, strict=True)]


@pytest.fixture
def filled(postgres: PostgresServer) -> str:
    """The URL of a database with two tables."""
    url = postgres.database()
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        for name in ("first", "second"):
            made = f"SELECT n AS number, md5(n::text) AS word FROM generate_series(1, {ROWS}) AS n"
            connection.execute(f"CREATE TABLE {name} AS {made}")  # type: ignore[arg-type, unused-ignore]
            connection.execute(f"ALTER TABLE {name} ADD PRIMARY KEY (number)")  # type: ignore[arg-type, unused-ignore]
    return url


def test_a_dump_restores_only_whole_and_only_where_nothing_is(postgres: PostgresServer, filled: str) -> None:
    dump, check, restore = command("pg_dump "), command("pg_restore --file"), command("pg_restore --single")
    made = run(dump, filled)
    assert made.returncode == 0, made.stderr
    whole, empty = made.stdout, postgres.database()
    # Also where a block of rows has ended, and right at the end.
    ends = [found.end() for found in re.finditer(rb"\0{4,}", whole)]
    for end in sorted({*range(0, len(whole), len(whole) // 8), *ends[-4:], len(whole) - 1} - {len(whole)}):
        for asked, url in ((check, filled), (restore, empty)):
            assert run(asked, url, whole[:end]).returncode != 0, end
        assert tables(empty) == []
    checked = run(check, filled, whole)
    assert checked.returncode == 0, checked.stderr
    assert run(restore, empty, whole).returncode == 0
    assert tables(empty) == tables(filled) == [("first", ROWS), ("second", ROWS)]
    assert run(restore, empty, whole).returncode != 0
    assert tables(empty) == tables(filled)
