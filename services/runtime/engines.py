"""SQLAlchemy engines set up for SQLite and PostgreSQL, and the migrations run under a lock."""

import contextlib
import fcntl
import importlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import BindParameter, Select, bindparam, event, text
from sqlalchemy.engine import Connection, Dialect, Engine, RootTransaction, make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import QueuePool
from sqlmodel import create_engine

from services.runtime import migrations as shared_environment

_BUSY_TIMEOUT_MS = 10_000
_MIGRATION_LOCK = 0x74696C74  # any constant that all services agree on ("tilt")
_SERIALIZATION_STATES = ("40001", "40P01")  # serialization_failure, deadlock_detected
# libpq would wait for a server that is gone without a word for as long as the kernel does, a quarter of an hour.
_POSTGRES_PATIENCE = {
    "connect_timeout": 10,  # seconds, as the next two
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds
}
# The same from the other end: the server would keep the session of a machine that is gone, and with it the locks, of
# which one says who is active, for two hours. These are of every PostgreSQL from 12 on.
_POSTGRES_SESSION = (
    "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3; "
    "SET tcp_user_timeout = 25000"
)


def writing_engine(url: str) -> Engine:
    """An engine of one connection whose transactions may write."""
    if _is_sqlite(url):
        # IMMEDIATE takes the write lock at once: a transaction that read first can no longer fail to upgrade.
        pragmas = ("journal_mode=WAL", "synchronous=FULL")
        engine = _sqlite_engine(url, begin="BEGIN IMMEDIATE", connections=1, pragmas=pragmas)
    else:
        engine = postgres_engine(url, pool_size=1, max_overflow=0, isolation_level="SERIALIZABLE", pool_pre_ping=True)
    _ready_made_savepoints(engine.dialect)
    return engine


def reading_engine(url: str, *, readers: int) -> Engine:
    """An engine whose transactions see one snapshot and cannot write."""
    if not _is_sqlite(url):
        engine = postgres_engine(
            url, pool_size=readers, max_overflow=0, isolation_level="REPEATABLE READ", pool_pre_ping=True
        )

        @event.listens_for(engine, "begin")
        def read_only(connection: Connection) -> None:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")

        return engine
    return _sqlite_engine(url, begin="BEGIN", connections=readers, pragmas=("query_only=ON",))


def postgres_engine(url: str, **options: Any) -> Engine:
    """An engine whose connections notice within half a minute that the server is gone, and the server that we are.

    For ours the URL may say otherwise.
    """
    parsed = make_url(url)
    patience = _POSTGRES_PATIENCE if parsed.get_driver_name().startswith("psycopg") else {}
    own = {name: value for name, value in patience.items() if name not in parsed.query}
    engine = create_engine(parsed, connect_args=own, **options)

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        with contextlib.closing(connection.cursor()) as cursor:
            cursor.execute(_POSTGRES_SESSION)
        # Rolled back it would be as if never said.
        connection.commit()

    return engine


def _ready_made_savepoints(dialect: Dialect) -> None:
    """Spares each savepoint SQLAlchemy's compiler, which makes these three statements anew every time.

    That is 80 of 130 microseconds for an empty session in a savepoint. The names are SQLAlchemy's own, plain words.
    """

    def savepoint(connection: Connection, name: str) -> None:
        _run(connection, f"SAVEPOINT {name}")

    def release(connection: Connection, name: str) -> None:
        _run(connection, f"RELEASE SAVEPOINT {name}")

    def roll_back(connection: Connection, name: str) -> None:
        _run(connection, f"ROLLBACK TO SAVEPOINT {name}")

    vars(dialect).update(do_savepoint=savepoint, do_release_savepoint=release, do_rollback_to_savepoint=roll_back)


def placeholder(connection: Connection) -> str:
    """How the driver marks a positional parameter, for statements that are written once and bypass the compiler."""
    return "?" if connection.dialect.name == "sqlite" else "%s"


Values = Sequence[Any] | Mapping[str, Any]
"""Of a statement's parameters, by position or by name."""


def given(name: str) -> BindParameter[Any]:
    """Stands in a `Written` query for a value that each question brings under this name."""
    return bindparam(name, required=False)


class Written:
    """A query that is put into SQL once for each driver, and asked with values for what is `given` in it.

    SQLAlchemy finds a query that it has seen before by all that the query consists of, each time anew: of a question of
    the background loop, which mostly finds nothing, that is nine tenths of the time.
    """

    def __init__(self, query: Select[Any]) -> None:
        self._query = query
        self._by_driver: dict[str, tuple[str, Mapping[str, Any], Sequence[str] | None]] = {}

    def ask(self, connection: Connection, **values: Any) -> Sequence[Any]:
        """The rows that it finds inside the connection's transaction."""
        return found_rows(connection, *self._given(connection, values))

    def ask_first(self, connection: Connection, **values: Any) -> Sequence[Any]:
        """The first of the rows that it finds, or none."""
        return found_rows(connection, *self._given(connection, values), most=1)

    def _given(self, connection: Connection, values: Mapping[str, Any]) -> tuple[str, Values]:
        known = self._by_driver.get(connection.dialect.name)
        if known is None:
            known = self._by_driver[connection.dialect.name] = self._write(connection.dialect)
        statement, constants, positions = known
        named = {**constants, **values}
        return statement, named if positions is None else [named[name] for name in positions]

    def _write(self, dialect: Dialect) -> tuple[str, Mapping[str, Any], Sequence[str] | None]:
        written = self._query.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        return str(written), written.params, written.positiontup if written.positional else None


def found_rows(connection: Connection, statement: str, values: Values, *, most: int | None = None) -> Sequence[Any]:
    """The rows that a question in the driver's SQL finds in the connection's transaction, or the first `most` of them.

    SQLite answers many questions in a microsecond, for each of which SQLAlchemy makes a context and a result of its
    own: from 13 microseconds for one column to 30 for forty.
    """
    if connection.dialect.name != "sqlite":
        return _found_by(connection, statement, values, most)
    if not connection.in_transaction():
        connection.begin()
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement, values)
        return cursor.fetchall() if most is None else cursor.fetchmany(most)
    except sqlite3.Error:
        # Asked again the long way: what fails is told, and dealt with, in SQLAlchemy's terms.
        return _found_by(connection, statement, values, most)
    finally:
        cursor.close()


def _found_by(connection: Connection, statement: str, values: Values, most: int | None) -> Sequence[Any]:
    with connection.exec_driver_sql(statement, _driver_values(values)) as found:
        return found.all() if most is None else found.fetchmany(most)


def begin_at_once(connection: Connection) -> RootTransaction | None:
    """Begins a transaction, or answers None where another process is writing to the file: `begin` waits for it."""
    if connection.dialect.name != "sqlite":
        return connection.begin()
    _run(connection, "PRAGMA busy_timeout=0")
    try:
        return connection.begin()
    except OperationalError as error:
        if getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_BUSY:
            raise
        return None
    finally:
        _run(connection, f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")


def look_afresh(connection: Connection) -> None:
    """Ends the snapshot of a connection that is always in a transaction; its next question sees what is there by then.

    For SQLite, whose BEGIN holds nothing until something is read. SQLAlchemy's own transactions cost far more.
    """
    if not connection.in_transaction():
        connection.begin()
        return
    _run(connection, "ROLLBACK")
    _run(connection, "BEGIN")


def run_many(connection: Connection, statement: str, rows: Sequence[Sequence[Any]]) -> None:
    """Runs a statement in the driver's SQL once for each row of values, inside the connection's transaction."""
    if connection.dialect.name != "sqlite":
        connection.exec_driver_sql(statement, list(map(tuple, rows)))
        return
    with contextlib.closing(connection.connection.cursor()) as cursor:
        try:
            cursor.executemany(statement, rows)
        except sqlite3.Error as error:
            raise DBAPIError.instance(statement, None, error, sqlite3.Error, dialect=connection.dialect) from error


def _run(connection: Connection, statement: str) -> None:
    """Runs a statement that has neither values nor rows, as `found_rows` asks a question."""
    if connection.dialect.name == "sqlite":
        # What fails is run again the long way, which tells it in SQLAlchemy's terms.
        with contextlib.suppress(sqlite3.Error), contextlib.closing(connection.connection.cursor()) as cursor:
            cursor.execute(statement)
            return
    connection.exec_driver_sql(statement)


def _driver_values(values: Values) -> tuple[Any, ...] | Mapping[str, Any]:
    return values if isinstance(values, Mapping) else tuple(values)


def is_serialization_failure(error: BaseException) -> bool:
    """Whether PostgreSQL asks for the transaction to be run again."""
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    return state in _SERIALIZATION_STATES


def migrate(url: str, migrations: Path | ModuleType | str) -> None:
    """Brings the database at `url` to the newest version in `migrations`/versions; one process at a time does so.

    Raises RuntimeError where another version of the code has taken it further than these migrations know.
    """
    config = Config()
    config.set_main_option("path_separator", "newline")
    config.set_main_option("script_location", str(Path(shared_environment.__path__[0])).replace("%", "%%"))
    config.set_main_option("version_locations", str(_folder(migrations) / "versions").replace("%", "%%"))
    if _is_sqlite(url):
        _sqlite_path(url).parent.mkdir(parents=True, exist_ok=True)
    engine = writing_engine(url)
    try:
        with _sqlite_lock(url), engine.connect() as connection:
            if not _is_sqlite(url):
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            _refuse_unknown(connection, config)
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()
    finally:
        engine.dispose()


def _refuse_unknown(connection: Connection, config: Config) -> None:
    known = {each.revision for each in ScriptDirectory.from_config(config).walk_revisions()}
    for revision in MigrationContext.configure(connection).get_current_heads():
        if revision not in known:
            raise RuntimeError(
                f"the database is at revision {revision}, which this version does not know: a newer version has "
                "migrated it, or it is another service's; start that one, or restore the backup from before"
            )


def _is_sqlite(url: str) -> bool:
    return make_url(url).get_backend_name() == "sqlite"


def _sqlite_path(url: str) -> Path:
    name = make_url(url).database
    if not name or name == ":memory:":
        raise ValueError("the database must be a file: writer and readers have connections of their own")
    return Path(name)


def _folder(migrations: Path | ModuleType | str) -> Path:
    if isinstance(migrations, Path):
        return migrations
    package = importlib.import_module(migrations) if isinstance(migrations, str) else migrations
    return Path(next(iter(package.__path__)))


@contextmanager
def _sqlite_lock(url: str) -> Iterator[None]:
    if not _is_sqlite(url):
        yield
        return
    path = _sqlite_path(url)
    # The lock goes with the process that held it: a killed migration blocks nobody.
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sqlite_engine(url: str, *, begin: str, connections: int, pragmas: tuple[str, ...]) -> Engine:
    _sqlite_path(url)
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
        # The pool hands a connection to one thread at a time.
        connect_args={"check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        # sqlite3 would begin transactions by itself, and not before a SAVEPOINT or DDL: it must not begin any.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (f"busy_timeout={_BUSY_TIMEOUT_MS}", "foreign_keys=ON", *pragmas):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin_transaction(connection: Connection) -> None:
        _run(connection, begin)

    return engine
