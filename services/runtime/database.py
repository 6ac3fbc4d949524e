"""One database for each process: a writer that commits in groups, and readers on consistent snapshots."""

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

import structlog
from sqlalchemy import delete
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InterfaceError, OperationalError, PendingRollbackError
from sqlmodel import Session, col

from services.runtime.answers import (
    AnsweredMeanwhile,
    Answers,
    RememberedRequest,
    create_remembered_requests,
    find_answer,
)
from services.runtime.auth import utc_now
from services.runtime.engines import (
    begin_at_once,
    is_serialization_failure,
    look_afresh,
    migrate,
    reading_engine,
    writing_engine,
)
from services.runtime.errors import Unavailable
from services.runtime.groups import GroupThread, GroupTurns, Outcome, Steps
from services.runtime.idempotency import PendingRequest, Replayed, pending_request
from tiltyard.telemetry import metrics

__all__ = ["Database", "Group", "Staging", "create_remembered_requests"]

T = TypeVar("T")
S = TypeVar("S", bound="Staging")

_READERS = 4
_SERIALIZATION_ATTEMPTS = 8

_GROUP_SIZES = metrics.Histogram(
    "tiltyard.database.group.size",
    unit="{write}",
    description="Writes that are committed together.",
    bounds=(1, 2, 4, 8, 16, 32, 64),
)

_log = structlog.get_logger("tiltyard.database")


class Staging(Protocol):
    """What the works of one group put off, to be written together before the commit."""

    def keep(self) -> None:
        """The work that has just ended counts."""
        ...

    def drop(self) -> None:
        """The work that has just ended has failed: forget what it put off."""
        ...

    def write(self) -> None:
        """Write what all works of the group have put off and that counts."""
        ...


class Group:
    """The works that are committed together, one after the other.

    Each has the `session` to itself, which opens a savepoint with its first statement. What a work asks of the
    `connection` itself needs none.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._session: Session | None = None
        self._stagings: dict[Any, Staging] = {}

    @property
    def session(self) -> Session:
        """Made at its first use: it costs several times what a work does that has none."""
        if self._session is None:
            self._session = Session(bind=self.connection, join_transaction_mode="create_savepoint")
        return self._session

    def staging(self, make: Callable[["Group"], S]) -> S:
        """The group's one staging of this kind, made at its first use."""
        found = self._stagings.get(make)
        if found is None:
            found = self._stagings[make] = make(self)
        return cast(S, found)

    def keep(self) -> None:
        """A work has come to its end: its changes belong to the group."""
        if self._session is not None and self._session.in_transaction():
            self._session.commit()

    def ended(self, *, well: bool) -> None:
        """A work has ended; unless it did so well, its changes are undone."""
        if self._session is not None:
            # An exception rolls back to the savepoint. Where that fails too (the disk is full and SQLite has given the
            # whole transaction up), so does the commit.
            self._session.close()
        for staging in self._stagings.values():
            if well:
                staging.keep()
            else:
                staging.drop()

    def write(self) -> None:
        """Write all that was put off."""
        for staging in self._stagings.values():
            staging.write()


@dataclass(frozen=True)
class _Write:
    work: Callable[[Group], Any]
    context: contextvars.Context
    pending: PendingRequest | None
    final: bool
    quick: bool
    committed: Callable[[], None] | None

    def done(self) -> None:
        if self.committed is not None:
            self.committed()


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
        self._clock = clock
        self._write_engine = writing_engine(url)
        self._read_engine = reading_engine(url, readers=_READERS + 1)  # one more for the lookups
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="database-reader")
        # A work on SQLite is done sooner than threads take turns; on PostgreSQL each statement goes over a network.
        works_here = self._write_engine.dialect.name == "sqlite"
        self._writer = GroupTurns(
            self._write_group,
            is_quick=lambda item: works_here and item.quick,
            done=_Write.done,
            name="database-writer",
        )
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
        item = _Write(work, contextvars.copy_context(), pending, final, quick, committed)
        return cast(T, await self._writer.ask(item))

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
        with _loss_told("nothing was read"), self._read_engine.connect() as connection:
            return work(connection)

    def _look_up_group(self, group: list[_Lookup]) -> list[Outcome[Any]]:
        with _loss_told("nothing was read"), self._read_engine.connect() as connection:
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
            with _loss_told("nothing was read"):
                raise

    def _let_go(self) -> None:
        connection, self._at_hand = self._at_hand, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.invalidate()
                connection.close()

    def _write_group(self, group: list[_Write]) -> Steps[Any]:
        attempt = 1
        while True:
            try:
                outcomes = yield from self._commit(group)
            except _NotWritten as error:
                if len(group) > 1:
                    # What one of them put off cannot be written: each in a commit of its own, so that only that fails.
                    alone: list[Outcome[Any]] = []
                    for item in group:
                        alone += yield from self._alone(item)
                    return alone
                raise error.cause from None
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

    def _alone(self, item: _Write) -> Steps[Any]:
        try:
            return (yield from self._write_group([item]))
        except Exception as failure:
            return [(None, failure)]

    def _commit(self, items: list[_Write]) -> Steps[Any]:
        _GROUP_SIZES.record(len(items))
        outcomes: list[Outcome[Any]] = []
        with self._write_engine.connect() as connection:
            transaction = begin_at_once(connection)
            if transaction is None:
                yield
                transaction = connection.begin()
            with transaction:
                self._perform(items, connection, outcomes)
                yield
        return outcomes

    def _perform(self, items: list[_Write], connection: Connection, outcomes: list[Outcome[Any]]) -> None:
        """Everything of a group but its commit."""
        group = Group(connection)
        answers = Answers(connection, [item.pending for item in items if item.pending is not None])
        for item in items:
            try:
                outcomes.append((item.context.run(self._run, group, answers, item), None))
            except Exception as failure:
                # A lost connection has lost the whole group; a full disk, say, the one work that met it.
                if _must_run_again(failure) or connection.invalidated:
                    raise
                outcomes.append((None, _told(failure, "nothing was changed")))
        try:
            group.write()
            answers.write()
        except (IntegrityError, DataError) as unfit:
            if _must_run_again(unfit):
                raise
            raise _NotWritten(unfit) from unfit

    def _run(self, group: Group, answers: Answers, item: _Write) -> Any:
        pending = item.pending
        if pending is not None:
            answer = answers.find(pending)
            if answer is not None:
                raise Replayed(answer)
        well = False
        try:
            result = item.work(group)
            answer = pending.encode(result) if pending is not None and item.final else None
            group.keep()
            well = True
        finally:
            group.ended(well=well)
        if pending is not None and answer is not None:
            answers.add(pending, answer, now_s=int(self._clock().timestamp()))
        return result


def _looked_up(group: list[_Lookup], connection: Connection) -> list[Outcome[Any]]:
    outcomes: list[Outcome[Any]] = []
    for item in group:
        try:
            outcomes.append((item.context.run(item.work, connection), None))
        except Exception as failure:
            if isinstance(failure, _LOSSES):
                raise
            outcomes.append((None, failure))
    return outcomes


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


class _NotWritten(Exception):
    """What the works of a group have put off does not fit the database."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _must_run_again(error: BaseException) -> bool:
    return is_serialization_failure(error) or isinstance(error, AnsweredMeanwhile)
