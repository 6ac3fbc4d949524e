"""One training: what was asked for, where it stands, and the steps from one state to the next."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from services.trainer.config import LossKind, TrainingConfig
from services.trainer.datareport import DataReport
from services.trainer.ends import Preparation
from services.trainer.progress import Progress
from services.trainer.schedule import completed
from tiltyard.modelspec import ModelSpec


class TrainingState(StrEnum):
    """Where a training stands, in the contract's words."""

    QUEUED = "queued"
    RUNNING = "running"
    SUBMITTING = "submitting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


MAX_WARNINGS = 100
_NUMBER = re.compile(r"\d+")
ENDED = frozenset({TrainingState.SUCCEEDED, TrainingState.FAILED, TrainingState.CANCELLED})


@dataclass(frozen=True)
class Training:
    """A training as it is written down.

    `task` is a bare id, empty outside any task. `dataset_mark` tells a changed file from the one that was scanned.
    `cancel_requested` outlives the process: a training that was being cancelled when the service died is not resumed.
    `model_digest` is 32 bytes of SHA-256, empty until the model exists. `base_model` is the SHA-256 in hex of the
    weights that it begins with, empty for fresh ones. `trace` is the trace that it was started in, as `tracing.carried`
    says it. `preparation` is how far its process is before the first step, and is not written down. `unreadable` says
    what of it cannot be read, as after another version wrote it: then spec, loss and config are not what was asked for.
    """

    id: str
    task: str
    model_index: int
    dataset: str
    dataset_mark: str
    spec: ModelSpec
    loss: LossKind
    config: TrainingConfig
    submit: bool
    created_at: datetime
    base_model: str = ""
    trace: str = ""
    state: TrainingState = TrainingState.QUEUED
    error: str = ""
    cancel_requested: bool = False
    progress: Progress | None = None
    model_digest: bytes = b""
    submission: str = ""
    warnings: tuple[str, ...] = ()
    data: DataReport | None = None
    preparation: Preparation | None = None
    device: str = ""
    ended_at: datetime | None = None
    unreadable: str = ""

    @property
    def ended(self) -> bool:
        """Whether it will never change again."""
        return self.state in ENDED

    def warned(self, text: str) -> "Training":
        """With what it goes on in spite of; said again, it is not written down again. Of too many, an old one goes."""
        if text in self.warnings[-1:]:
            return self
        kept = self.warnings if len(self.warnings) < MAX_WARNINGS else _with_room(self.warnings)
        return replace(self, warnings=(*kept, text))

    def examined(self, data: DataReport) -> "Training":
        """With what is in its dataset, and a warning of each oddity, before the first step."""
        found = replace(self, data=data, config=completed(self.config, rows=data.rows), preparation=None)
        for text in () if self.data == data else data.warnings():
            found = found.warned(text)
        return found

    def queued(self) -> "Training":
        """Back in the queue, as after a restart of the service; one that submits goes on doing so."""
        return replace(self, state=TrainingState.QUEUED) if self.state is TrainingState.RUNNING else self

    def running(self, *, device: str, now: datetime) -> "Training":
        """On a device, unless it has been cancelled meanwhile."""
        if self.ended:
            return self
        return (
            self.cancelled(now=now)
            if self.cancel_requested
            else replace(self, state=TrainingState.RUNNING, device=device)
        )

    def trained(self, *, model_digest: bytes, progress: Progress | None, now: datetime) -> "Training":
        """With its model: next it is submitted where that was asked for."""
        done = replace(self, model_digest=model_digest, progress=progress)
        if self.cancel_requested:
            return done.cancelled(now=now)
        if self.submit:
            return replace(done, state=TrainingState.SUBMITTING)
        return replace(done, state=TrainingState.SUCCEEDED, ended_at=now)

    def submitted(self, *, submission: str, now: datetime) -> "Training":
        """The registry has the model."""
        return replace(self, state=TrainingState.SUCCEEDED, submission=submission, ended_at=now)

    def failed(self, *, error: str, progress: Progress | None, now: datetime) -> "Training":
        """Ended by an error; one line that a person can act on."""
        return replace(self, state=TrainingState.FAILED, error=error, progress=progress, ended_at=now)

    def cancelled(self, *, now: datetime, progress: Progress | None = None) -> "Training":
        """Ended by its owner."""
        if self.ended:
            return self
        return replace(self, state=TrainingState.CANCELLED, progress=progress or self.progress, ended_at=now)

    def cancel(self, *, now: datetime) -> "Training":
        """Asked to stop: at once where nothing runs yet, else as soon as the process is gone."""
        if self.ended:
            return self
        if self.state is TrainingState.QUEUED:
            return replace(self, cancel_requested=True).cancelled(now=now)
        return replace(self, cancel_requested=True)


def _with_room(warnings: tuple[str, ...]) -> tuple[str, ...]:
    """Without the oldest that a later one says again but for its numbers; where none does, without the oldest."""
    alike = [_NUMBER.sub("", text) for text in warnings]
    goes = next((at for at, text in enumerate(alike) if text in alike[at + 1 :]), 0)
    return (*warnings[:goes], *warnings[goes + 1 :])


@dataclass(frozen=True)
class TrainingPage:
    """Trainings, newest first, with the cursor of a page that begins after each, and whether there are more."""

    trainings: Sequence[Training]
    cursors: Sequence[str]
    more: bool


class TrainingStore(Protocol):
    """Where trainings are written down; each method is one transaction."""

    async def create(self, training: Training) -> Training:
        """Writes a new training down and returns it."""
        ...

    async def get(self, training: str) -> Training:
        """Raises NotFound. What was written down and cannot be read is said by `Training.unreadable`, here as below."""
        ...

    async def page(self, *, cursor: str, size: int) -> TrainingPage:
        """Up to `size` trainings older than the cursor."""
        ...

    async def unended(self) -> Sequence[Training]:
        """All trainings that have not ended, oldest first."""
        ...

    async def change(self, training: str, change: Callable[[Training], Training], *, answers: bool = False) -> Training:
        """Replaces a training by what `change` makes of it and returns that. Raises NotFound.

        What `change` leaves as it was stays as it was written down, also where that cannot be read.
        `answers` says that the result is the answer to the call being served.
        """
        ...

    async def history(self, training: str) -> Sequence[Progress]:
        """The points kept of a training, by step."""
        ...

    async def keep_history(self, training: str, points: Sequence[Progress]) -> None:
        """Replaces the points kept of a training; the last one is where it stands."""
        ...
