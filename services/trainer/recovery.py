"""What a start finds: trainings that had not ended go on or end, and what a death left of others is cleared."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Protocol

import structlog

from services.runtime.errors import NotFound
from services.trainer.live import LiveTrainings
from services.trainer.training import Training, TrainingStore

_log = structlog.get_logger("tiltyard.trainer")


class Remains(Protocol):
    """What there is of trainings beside the store."""

    async def clear(self, training: Training) -> None:
        """Removes what an ended training no longer needs."""
        ...

    async def is_marked_cancelled(self, training: Training) -> bool:
        """Whether it was asked to stop when the store could not be written."""
        ...

    async def uncleared(self) -> Sequence[str]:
        """The ids of all trainings of which more than a model is left."""
        ...


async def recover(
    *, store: TrainingStore, live: LiveTrainings, remains: Remains, clock: Callable[[], datetime]
) -> None:
    """Publishes every training that has not ended, and removes what is left of others. May be called again.

    One whose record cannot be read fails, and holds up no other.
    """

    def asked_to_stop(training: Training) -> Training:
        return training.cancel(now=clock())

    def given_up(training: Training) -> Training:
        error = f"what is written down of it cannot be read, as after another version wrote it: {training.unreadable}"
        return training.failed(error=error, progress=training.progress, now=clock())

    for found in await store.unended():
        change = asked_to_stop if await remains.is_marked_cancelled(found) else Training.queued
        if found.unreadable:
            _log.error("a training's record cannot be read", training=found.id, trouble=found.unreadable)
            change = given_up
        training = await store.change(found.id, change)
        live.publish(training, await store.history(training.id))
    for left in await remains.uncleared():
        # The service died between the end of a training and the clearing up after it.
        with suppress(NotFound):
            training = await store.get(left)
            if training.ended:
                await remains.clear(training)
