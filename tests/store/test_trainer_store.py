"""A node's trainings in a database: what becomes of their histories, and of what cannot be read."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from services.runtime.database import Database
from services.trainer import convert
from services.trainer.live import LiveTrainings
from services.trainer.progress import Progress
from services.trainer.recovery import recover
from services.trainer.store import SqlTrainingStore
from services.trainer.training import Training, TrainingState
from tests.unit.test_trainer_live import RUNNING, point

NOW = datetime(2030, 1, 1, 12, 30, 15, 123456, tzinfo=UTC)
POINTS = [point(step) for step in (1, 5, 9)]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = Database.open(database_url, migrations="services.trainer.migrations")
    yield opened
    await opened.close()


@pytest.fixture
def store(database: Database) -> SqlTrainingStore:
    return SqlTrainingStore(database)


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


class NothingLeft:
    """services.trainer.recovery.Remains of a node that has nothing beside its database."""

    async def clear(self, training: Training) -> None:
        """Nothing is there."""

    async def is_marked_cancelled(self, training: Training) -> bool:
        return False

    async def uncleared(self) -> list[str]:
        return []


async def read_back(database: Database, statement: str) -> list[object]:
    return await database.read(lambda session: list(session.connection().execute(text(statement)).scalars()))


async def damage(database: Database, table: str, column: str, value: object, *, of: str) -> None:
    statement = text(f"UPDATE {table} SET {column} = :value WHERE {of}")
    await database.write(lambda session: session.connection().execute(statement, {"value": value}).close())


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("spec", '{"input_shape": [1], "outputs": 2, "architecture": {"kind": "moe"}}', "architecture.kind must be"),
        ("spec", "[", "JSONDecodeError"),
        ("loss", "hinge", "'hinge' is not a valid LossKind"),
        ("config", '{"optimizer": "lion", "schedule": "cosine"}', "'lion' is not a valid OptimizerKind"),
        ("config", '{"optimizer": "sgd", "schedule": "cosine", "ema": 0.9}', "unexpected keyword argument 'ema'"),
        ("config", "3", "TypeError"),
        ("config", '{"epochs": "30"}', "epochs must be int, is str"),
        ("config", '{"epochs": 1.5}', "epochs must be int, is float"),
        ("config", '{"augment": 1}', "augment must be bool, is int"),
        ("config", '{"class_weights": 3}', "class_weights must be a list, is int"),
        ("config", '{"class_weights": ["1"]}', "class_weights must be float, is str"),
        ("config", '{"seed": 9223372036854775808}', "seed has more than 64 bits"),
        ("created_at_us", 2**62, "OverflowError"),
        ("state", "paused", "'paused' is not a valid TrainingState"),
    ],
)
async def test_a_training_that_cannot_be_read_fails_alone_and_is_listed_all_the_same(
    database: Database, store: SqlTrainingStore, column: str, value: object, why: str
) -> None:
    for name in ("a", "b", "c"):
        await store.create(replace(RUNNING, id=name))
    await damage(database, "trainings", column, value, of="id = 'b'")
    live = LiveTrainings()
    await recover(store=store, live=live, remains=NothingLeft(), clock=lambda: NOW)
    assert [(each.id, each.state) for each in live.all()] == [("a", TrainingState.QUEUED), ("c", TrainingState.QUEUED)]
    page = await store.page(cursor="", size=10)
    assert [each.id for each in page.trainings] == ["c", "b", "a"]
    failed = page.trainings[1]
    assert (failed.state, failed.ended_at) == (TrainingState.FAILED, NOW)
    assert failed.error.startswith("what is written down of it cannot be read, as after another version wrote it: ")
    assert f"{column}: " in failed.error
    assert why in failed.error
    message = convert.training_to_proto(failed)
    assert (message.name, message.error) == ("trainings/b", failed.error)
    assert message.HasField("model") == (column == "state")
    if column != "state":
        # A version that can read it finds it as it was.
        assert await read_back(database, f"SELECT {column} FROM trainings WHERE id = 'b'") == [value]


@pytest.mark.parametrize("data", ["3", '{"rows": "8"}', '{"rows": 8, "class_rows": [1.5]}'])
@pytest.mark.parametrize("point", ['{"another version": 1}', '{"step": "1", "total_steps": 9, "epoch": 1}'])
async def test_a_training_goes_on_without_what_it_can_do_without(
    database: Database, store: SqlTrainingStore, data: str, point: str
) -> None:
    await store.create(replace(RUNNING, warnings=("a full disk",)))
    await store.keep_history(RUNNING.id, POINTS)
    for column, value in (("warnings", "3"), ("data", data)):
        await damage(database, "trainings", column, value, of="number = 1")
    for column, value in (("points", f"[{point}]"), ("newest", point)):
        await damage(database, "training_histories", column, value, of="training = 1")
    live = LiveTrainings()
    await recover(store=store, live=live, remains=NothingLeft(), clock=lambda: NOW)
    (found,) = live.all()
    assert (found.state, found.progress, found.data) == (TrainingState.QUEUED, None, None)
    assert not convert.training_to_proto(found).HasField("progress")
    await store.keep_history(RUNNING.id, POINTS)
    assert await store.history(RUNNING.id) == POINTS
