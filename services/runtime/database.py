"""One database for each process: a writer that commits in groups, and readers on consistent snapshots."""

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

import structlog
from sqlalchemy import Column, LargeBinary, bindparam, delete, insert
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError, PendingRollbackError
from sqlmodel import Field, Session, SQLModel, col, select

from services.runtime.auth import utc_now
from services.runtime.engines import is_serialization_failure, migrate, reading_engine, writing_engine
from services.runtime.errors import AlreadyExists, Unavailable
from services.runtime.groups import GroupThread, Outcome
from services.runtime.idempotency import PendingRequest, Replayed, check_body, pending_request

T = TypeVar("T")

_READERS = 4
_SERIALIZATION_ATTEMPTS = 8

_log = structlog.get_logger("tiltyard.database")


class RememberedRequest(SQLModel, table=True):
    """The answer to one request id of one caller, stored with the change it answers."""

    __tablename__ = "remembered_requests"

    sub: str = Field(primary_key=True)
    method: str = Field(primary_key=True)
    request_id: str = Field(primary_key=True)
    body_sha256: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    answer: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    remembered_at_s: int = Field(index=True)


def create_remembered_requests(op: Any) -> None:
    """Creates the table of RememberedRequest; a service's first migration calls this with Alembic's `op`."""
    import sqlalchemy as sa

    op.create_table(
        "remembered_requests",
        sa.Column("sub", sa.String, primary_key=True),
        sa.Column("method", sa.String, primary_key=True),
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("body_sha256", sa.LargeBinary, nullable=False),
        sa.Column("answer", sa.LargeBinary, nullable=False),
        sa.Column("remembered_at_s", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_remembered_requests_remembered_at_s", "remembered_requests", ["remembered_at_s"])


@dataclass(frozen=True)
class _Write:
    work: Callable[[Session], Any]
    context: contextvars.Context
    pending: PendingRequest | None
    final: bool


class Database:
    """Runs the work of a store in transactions. A work's session is valid while it runs; rows never leave it.

    A work may run more than once before it counts (a serialization failure on PostgreSQL): it must have no other
    effects.
    """

    def __init__(self, url: str, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._clock = clock
        self._write_engine = writing_engine(url)
        self._read_engine = reading_engine(url, readers=_READERS + 1)  # one more for the lookups
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="database-reader")
        self._writer = GroupThread(self._write_group, name="database-writer")
        self._lookups = GroupThread(self._look_up_group, name="database-lookups")
        self._closed = False

    @classmethod
    def open(
        cls, url: str, *, migrations: Path | ModuleType | str, clock: Callable[[], datetime] = utc_now
    ) -> "Database":
        """Migrates the database at `url` (`sqlite:///PATH` or `postgresql+DRIVER://...`) and opens it.

        `migrations` is the folder (or package, or its dotted name) that holds `versions/`. Several processes may start
        at once: one migrates, the others wait. Blocks, for it runs before a server starts.
        """
        migrate(url, migrations)
        return cls(url, clock=clock)

    async def write(self, work: Callable[[Session], T], *, final: bool = True) -> T:
        """Runs `work` in the writer's next group and returns its result once the group is committed (durably).

        A work that raises loses its own changes only; its exception is raised here. When the commit fails, every work
        of the group gets that error. Inside an `@idempotent` call, the `final` write stores the answer in the same
        transaction: its result must be the result of the whole domain call. Writes before it say `final=False`.
        """
        if self._closed:
            raise Unavailable("DATABASE_CLOSED", "the server is stopping")
        pending = pending_request()
        if pending is not None and pending.stored and final:
            raise RuntimeError(f"a second final write under request id {pending.request_id!r}: say final=False")
        if pending is not None and pending.stored:
            pending = None
        item = _Write(work, contextvars.copy_context(), pending, final)
        return cast(T, await self._writer.ask(item))

    async def read(self, work: Callable[[Session], T]) -> T:
        """Runs `work` in a read-only transaction that sees one consistent snapshot, beside the writer."""
        if self._closed:
            raise Unavailable("DATABASE_CLOSED", "the server is stopping")
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, lambda: context.run(self._read, work))

    async def lookup_remembered(self, pending: PendingRequest) -> bytes | None:
        """The answer stored under this request's key. Raises AlreadyExists where it was stored for another body."""
        if self._closed:
            raise Unavailable("DATABASE_CLOSED", "the server is stopping")
        return await self._lookups.ask(pending)

    async def forget_requests(self, before: datetime) -> int:
        """Drops the answers stored before `before` and returns how many they were."""

        def forget(session: Session) -> int:
            old = delete(RememberedRequest).where(col(RememberedRequest.remembered_at_s) < int(before.timestamp()))
            return cast(int, cast(Any, session.connection().execute(old)).rowcount)

        return await self.write(forget, final=False)

    async def close(self) -> None:
        """Commits what is queued and closes all connections. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        await self._writer.close()
        await self._lookups.close()
        await asyncio.to_thread(self._readers.shutdown)
        self._write_engine.dispose()
        self._read_engine.dispose()

    def _read(self, work: Callable[[Session], T]) -> T:
        # Never committed: nothing a work does here can last.
        with (
            _loss_told("nothing was read"),
            self._read_engine.connect() as connection,
            Session(bind=connection) as session,
        ):
            return work(session)

    def _look_up_group(self, group: list[PendingRequest]) -> list[Outcome[bytes | None]]:
        outcomes: list[Outcome[bytes | None]] = []
        with _loss_told("nothing was done"), self._read_engine.connect() as connection:
            for pending in group:
                try:
                    outcomes.append((_remembered(connection, pending), None))
                except AlreadyExists as refusal:
                    outcomes.append((None, refusal))
        return outcomes

    def _write_group(self, group: list[_Write]) -> list[Outcome[Any]]:
        attempt = 1
        while True:
            try:
                outcomes = self._commit(group)
            except BaseException as error:
                if _must_run_again(error) and attempt < _SERIALIZATION_ATTEMPTS:
                    attempt += 1
                    continue
                _log.error("a group of writes was not committed", writes=len(group), exc_info=error)
                with _loss_told("nothing was changed"):
                    raise
            break
        for item, (_, failure) in zip(group, outcomes, strict=True):
            if failure is None and item.pending is not None and item.final:
                item.pending.stored = True
        return outcomes

    def _commit(self, group: list[_Write]) -> list[Outcome[Any]]:
        outcomes: list[Outcome[Any]] = []
        with self._write_engine.connect() as connection, connection.begin():
            for item in group:
                try:
                    outcomes.append((item.context.run(self._run, connection, item), None))
                except Exception as failure:
                    # A lost connection has lost the whole group; a full disk, say, the one work that met it.
                    if _must_run_again(failure) or connection.invalidated:
                        raise
                    outcomes.append((None, _told(failure, "nothing was changed")))
        return outcomes

    def _run(self, connection: Connection, item: _Write) -> Any:
        # What is not final stores no answer: nothing but a look before it finds out that it was answered.
        if item.pending is not None and not item.final:
            _raise_if_remembered(connection, item.pending)
        try:
            # The session has a savepoint of its own: an exception rolls back to it. Where that fails too (the disk is
            # full and SQLite has given the whole transaction up), so does the commit of the group.
            with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
                result = item.work(session)
                if item.pending is not None and item.final:
                    session.flush()
                    self._remember(session.connection(), item.pending, result)
                session.commit()
                return result
        except Exception as failure:
            # Answered before, the second time fails on the answer's key or on what the first time changed. So only a
            # failure needs the look, and every first time is spared it.
            pending = None if connection.invalidated or is_serialization_failure(failure) else item.pending
            if pending is not None:
                _raise_if_remembered(connection, pending)
            raise

    def _remember(self, connection: Connection, pending: PendingRequest, result: Any) -> None:
        row = {
            "sub": pending.sub,
            "method": pending.method,
            "request_id": pending.request_id,
            "body_sha256": pending.body_sha256,
            "answer": pending.encode(result),
            "remembered_at_s": int(self._clock().timestamp()),
        }
        try:
            connection.execute(_REMEMBER, row)
        except IntegrityError as taken:
            raise _AnsweredMeanwhile from taken


# What the database, not the work, is to blame for. After a lost connection SQLAlchemy asks for a rollback at every use.
_LOSSES = (OperationalError, InterfaceError, PendingRollbackError)


def _told(failure: Exception, consequence: str) -> Exception:
    """`failure`, or in place of a loss of the database what a caller is told of it."""
    if not isinstance(failure, _LOSSES):
        return failure
    _log.error("the database failed", exc_info=failure)
    told = Unavailable("DATABASE_UNAVAILABLE", f"the database cannot be used at present, {consequence}")
    told.__cause__ = failure
    return told


@contextmanager
def _loss_told(consequence: str) -> Iterator[None]:
    try:
        yield
    except _LOSSES as loss:
        raise _told(loss, consequence) from loss


class _AnsweredMeanwhile(Exception):
    """The request's key is taken. Who took it after this transaction's snapshot is seen by the next attempt only."""


def _must_run_again(error: BaseException) -> bool:
    return is_serialization_failure(error) or isinstance(error, _AnsweredMeanwhile)


_REMEMBER = insert(RememberedRequest)
_REMEMBERED = select(RememberedRequest.body_sha256, RememberedRequest.answer).where(
    col(RememberedRequest.sub) == bindparam("sub"),
    col(RememberedRequest.method) == bindparam("method"),
    col(RememberedRequest.request_id) == bindparam("request_id"),
)


def _remembered(connection: Connection, pending: PendingRequest) -> bytes | None:
    key = {"sub": pending.sub, "method": pending.method, "request_id": pending.request_id}
    row = connection.execute(_REMEMBERED, key).one_or_none()
    if row is None:
        return None
    check_body(pending, row.body_sha256)
    answer: bytes = row.answer
    return answer


def _raise_if_remembered(connection: Connection, pending: PendingRequest) -> None:
    answer = _remembered(connection, pending)
    if answer is not None:
        raise Replayed(answer)
