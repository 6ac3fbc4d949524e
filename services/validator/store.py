"""The validator's runs in its own database; rows never leave this module."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import BigInteger, Column, LargeBinary
from sqlmodel import Field, Session, SQLModel, col, func, select

from services.runtime.database import Database
from services.validator.runs import ENDED_RUNS, Fault, Finding, Run, RunState, SealedReport
from tiltyard.counting import Counts

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class RunRow(SQLModel, table=True):
    """One run. Times are microseconds since 1970; the counts are set together or not at all."""

    __tablename__ = "runs"

    number: int | None = Field(default=None, primary_key=True)
    assignment: str = Field(unique=True)
    task: str
    state: str = Field(index=True)
    start_us: int = Field(sa_column=Column(BigInteger, nullable=False))
    end_us: int | None = Field(default=None, sa_column=Column(BigInteger))
    detail: str = ""
    finding_detail: str = ""
    fault: str | None = None
    node_endpoint: bool = False
    correct: int | None = Field(default=None, sa_column=Column(BigInteger))
    total: int | None = Field(default=None, sa_column=Column(BigInteger))
    ambiguous: int | None = Field(default=None, sa_column=Column(BigInteger))
    loss_sum_micros: int | None = Field(default=None, sa_column=Column(BigInteger))
    report: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    salt: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    seal: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    hashes: bytes | None = Field(default=None, sa_column=Column(LargeBinary))


class DatabaseRunStore:
    """Runs in `database`. The hashes of predictions are kept beside the report only."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, run: Run) -> Run:
        """Stores a new run and returns it with its number."""

        def work(session: Session) -> Run:
            row = RunRow(assignment=run.assignment, task=run.task, state=run.state, start_us=_to_us(run.start_time))
            _fill(row, run)
            session.add(row)
            session.flush()
            return _run(row)

        return await self._database.write(work)

    async def save(self, run: Run) -> None:
        """Stores a run's new state."""

        def work(session: Session) -> None:
            row = session.exec(select(RunRow).where(RunRow.assignment == run.assignment)).one()
            _fill(row, run)
            session.add(row)

        await self._database.write(work)

    async def get(self, assignment: str) -> Run | None:
        """The run of an assignment."""

        def work(session: Session) -> Run | None:
            row = session.exec(select(RunRow).where(RunRow.assignment == assignment)).one_or_none()
            return None if row is None else _run(row)

        return await self._database.read(work)

    async def unfinished(self) -> list[Run]:
        """Runs that have not ended, oldest first."""

        def work(session: Session) -> list[Run]:
            query = select(RunRow).where(col(RunRow.state).not_in(sorted(ENDED_RUNS))).order_by(col(RunRow.number))
            return [_run(row) for row in session.exec(query)]

        return await self._database.read(work)

    async def page(self, *, below: int | None, size: int) -> list[Run]:
        """At most `size` runs numbered below `below` (None: from the newest on), newest first."""

        def work(session: Session) -> list[Run]:
            query = select(RunRow).order_by(col(RunRow.number).desc()).limit(size)
            if below is not None:
                query = query.where(col(RunRow.number) < below)
            return [_run(row) for row in session.exec(query)]

        return await self._database.read(work)

    async def count_ended(self) -> int:
        """How many runs have ended."""

        def work(session: Session) -> int:
            query = select(func.count()).select_from(RunRow).where(col(RunRow.state).in_(sorted(ENDED_RUNS)))
            return session.exec(query).one()

        return await self._database.read(work)

    async def tasks(self) -> list[str]:
        """The tasks of all runs."""
        return await self._database.read(lambda session: list(session.exec(select(RunRow.task).distinct())))


def _to_us(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND


def _from_us(moment_us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=moment_us)


def _fill(row: RunRow, run: Run) -> None:
    row.state = run.state
    row.detail = run.detail
    row.end_us = None if run.end_time is None else _to_us(run.end_time)
    finding, sealed = run.finding, run.sealed
    if finding is not None:
        row.finding_detail = finding.detail
        row.fault = finding.fault
        row.node_endpoint = finding.node_endpoint
        counts = finding.counts
        row.correct = None if counts is None else counts.correct
        row.total = None if counts is None else counts.total
        row.ambiguous = None if counts is None else counts.ambiguous
        row.loss_sum_micros = None if counts is None else counts.loss_sum_micros
    if sealed is not None:
        row.report, row.salt, row.seal, row.hashes = sealed.report, sealed.salt, sealed.seal, sealed.hashes


def _run(row: RunRow) -> Run:
    assert row.number is not None
    return Run(
        assignment=row.assignment,
        task=row.task,
        state=RunState(row.state),
        start_time=_from_us(row.start_us),
        finding=_finding(row),
        sealed=_sealed(row),
        detail=row.detail,
        end_time=None if row.end_us is None else _from_us(row.end_us),
        number=row.number,
    )


def _finding(row: RunRow) -> Finding | None:
    if row.fault is not None:
        return Finding(fault=Fault(row.fault), detail=row.finding_detail, node_endpoint=row.node_endpoint)
    if row.correct is None or row.total is None or row.ambiguous is None or row.loss_sum_micros is None:
        return None
    return Finding(
        counts=Counts(row.correct, row.total, row.ambiguous, row.loss_sum_micros),
        detail=row.finding_detail,
        node_endpoint=row.node_endpoint,
    )


def _sealed(row: RunRow) -> SealedReport | None:
    if row.report is None or row.salt is None or row.seal is None:
        return None
    return SealedReport(report=row.report, salt=row.salt, seal=row.seal, hashes=row.hashes or b"")
