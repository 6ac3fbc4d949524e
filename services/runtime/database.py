"""One database for each process: a writer that commits in groups, and readers on consistent snapshots."""

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from sqlalchemy import delete
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlmodel import Session, col

from services.runtime.answers import RememberedRequest, create_remembered_requests, find_answer
from services.runtime.auth import utc_now
from services.runtime.engines import look_afresh, migrate, reading_engine, writing_engine
from services.runtime.errors import Unavailable
from services.runtime.groups import GroupThread, Outcome
from services.runtime.idempotency import PendingRequest, pending_request
from services.runtime.losses import LOSSES, loss_told
from services.runtime.writer import Group, Write, Writer

__all__ = ["Database", "create_remembered_requests"]

T = TypeVar("T")

_READERS = 4


@dataclass(frozen=True)
class _Lookup:
    work: Callable[[Connection], Any]
    context: contextvars.Context


class Database:
    """Runs the work of a store in transactions. A work's session is valid while it runs; rows never leave it.

    A work may run more than once before it counts (a serialization failure on PostgreSQL): it must have no other
    effects.
    """

    def __init__(self, url: str, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._write_engine = writing_engine(url)
        self._read_engine = reading_engine(url, readers=_READERS + 1)  # one more for the lookups
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="database-reader")
        self._writer = Writer(self._write_engine, clock)
        # SQLite finds a few rows sooner than a thread wakes up; PostgreSQL answers over a network.
        self._lookups: GroupThread[_Lookup, Any] | None = (
            None
            if self._read_engine.dialect.name == "sqlite"
            else GroupThread(self._look_up_group, name="database-lookups")
        )
        self._at_hand: Connection | None = None
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
        return await self.write_staged(lambda group: work(group.session), final=final)

    async def write_staged(
        self,
        work: Callable[[Group], T],
        *,
        final: bool = True,
        quick: bool = False,
        committed: Callable[[], None] | None = None,
    ) -> T:
        """As `write`, for a work that puts its changes off, or asks for a session only where it needs one.

        One that is `quick` changes a few rows by their keys: others wait until it returns. `committed` is called in the
        event loop once the group is, before anybody hears of the result, and also where the caller has gone.
        """
        if self._closed:
            raise Unavailable("DATABASE_CLOSED", "the server is stopping")
        pending = pending_request()
        if pending is not None and pending.stored and final:
            raise RuntimeError(f"a second final write under request id {pending.request_id!r}: say final=False")
        if pending is not None and pending.stored:
            pending = None
        item = Write(work, contextvars.copy_context(), pending, final, quick, committed)
        return cast(T, await self._writer.write(item))

    async def read(self, work: Callable[[Session], T]) -> T:
        """Runs `work` in a read-only transaction that sees one consistent snapshot, beside the writer."""

        def read(connection: Connection) -> T:
            with Session(bind=connection) as session:
                return work(session)

        return await self.query(read)

    async def query(self, work: Callable[[Connection], T]) -> T:
        """As `read`, for questions that need no session."""
        if self._closed:
            raise Unavailable("DATABASE_CLOSED", "the server is stopping")
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, lambda: context.run(self._query, work))

    async def lookup(self, work: Callable[[Connection], T]) -> T:
        """As `read`, cheaper, for a few rows by their keys: others wait until it returns."""
        if self._closed:
            raise Unavailable("DATABASE_CLOSED", "the server is stopping")
        if self._lookups is None:
            return self._look_up_here(work)
        return cast(T, await self._lookups.ask(_Lookup(work, contextvars.copy_context())))

    async def lookup_remembered(self, pending: PendingRequest) -> bytes | None:
        """The answer stored under this request's key. Raises AlreadyExists where it was stored for another body."""
        return await self.lookup(lambda connection: find_answer(connection, pending))

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
        if self._lookups is not None:
            await self._lookups.close()
        await asyncio.to_thread(self._readers.shutdown)
        if self._at_hand is not None:
            self._at_hand.close()
        self._write_engine.dispose()
        self._read_engine.dispose()

    def _query(self, work: Callable[[Connection], T]) -> T:
        # Never committed: nothing a work does here can last.
        with loss_told("nothing was read"), self._read_engine.connect() as connection:
            return work(connection)

    def _look_up_group(self, group: list[_Lookup]) -> list[Outcome[Any]]:
        with loss_told("nothing was read"), self._read_engine.connect() as connection:
            return _looked_up(group, connection)

    def _look_up_here(self, work: Callable[[Connection], T]) -> T:
        # One connection is kept: to take it out of the pool and put it back takes as long as an answer.
        try:
            connection = self._at_hand
            if connection is None:
                connection = self._at_hand = self._read_engine.connect()
                look_afresh(connection)
            try:
                return work(connection)
            finally:
                look_afresh(connection)
        except (DBAPIError, PendingRollbackError):
            self._let_go()
            with loss_told("nothing was read"):
                raise

    def _let_go(self) -> None:
        connection, self._at_hand = self._at_hand, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.invalidate()
                connection.close()


def _looked_up(group: list[_Lookup], connection: Connection) -> list[Outcome[Any]]:
    outcomes: list[Outcome[Any]] = []
    for item in group:
        try:
            outcomes.append((item.context.run(item.work, connection), None))
        except Exception as failure:
            if isinstance(failure, LOSSES):
                raise
            outcomes.append((None, failure))
    return outcomes
