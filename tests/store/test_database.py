"""The database: group commit, isolation of neighbours, snapshots, remembered requests, migrations under a lock."""

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, NullPool, event, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlmodel import Field, Session, SQLModel, select

from services.runtime.database import Database
from services.runtime.engines import found_rows, postgres_engine, reading_engine, writing_engine
from services.runtime.errors import AlreadyExists, DiskFull, Unavailable
from services.runtime.idempotency import PendingRequest, Replayed, _pending
from services.runtime.writer import Group
from tests.support.postgres_server import PostgresServer

_FIRST = '''
"""The first tables."""
import sqlalchemy as sa
from alembic import op
from services.runtime.database import create_remembered_requests

revision, down_revision, branch_labels, depends_on = "1", None, None, None

def upgrade():
    create_remembered_requests(op)
    op.create_table("marks", sa.Column("name", sa.String, primary_key=True), sa.Column("count", sa.Integer))
'''
_SECOND_FAILS = '''
"""Creates a table and dies."""
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "2", "1", None, None

def upgrade():
    op.create_table("halfway", sa.Column("name", sa.String, primary_key=True))
    raise OSError("the power went out")
'''


class Mark(SQLModel, table=True):
    __tablename__ = "marks"

    name: str = Field(primary_key=True)
    count: int


class FakeClock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    versions = tmp_path / "migrations" / "versions"
    versions.mkdir(parents=True)
    (versions / "first.py").write_text(_FIRST)
    return tmp_path / "migrations"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state' / 'test.db'}"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def database(url: str, migrations: Path, clock: FakeClock) -> AsyncIterator[Database]:
    opened = Database.open(url, migrations=migrations, clock=clock)
    yield opened
    await opened.close()


def put(name: str, count: int = 0) -> Callable[[Session], str]:
    def work(session: Session) -> str:
        session.add(Mark(name=name, count=count))
        return name

    return work


def names(session: Session) -> list[str]:
    return sorted(mark.name for mark in session.exec(select(Mark)))


async def test_a_write_is_seen_by_the_next_read_and_by_another_process(database: Database, tmp_path: Path) -> None:
    assert await database.write(put("a")) == "a"
    assert await database.read(names) == ["a"]
    other = sqlite3.connect(tmp_path / "state" / "test.db")
    assert other.execute("SELECT name FROM marks").fetchall() == [("a",)]
    other.close()


async def _hold_the_writer(database: Database) -> tuple[threading.Event, "asyncio.Task[None]"]:
    """Keeps the writer busy, so that what is written meanwhile becomes one group."""
    begun, release = threading.Event(), threading.Event()

    def wait(session: Session) -> None:
        begun.set()
        release.wait(10)

    task = asyncio.create_task(database.write(wait))
    await asyncio.to_thread(begun.wait, 10)
    return release, task


async def test_writes_that_queue_up_share_one_commit_and_a_failing_one_harms_no_neighbour(database: Database) -> None:
    commits = []
    event.listen(database._write_engine, "commit", lambda connection: commits.append(1))
    release, held = await _hold_the_writer(database)

    def add_and_fail(session: Session) -> None:
        session.add(Mark(name="lost", count=0))
        session.flush()
        raise LookupError("no")

    writes = [asyncio.create_task(database.write(work)) for work in (put("a"), add_and_fail, put("a"), put("b"))]
    await asyncio.sleep(0)
    release.set()
    first, failed, twice, last = await asyncio.gather(*writes, return_exceptions=True)
    await held
    assert (first, last) == ("a", "b")
    assert isinstance(failed, LookupError)
    assert isinstance(twice, IntegrityError)
    assert await database.read(names) == ["a", "b"]
    assert len(commits) == 2  # the one that held the writer, and the group


async def test_a_failed_commit_reaches_every_work_of_the_group(database: Database) -> None:
    release, held = await _hold_the_writer(database)
    writes = [asyncio.create_task(database.write(put(name))) for name in "ab"]
    await asyncio.sleep(0)

    def fail(connection: object) -> None:
        raise OSError("disk full")

    release.set()
    await held
    event.listen(database._write_engine, "commit", fail)
    outcomes = await asyncio.gather(*writes, database.write(put("c")), return_exceptions=True)
    event.remove(database._write_engine, "commit", fail)
    assert isinstance(outcomes[2], OSError)
    stored = await database.read(names)
    # What was answered is there and what was refused is not, wherever the group's border fell.
    assert stored == [name for name, outcome in zip("abc", outcomes, strict=True) if outcome == name]
    assert await database.write(put("after")) == "after"


async def test_the_changes_of_a_work_that_commits_or_rolls_back_by_itself_stay_in_the_group(database: Database) -> None:
    def commits_then_fails(session: Session) -> None:
        session.add(Mark(name="lost", count=0))
        session.flush()
        session.rollback()
        session.add(Mark(name="kept", count=0))

    await database.write(commits_then_fails)
    assert await database.read(names) == ["kept"]


async def test_a_read_sees_one_snapshot_while_writes_go_on(database: Database) -> None:
    await database.write(put("a"))
    looked, go_on = threading.Event(), threading.Event()

    def look_twice(session: Session) -> tuple[list[str], list[str]]:
        before = names(session)
        looked.set()
        go_on.wait(10)
        session.expire_all()
        return before, names(session)

    reading = asyncio.create_task(database.read(look_twice))
    await asyncio.to_thread(looked.wait, 10)
    await database.write(put("b"))
    go_on.set()
    assert await reading == (["a"], ["a"])
    assert await database.read(names) == ["a", "b"]


async def test_a_read_cannot_write(database: Database) -> None:
    def sneak(session: Session) -> None:
        session.add(Mark(name="sneaked", count=0))
        session.flush()

    with pytest.raises(Unavailable) as refused:
        await database.read(sneak)
    assert "readonly" in str(refused.value.__cause__)
    assert await database.read(names) == []


async def test_foreign_keys_full_sync_and_wal_are_on(database: Database) -> None:
    def pragmas(session: Session) -> list[object]:
        run = session.connection().exec_driver_sql
        return [run(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous", "foreign_keys")]

    assert await database.write(pragmas) == ["wal", 2, 1]


async def test_a_closed_database_refuses(url: str, migrations: Path) -> None:
    database = Database.open(url, migrations=migrations)
    queued = [asyncio.create_task(database.write(put(str(number)))) for number in range(100)]
    await asyncio.sleep(0)
    await database.close()
    assert len(await asyncio.gather(*queued)) == 100
    with pytest.raises(Unavailable):
        await database.write(put("late"))
    with pytest.raises(Unavailable):
        await database.read(names)


async def test_several_starts_at_once_migrate_once(url: str, migrations: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: Database.open(url, migrations=migrations), range(4)))
    await opened[0].write(put("a"))
    assert await opened[3].read(names) == ["a"]
    for database in opened:
        await database.close()


async def test_a_migration_that_dies_leaves_nothing_behind(url: str, migrations: Path, tmp_path: Path) -> None:
    await Database.open(url, migrations=migrations).close()
    second = migrations / "versions" / "second.py"
    second.write_text(_SECOND_FAILS)
    with pytest.raises(OSError, match="power"):
        Database.open(url, migrations=migrations)
    connection = sqlite3.connect(tmp_path / "state" / "test.db")
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    connection.close()
    assert tables == {"alembic_version", "remembered_requests", "marks"}
    second.unlink()
    await Database.open(url, migrations=migrations).close()


async def test_a_database_that_a_newer_version_has_migrated_is_refused_untouched(
    database_url: str, migrations: Path
) -> None:
    second = migrations / "versions" / "second.py"
    second.write_text(_SECOND_FAILS.replace("raise OSError", "return; OSError"))
    await Database.open(database_url, migrations=migrations).close()
    second.unlink()
    shutil.rmtree(migrations / "versions" / "__pycache__", ignore_errors=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="at revision 2, which this version does not know"):
            Database.open(database_url, migrations=migrations)


def test_the_server_lets_go_of_a_machine_that_is_gone(postgres: PostgresServer) -> None:
    asked = text("SELECT name FROM pg_settings WHERE name LIKE 'tcp!_%' ESCAPE '!' AND source = 'session'")
    for engine in (
        writing_engine(postgres.database()),
        reading_engine(postgres.database(), readers=1),
        postgres_engine(postgres.database(), poolclass=NullPool, isolation_level="AUTOCOMMIT"),
    ):
        with engine.connect() as connection:
            told = set(connection.execute(asked).scalars())
        engine.dispose()
        assert told == {
            "tcp_keepalives_idle",
            "tcp_keepalives_interval",
            "tcp_keepalives_count",
            "tcp_user_timeout",
        }


def request(request_id: str = "r1", body: bytes = b"body", sub: str = "me") -> PendingRequest:
    return PendingRequest(
        sub=sub,
        method="test.v1.PutRequest",
        request_id=request_id,
        body_sha256=body,
        encode=lambda result: f"answer:{result}".encode(),
    )


async def under(
    database: Database, pending: PendingRequest, work: Callable[[Session], str], *, final: bool = True
) -> str:
    async def call() -> str:
        _pending.set(pending)
        return await database.write(work, final=final)

    return await asyncio.create_task(call())


async def test_a_remembered_request_replays_and_changes_nothing(database: Database) -> None:
    assert await under(database, request(), put("a")) == "a"
    with pytest.raises(Replayed) as replayed:
        await under(database, request(), put("b"))
    assert replayed.value.answer == b"answer:a"
    assert await database.lookup_remembered(request()) == b"answer:a"
    assert await database.read(names) == ["a"]


async def test_a_repeated_request_is_replayed_whatever_its_work_meets_now(database: Database) -> None:
    def refuse(session: Session) -> str:
        raise LookupError("the first time has changed this")

    await under(database, request(), put("a"))
    for work in (put("a"), refuse):
        with pytest.raises(Replayed):
            await under(database, request(), work)
    with pytest.raises(Replayed):
        await under(database, request(), put("b"), final=False)
    assert await database.read(names) == ["a"]


async def test_a_write_whose_asker_has_gone_before_its_group_is_left_out(database: Database) -> None:
    release, held = await _hold_the_writer(database)
    gone, stays = (asyncio.create_task(database.write(put(name))) for name in ("gone", "stays"))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    release.set()
    await asyncio.gather(held, stays)
    assert await database.read(names) == ["stays"]


async def test_a_request_id_belongs_to_its_caller_and_its_body(database: Database) -> None:
    await under(database, request(), put("a"))
    assert await under(database, request(sub="somebody else"), put("b")) == "b"
    with pytest.raises(AlreadyExists) as refused:
        await under(database, request(body=b"another"), put("c"))
    assert refused.value.reason == "REQUEST_ID_REUSED"
    with pytest.raises(AlreadyExists):
        await database.lookup_remembered(request(body=b"another"))
    assert await database.read(names) == ["a", "b"]


async def test_a_failed_work_is_not_remembered(database: Database) -> None:
    def fail(session: Session) -> str:
        raise LookupError("not yet")

    with pytest.raises(LookupError):
        await under(database, request(), fail)
    assert await database.lookup_remembered(request()) is None
    assert await under(database, request(), put("a")) == "a"


async def test_only_the_final_write_stores_the_answer_and_there_is_one(database: Database) -> None:
    async def call() -> str:
        _pending.set(request())
        await database.write(put("first"), final=False)
        assert await database.lookup_remembered(request()) is None
        await database.write(put("last"))
        await database.write(put("afterthought"), final=False)
        return await database.write(put("too many"))

    with pytest.raises(RuntimeError, match="second final write"):
        await asyncio.create_task(call())
    assert await database.lookup_remembered(request()) == b"answer:last"
    assert await database.read(names) == ["afterthought", "first", "last"]


async def test_old_requests_are_forgotten(database: Database, clock: FakeClock) -> None:
    await under(database, request("old"), put("a"))
    clock.now += timedelta(days=8)
    await under(database, request("new"), put("b"))
    assert await database.forget_requests(clock.now - timedelta(days=7)) == 1
    assert await database.lookup_remembered(request("old")) is None
    assert await database.lookup_remembered(request("new")) == b"answer:b"


def test_a_database_in_memory_is_refused(migrations: Path) -> None:
    with pytest.raises(ValueError, match="must be a file"):
        Database.open("sqlite://", migrations=migrations)


async def test_what_the_database_is_to_blame_for_is_told_and_harms_no_neighbour(database: Database) -> None:
    def fail(session: Session) -> None:
        # A file system without room, a server that is gone: SQLAlchemy says both with this class.
        raise OperationalError("INSERT", {}, OSError("no room"))

    failed, kept = await asyncio.gather(
        database.write(fail),
        database.write(lambda session: session.add(Mark(name="kept", count=1))),
        return_exceptions=True,
    )

    assert isinstance(failed, Unavailable)
    assert failed.reason == "DATABASE_UNAVAILABLE"
    assert kept is None
    assert await database.read(lambda session: session.get(Mark, "kept")) is not None
    with pytest.raises(Unavailable):
        await database.read(fail)


async def test_a_full_disk_is_told_as_such(database: Database) -> None:
    class Full(Exception):
        sqlstate = "53100"

    def fail(session: Session) -> None:
        try:
            raise OperationalError("INSERT", {}, Full())
        finally:
            # So ends what SQLite has given up: the way back to the savepoint fails, too.
            raise OperationalError("ROLLBACK TO SAVEPOINT", {}, Exception("no such savepoint"))

    with pytest.raises(DiskFull) as told:
        await database.write(fail)
    assert (told.value.reason, told.value.metadata) == ("DISK_FULL", {"resource": "database"})
    assert isinstance(told.value, Unavailable)  # to whoever waits for a database that is away


def count_of(name: str) -> Callable[[Connection], list[int]]:
    """The count of one mark, in a list of none or one."""
    return lambda connection: [
        row[0] for row in found_rows(connection, "SELECT count FROM marks WHERE name = ?", [name])
    ]


async def test_questions_that_come_together_are_answered_each_for_itself(database: Database) -> None:
    def fail(_: Connection) -> None:
        raise LookupError("only mine")

    await database.write(put("a", 1))
    await database.write(put("b", 2))
    gone = asyncio.create_task(database.lookup(fail))
    asked = [asyncio.create_task(database.lookup(work)) for work in (count_of("a"), fail, count_of("b"), count_of("c"))]
    await asyncio.sleep(0)
    gone.cancel()
    first, failed, second, none = await asyncio.gather(*asked, return_exceptions=True)
    assert (first, second, none) == ([1], [2], [])
    assert isinstance(failed, LookupError)


async def test_rows_are_found_as_the_transaction_sees_them(database: Database) -> None:
    def work(session: Session) -> list[int]:
        session.add(Mark(name="a", count=7))
        session.flush()
        return count_of("a")(session.connection())

    assert await database.lookup(count_of("a")) == []
    assert await database.write(work) == [7]
    assert await database.lookup(count_of("a")) == [7]


async def test_a_question_that_the_database_fails_at_is_told_like_any_other(database: Database) -> None:
    def ask(connection: Connection) -> None:
        found_rows(connection, "SELECT count FROM nowhere", [])

    for failing in (database.lookup(ask), database.write(lambda session: ask(session.connection()))):
        with pytest.raises(Unavailable) as refused:
            await failing
        assert isinstance(refused.value.__cause__, OperationalError)
    assert await database.write(put("a")) == "a"
    assert await database.lookup(count_of("a")) == [0]


async def test_a_lookup_outlives_its_connection(database: Database) -> None:
    def hang_up(connection: Connection) -> None:
        driver: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
        driver.close()

    await database.write(put("a", 1))
    with pytest.raises(Exception, match="closed"):
        await database.lookup(hang_up)
    assert await database.lookup(count_of("a")) == [1]
    assert await database.lookup(count_of("a")) == [1]


async def test_a_lookup_leaves_no_snapshot_behind(database: Database, tmp_path: Path) -> None:
    await database.write(put("a", 1))
    assert await database.lookup(count_of("a")) == [1]
    other = sqlite3.connect(tmp_path / "state" / "test.db", timeout=0)
    # The log of writes cannot be emptied below what somebody still reads.
    busy, *_ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    other.close()
    assert busy == 0


def quickly(
    database: Database, name: str, committed: Callable[[], None] | None = None
) -> "asyncio.Task[threading.Thread]":
    """Writes a mark by a quick work, whose result is the thread that it ran in."""

    def work(group: Group) -> threading.Thread:
        group.connection.exec_driver_sql("INSERT INTO marks VALUES (?, 0)", (name,))
        return threading.current_thread()

    return asyncio.create_task(database.write_staged(work, quick=True, committed=committed))


async def test_quick_works_run_in_the_loop_and_others_take_their_group_to_the_thread(database: Database) -> None:
    commits = []
    event.listen(database._write_engine, "commit", lambda connection: commits.append(threading.current_thread()))
    here = threading.current_thread()
    assert await quickly(database, "a") is here
    (committer,) = commits
    assert committer is not here
    mixed = await asyncio.gather(quickly(database, "b"), database.write(lambda _: threading.current_thread()))
    assert set(mixed) == {committer}
    assert await database.read(names) == ["a", "b"]


async def test_a_quick_work_that_fails_harms_no_neighbour(database: Database) -> None:
    async def fail() -> None:
        def work(group: Group) -> None:
            group.session.add(Mark(name="lost", count=0))
            group.session.flush()
            raise LookupError("no")

        await database.write_staged(work, quick=True)

    failed, *_ = await asyncio.gather(fail(), quickly(database, "a"), return_exceptions=True)
    assert isinstance(failed, LookupError)
    assert await database.read(names) == ["a"]


async def test_a_quick_work_waits_for_another_process_in_the_thread(database: Database, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "state" / "test.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writing = quickly(database, "a")
    # The loop goes on: this read would not be answered otherwise.
    assert await database.read(names) == []
    assert not writing.done()
    other.execute("COMMIT")
    other.close()
    assert await writing is not threading.current_thread()
    assert await database.read(names) == ["a"]


async def test_what_is_committed_is_told_also_where_the_asker_has_gone(database: Database) -> None:
    told = []
    begun, gone = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(group: Group) -> None:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(gone.wait(), loop).result(10)

    async def fail() -> None:
        await database.write_staged(_failing, committed=lambda: told.append("failed"))

    writing = asyncio.create_task(database.write_staged(work, committed=lambda: told.append("gone")))
    await begun.wait()
    writing.cancel()
    await asyncio.wait([writing])
    gone.set()
    with pytest.raises(LookupError):
        await fail()
    await quickly(database, "b", committed=lambda: told.append("b"))
    assert told == ["gone", "b"]


def _failing(group: Group) -> None:
    raise LookupError("no")
