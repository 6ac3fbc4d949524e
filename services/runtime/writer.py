"""The one writer of a database: what has queued up is committed together, and what fails spoils only its own."""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar, cast

import structlog
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DataError, IntegrityError
from sqlmodel import Session

from services.runtime.answers import AnsweredMeanwhile, Answers
from services.runtime.engines import begin_at_once, is_serialization_failure
from services.runtime.groups import GroupTurns, Outcome, Steps
from services.runtime.idempotency import PendingRequest, Replayed
from services.runtime.losses import loss_told, told
from tiltyard.telemetry import metrics

S = TypeVar("S", bound="Staging")

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
class Write:
    """One work that waits to be committed, with the call that it belongs to; see `Database.write_staged`."""

    work: Callable[[Group], Any]
    context: contextvars.Context
    pending: PendingRequest | None
    final: bool
    quick: bool
    committed: Callable[[], None] | None

    def done(self) -> None:
        """It is committed."""
        if self.committed is not None:
            self.committed()


class Writer:
    """Commits works on an engine of one connection, and stores the answers of their requests with them."""

    def __init__(self, engine: Engine, clock: Callable[[], datetime]) -> None:
        self._engine = engine
        self._clock = clock
        # A work on SQLite is done sooner than threads take turns; on PostgreSQL each statement goes over a network.
        works_here = engine.dialect.name == "sqlite"
        self._turns = GroupTurns(
            self._write_group,
            is_quick=lambda item: works_here and item.quick,
            done=Write.done,
            name="database-writer",
        )

    async def write(self, item: Write) -> Any:
        """The result of its work, once it is committed."""
        return await self._turns.ask(item)

    async def close(self) -> None:
        """Commits what is queued; ask for nothing afterwards."""
        await self._turns.close()

    def _write_group(self, group: list[Write]) -> Steps[Any]:
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
                with loss_told("nothing was changed"):
                    raise
            break
        for item, (_, failure) in zip(group, outcomes, strict=True):
            if failure is None and item.pending is not None and item.final:
                item.pending.note_stored()
        return outcomes

    def _alone(self, item: Write) -> Steps[Any]:
        try:
            return (yield from self._write_group([item]))
        except Exception as failure:
            return [(None, failure)]

    def _commit(self, items: list[Write]) -> Steps[Any]:
        _GROUP_SIZES.record(len(items))
        outcomes: list[Outcome[Any]] = []
        with self._engine.connect() as connection:
            transaction = begin_at_once(connection)
            if transaction is None:
                yield
                transaction = connection.begin()
            with transaction:
                self._perform(items, connection, outcomes)
                yield
        return outcomes

    def _perform(self, items: list[Write], connection: Connection, outcomes: list[Outcome[Any]]) -> None:
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
                outcomes.append((None, told(failure, "nothing was changed")))
        try:
            group.write()
            answers.write()
        except (IntegrityError, DataError) as unfit:
            if _must_run_again(unfit):
                raise
            raise _NotWritten(unfit) from unfit

    def _run(self, group: Group, answers: Answers, item: Write) -> Any:
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


class _NotWritten(Exception):
    """What the works of a group have put off does not fit the database."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _must_run_again(error: BaseException) -> bool:
    return is_serialization_failure(error) or isinstance(error, AnsweredMeanwhile)
