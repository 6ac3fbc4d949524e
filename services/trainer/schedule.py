"""The learning rate of each update: a linear warm-up, then constant or down to zero along a cosine."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from services.trainer.config import ScheduleKind, TrainingConfig

DEFAULT_EPOCHS = 30
# A few hundred rows make so few batches that thirty passes over them stop long before the loss does.
_ENOUGH_UPDATES = 3000
_MOST_DEFAULT_EPOCHS = 300


def default_epochs(rows: int, config: TrainingConfig) -> int:
    """The epochs of who names none: 30, and on a small dataset as many as make 3,000 updates, 300 at most."""
    plan = Plan(rows=max(1, rows - int(config.holdout_share * rows)), config=config)
    return max(DEFAULT_EPOCHS, min(_MOST_DEFAULT_EPOCHS, -(-_ENOUGH_UPDATES // plan.updates_per_epoch)))


def completed(config: TrainingConfig, *, rows: int) -> TrainingConfig:
    """With the epochs of who names none, which wait for the rows to be known."""
    return config if config.epochs else replace(config, epochs=default_epochs(rows, config))


@dataclass(frozen=True)
class Plan:
    """How a dataset of `rows` training rows becomes steps (one batch each) and updates (one of the weights each)."""

    rows: int
    config: TrainingConfig

    @cached_property
    def steps_per_epoch(self) -> int:
        """Batches of one pass; the last one may be smaller."""
        return -(-self.rows // self.config.batch_size)

    @cached_property
    def updates_per_epoch(self) -> int:
        """Updates of one pass; gradients are never added up across its end."""
        return -(-self.steps_per_epoch // self.config.accumulation)

    @cached_property
    def total_steps(self) -> int:
        """Batches of all passes."""
        return self.config.epochs * self.steps_per_epoch

    @cached_property
    def total_updates(self) -> int:
        """Updates of all passes."""
        return self.config.epochs * self.updates_per_epoch

    def rows_before(self, step: int) -> int:
        """Rows trained on in the first `step` steps."""
        epoch, done = divmod(step, self.steps_per_epoch)
        return epoch * self.rows + min(self.rows, done * self.config.batch_size)

    def learning_rate(self, update: int) -> float:
        """The step size of an update, counted from 0."""
        base = self.config.learning_rate
        warm = int(self.config.warmup * self.total_updates)
        if update < warm:
            return base * (update + 1) / warm
        if self.config.schedule is ScheduleKind.CONSTANT:
            return base
        return base * 0.5 * (1 + math.cos(math.pi * (update - warm) / (self.total_updates - warm)))
