"""A node's trainings in a database: what becomes of their histories."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from services.runtime.database import Database
from services.trainer.progress import Progress
from services.trainer.store import SqlTrainingStore
from services.trainer.training import Training, TrainingState
from tests.unit.test_trainer_live import RUNNING, point

NOW = datetime(2030, 1, 1, 12, 30, 15, 123456, tzinfo=UTC)
POINTS = [point(step) for step in (1, 5, 9)]


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[SqlTrainingStore]:
    database = Database.open(database_url, migrations="services.trainer.migrations")
    yield SqlTrainingStore(database)
    await database.close()


async def ended(store: SqlTrainingStore, name: str, at: datetime | None, points: list[Progress]) -> Training:
    state = TrainingState.RUNNING if at is None else TrainingState.FAILED
    written = await store.create(replace(RUNNING, id=name, state=state, ended_at=at))
    if points:
        await store.keep_history(name, points)
    return written


async def test_of_old_histories_the_last_point_stays(store: SqlTrainingStore) -> None:
    for name in ("old", "older", "oldest"):
        await ended(store, name, NOW, POINTS)
    await ended(store, "without", NOW, [])
    await ended(store, "short", NOW, POINTS[:1])
    await ended(store, "young", NOW + timedelta(microseconds=1), POINTS)
    await ended(store, "running", None, POINTS)
    assert [await store.forget_histories(ended_by=NOW, most=2) for _ in range(3)] == [2, 1, 0]
    for name in ("old", "older", "oldest"):
        assert await store.history(name) == POINTS[-1:]
        assert (await store.get(name)).progress == POINTS[-1]
    assert await store.history("without") == []
    assert (await store.get("without")).progress is None
    assert await store.history("short") == POINTS[:1]
    for name in ("young", "running"):
        assert await store.history(name) == POINTS
    assert await store.forget_histories(ended_by=NOW + timedelta(seconds=1), most=2) == 1
