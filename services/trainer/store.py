"""Trainings and their histories in the node's database; rows never leave this module."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, Text, update
from sqlmodel import Field, Session, SQLModel, col, select

from services.runtime.database import Database
from services.runtime.errors import NotFound
from services.trainer.config import LossKind, TrainingConfig
from services.trainer.datareport import DataReport
from services.trainer.progress import Progress
from services.trainer.training import ENDED, Training, TrainingPage, TrainingState
from tiltyard import modelspec
from tiltyard.modelspec import Linear, ModelSpec

T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# What decoding raises for what another version wrote, or a person.
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
_TROUBLE_CHARS = 300
# In place of what cannot be read; `Training.unreadable` says that it is nobody's.
_NO_SPEC = ModelSpec((1,), 1, Linear())


class TrainingRow(SQLModel, table=True):
    """One training. `number` counts them in order of arrival; times are microseconds since 1970."""

    __tablename__ = "trainings"

    # The database gives the number; None is never read back.
    number: int = Field(default=None, primary_key=True)
    id: str = Field(unique=True)
    task: str
    model_index: int
    dataset: str
    dataset_mark: str
    spec: str = Field(sa_column=Column(Text, nullable=False))
    loss: str
    config: str = Field(sa_column=Column(Text, nullable=False))
    submit: bool
    created_at_us: int = Field(sa_column=Column(BigInteger, nullable=False))
    state: str = Field(index=True)
    error: str = Field(sa_column=Column(Text, nullable=False))
    cancel_requested: bool
    model_digest: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    submission: str
    warnings: str = Field(sa_column=Column(Text, nullable=False))
    data: str = Field(sa_column=Column(Text, nullable=False))
    device: str
    base_model: str
    trace: str
    ended_at_us: int | None = Field(sa_column=Column(BigInteger, nullable=True))


class HistoryRow(SQLModel, table=True):
    """The thinned points of a training as one JSON list; its last point is where the training stands."""

    __tablename__ = "training_histories"

    training: int = Field(sa_column=Column(Integer, primary_key=True))
    points: str = Field(sa_column=Column(Text, nullable=False))
    newest: str = Field(sa_column=Column(Text, nullable=False))


class SqlTrainingStore:
    """services.trainer.training.TrainingStore over the process's one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, training: Training) -> Training:
        """Writes a new training down and returns it."""

        def work(session: Session) -> Training:
            row = TrainingRow(**_columns(training))
            session.add(row)
            return training

        return await self._database.write(work)

    async def get(self, training: str) -> Training:
        """Raises NotFound."""
        return await self._database.read(lambda session: _training(session, _row(session, training)))

    async def page(self, *, cursor: str, size: int) -> TrainingPage:
        """Up to `size` trainings older than the cursor."""

        def work(session: Session) -> TrainingPage:
            query = select(TrainingRow).order_by(col(TrainingRow.number).desc()).limit(size + 1)
            if cursor:
                query = query.where(col(TrainingRow.number) < int(cursor))
            rows = session.exec(query).all()
            shown = rows[:size]
            cursors = [str(row.number) for row in shown]
            return TrainingPage([_training(session, row) for row in shown], cursors, more=len(rows) > size)

        return await self._database.read(work)

    async def unended(self) -> Sequence[Training]:
        """All trainings that have not ended, oldest first."""

        def work(session: Session) -> list[Training]:
            query = select(TrainingRow).where(col(TrainingRow.state).not_in(sorted(ENDED)))
            return [_training(session, row) for row in session.exec(query.order_by(col(TrainingRow.number)))]

        return await self._database.read(work)

    async def submitted(self, model_digest: bytes) -> list[Training]:
        """The trainings whose model of this SHA-256 was handed in."""

        def work(session: Session) -> list[Training]:
            query = select(TrainingRow).where(TrainingRow.model_digest == model_digest, TrainingRow.submission != "")
            return [_training(session, row) for row in session.exec(query)]

        return await self._database.read(work)

    async def change(self, training: str, change: Callable[[Training], Training], *, answers: bool = False) -> Training:
        """Replaces a training by what `change` makes of it and returns that. Raises NotFound."""

        def work(session: Session) -> Training:
            row = _row(session, training)
            found = _training(session, row)
            changed, before = change(found), _columns(found)
            for name, value in _columns(changed).items():
                # What cannot be read stays as it is, for a version that can.
                if value != before[name]:
                    setattr(row, name, value)
            session.add(row)
            return changed

        return await self._database.write(work, final=answers)

    async def history(self, training: str) -> Sequence[Progress]:
        """The points kept of a training, by step; none where they cannot be read."""

        def work(session: Session) -> list[Progress]:
            kept = session.get(HistoryRow, _row(session, training).number)
            return _points(kept.points) if kept else []

        return await self._database.read(work)

    async def keep_history(self, training: str, points: Sequence[Progress]) -> None:
        """Replaces the points kept of a training; the last one is where it stands."""

        def work(session: Session) -> None:
            session.merge(
                HistoryRow(
                    training=_row(session, training).number,
                    points=json.dumps([point.to_json() for point in points]),
                    newest=json.dumps(points[-1].to_json()),
                )
            )

        await self._database.write(work, final=False)

    async def forget_histories(self, *, ended_by: datetime, most: int) -> int:
        """Leaves of so many trainings that had ended by then the last point alone; how many they were."""
        last = "[" + col(HistoryRow.newest) + "]"

        def work(session: Session) -> int:
            query = select(HistoryRow.training).join(TrainingRow, col(TrainingRow.number) == HistoryRow.training)
            query = query.where(col(TrainingRow.ended_at_us) <= _to_us(ended_by), col(HistoryRow.points) != last)
            found = session.exec(query.limit(most)).all()
            session.exec(update(HistoryRow).where(col(HistoryRow.training).in_(found)).values(points=last))
            return len(found)

        return await self._database.write(work, final=False)


def _row(session: Session, training: str) -> TrainingRow:
    row = session.exec(select(TrainingRow).where(TrainingRow.id == training)).first()
    if row is None:
        raise NotFound("TRAINING_NOT_FOUND", f"there is no training trainings/{training}", training=training)
    return row


def _columns(training: Training) -> dict[str, Any]:
    """Every column but the number."""
    return {
        "id": training.id,
        "task": training.task,
        "model_index": training.model_index,
        "dataset": training.dataset,
        "dataset_mark": training.dataset_mark,
        "spec": json.dumps(modelspec.to_json(training.spec)),
        "loss": str(training.loss),
        "config": json.dumps(training.config.to_json()),
        "submit": training.submit,
        "created_at_us": _to_us(training.created_at),
        "state": str(training.state),
        "error": training.error,
        "cancel_requested": training.cancel_requested,
        "model_digest": training.model_digest,
        "submission": training.submission,
        "warnings": json.dumps(training.warnings),
        "data": json.dumps(training.data.to_json()) if training.data else "",
        "device": training.device,
        "base_model": training.base_model,
        "trace": training.trace,
        "ended_at_us": None if training.ended_at is None else _to_us(training.ended_at),
    }


def _training(session: Session, row: TrainingRow) -> Training:
    """The training of a row, with `unreadable` where it cannot go on by what is written; the rest it can do without."""
    newest = session.exec(select(HistoryRow.newest).where(HistoryRow.training == row.number)).first()
    lost: list[str] = []

    def needed(name: str, decode: Callable[[], T], otherwise: T) -> T:
        return _read(decode, otherwise, lambda trouble: lost.append(f"{name}: {trouble}"))

    return Training(
        id=row.id,
        task=row.task,
        model_index=row.model_index,
        dataset=row.dataset,
        dataset_mark=row.dataset_mark,
        spec=needed("spec", lambda: modelspec.from_json(json.loads(row.spec)), _NO_SPEC),
        loss=needed("loss", lambda: LossKind(row.loss), LossKind.CROSS_ENTROPY),
        config=needed("config", lambda: TrainingConfig.from_json(json.loads(row.config)), TrainingConfig()),
        submit=row.submit,
        created_at=needed("created_at_us", lambda: _from_us(row.created_at_us), _EPOCH),
        state=needed("state", lambda: TrainingState(row.state), TrainingState.QUEUED),
        error=row.error,
        cancel_requested=row.cancel_requested,
        progress=next(iter(_points(f"[{newest}]")), None) if newest else None,
        model_digest=row.model_digest,
        submission=row.submission,
        warnings=_read(lambda: tuple(str(text) for text in json.loads(row.warnings)), ()),
        data=_read(lambda: DataReport.from_json(json.loads(row.data)), None) if row.data else None,
        device=row.device,
        base_model=row.base_model,
        trace=row.trace,
        ended_at=None if row.ended_at_us is None else _read(lambda: _from_us(row.ended_at_us or 0), None),
        unreadable="; ".join(lost),
    )


def _read(decode: Callable[[], T], otherwise: T, tell: Callable[[str], None] = lambda _: None) -> T:
    """What `decode` returns, or `otherwise` where that cannot be decoded, and why is told."""
    try:
        return decode()
    except _UNREADABLE as error:
        tell(f"{type(error).__name__}: {error}"[:_TROUBLE_CHARS])
        return otherwise


def _points(kept: str) -> list[Progress]:
    return _read(lambda: [Progress.from_json(point) for point in json.loads(kept)], [])


def _to_us(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)


def _from_us(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
