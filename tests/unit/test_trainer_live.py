"""Trainings as they move, and those who watch them."""

import asyncio
import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from services.trainer.config import LossKind, TrainingConfig
from services.trainer.live import LiveTrainings
from services.trainer.progress import Progress
from services.trainer.training import MAX_WARNINGS, Training, TrainingState
from services.trainer.trainings import Trainings
from tiltyard.modelspec import Linear, ModelSpec

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RUNNING = Training(
    id="1",
    task="",
    model_index=0,
    dataset="d",
    dataset_mark="",
    spec=ModelSpec((1,), 2, Linear()),
    loss=LossKind.CROSS_ENTROPY,
    config=TrainingConfig(),
    submit=False,
    created_at=NOW,
    state=TrainingState.RUNNING,
)


def point(step: int) -> Progress:
    return Progress(step=step, total_steps=1000, epoch=1, loss=1.0, learning_rate=0.1)


class OneTraining:
    """A store of one training; only what a watch reads."""

    def __init__(self, training: Training) -> None:
        self.training = training

    async def get(self, training: str) -> Training:
        return self.training

    async def history(self, training: str) -> Sequence[Progress]:
        return []


def watching(store: OneTraining, live: LiveTrainings) -> Trainings:
    absent = object()
    return Trainings(
        store=store,  # type: ignore[arg-type]
        live=live,
        queue=absent,  # type: ignore[arg-type]
        datasets=absent,  # type: ignore[arg-type]
        tasks=absent,  # type: ignore[arg-type]
        new_id=str,
        clock=lambda: NOW,
    )


async def test_a_slow_watcher_skips_to_the_newest_state_and_holds_nobody_up() -> None:
    live, store = LiveTrainings(), OneTraining(RUNNING)
    live.publish(RUNNING)
    seen = []
    watch = watching(store, live).watch("1")
    seen.append(await anext(watch))
    for step in range(1, 500):
        live.report("1", point(step))
    seen.append(await anext(watch))
    store.training = replace(RUNNING, state=TrainingState.SUCCEEDED, progress=point(1000))
    live.report("1", point(1000))
    live.publish(store.training)
    seen += [training async for training in watch]
    assert [training.progress and training.progress.step for training in seen] == [None, 499, 1000]
    assert seen[-1].state is TrainingState.SUCCEEDED


async def test_a_watcher_that_waits_hears_of_the_end() -> None:
    live, store = LiveTrainings(), OneTraining(RUNNING)
    live.publish(RUNNING)
    watch = watching(store, live).watch("1")
    assert (await anext(watch)).state is TrainingState.RUNNING
    following = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    assert not following.done()
    store.training = replace(RUNNING, state=TrainingState.FAILED)
    live.publish(store.training)
    assert (await following).state is TrainingState.FAILED


def test_a_training_keeps_its_newest_progress_when_its_state_changes() -> None:
    live = LiveTrainings()
    live.publish(RUNNING, [point(1), point(2)])
    live.publish(replace(RUNNING, cancel_requested=True))
    training = live.get("1")
    assert training is not None
    assert training.progress == point(2)
    assert training.cancel_requested


async def test_of_what_was_watched_nothing_is_kept() -> None:
    ended, live = replace(RUNNING, state=TrainingState.SUCCEEDED), LiveTrainings()
    assert [each async for each in watching(OneTraining(ended), live).watch("1")] == [ended]
    changed = live.next_change("1")
    assert live.next_change("1") is changed
    gone = weakref.ref(changed)
    del changed
    gc.collect()
    assert gone() is None


def test_of_many_warnings_the_newest_stay_and_of_those_alike_the_oldest_go_first() -> None:
    training = RUNNING.warned("3 of 10 classes have no row")
    for step in range(2 * MAX_WARNINGS):
        training = training.warned(f"no checkpoint at step {step}: broken")
    assert len(training.warnings) == MAX_WARNINGS
    assert training.warnings[:2] == ("3 of 10 classes have no row", f"no checkpoint at step {MAX_WARNINGS + 1}: broken")
    assert training.warnings[-1] == f"no checkpoint at step {2 * MAX_WARNINGS - 1}: broken"
    assert training.warned(training.warnings[-1]) is training
    # No two of these are alike.
    for number in range(MAX_WARNINGS + 1):
        training = training.warned("x" * number)
    assert training.warnings == tuple("x" * number for number in range(1, MAX_WARNINGS + 1))
