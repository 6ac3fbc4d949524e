"""Turns the losses of steps into points of progress, and stops a descent whose loss is no longer finite."""

import math
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from services.trainer.descent.holdout import Holdout
from services.trainer.progress import Progress
from services.trainer.schedule import Plan

REPORT_INTERVAL_S = 0.1


class Diverged(Exception):
    """The loss or the weights are no longer finite."""


class Measured(Protocol):
    """The descent, as far as its progress is told."""

    plan: Plan
    step: int
    holdout: Holdout | None

    @property
    def learning_rate(self) -> float:
        """Of the last update."""
        ...

    def device_memory_bytes(self) -> int:
        """Device memory in use; 0 on a CPU."""
        ...


class Meter:
    """Turns the losses since the last look into a point of progress; only a look waits for the device."""

    def __init__(self, descent: Measured, report: Callable[[Progress], None], clock: Callable[[], float]) -> None:
        self.losses: list[Tensor] = []
        self.due = -math.inf
        self._descent = descent
        self._report = report
        self._looked_at = clock()
        self._looked_step = descent.step
        self._step_s = 0.0

    def look(self, now: float) -> None:
        """Reports, and raises Diverged when a loss was not finite."""
        self.due = now + REPORT_INTERVAL_S
        if not self.losses:
            return
        descent = self._descent
        values = torch.stack(self.losses).tolist()
        self.losses.clear()
        for step, value in enumerate(values, descent.step - len(values) + 1):
            if not math.isfinite(value):
                raise Diverged(f"the loss is {value} at step {step}: try a smaller learning rate")
        elapsed_s = max(now - self._looked_at, 1e-9)
        samples = descent.plan.rows_before(descent.step) - descent.plan.rows_before(self._looked_step)
        step_s = elapsed_s / max(1, descent.step - self._looked_step)
        self._step_s = 0.7 * self._step_s + 0.3 * step_s if self._step_s else step_s
        self._looked_at, self._looked_step = now, descent.step
        holdout = descent.holdout or Holdout(0, 0, 0.0)
        self._report(
            Progress(
                step=descent.step,
                total_steps=descent.plan.total_steps,
                epoch=(descent.step - 1) // descent.plan.steps_per_epoch + 1,
                loss=math.fsum(values) / len(values),
                learning_rate=descent.learning_rate,
                samples_per_second=samples / elapsed_s,
                device_memory_bytes=descent.device_memory_bytes(),
                eta_s=self._step_s * (descent.plan.total_steps - descent.step),
                holdout_correct=holdout.correct,
                holdout_total=holdout.total,
                holdout_loss=holdout.loss,
                time_s=time.time(),
            )
        )
