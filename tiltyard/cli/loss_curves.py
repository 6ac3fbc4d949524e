"""A training's history as files: a picture, a table, TensorBoard's logs."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from tiltyard.cli.connection import CommandError

if TYPE_CHECKING:
    from tiltyard.trainer.v1 import trainer_pb2

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "samples_per_second",
    "device_memory_bytes",
    "holdout_correct",
    "holdout_total",
    "holdout_loss",
)


class LossCurve:
    """The points of one training by step; where it went back to a checkpoint, the later ones count."""

    def __init__(self) -> None:
        self._points: dict[int, trainer_pb2.TrainingProgress] = {}

    def add(self, point: "trainer_pb2.TrainingProgress") -> None:
        """Takes a point; one before the first step says nothing and is left out."""
        if point.step:
            self._points[point.step] = point

    def write_csv(self, path: Path) -> None:
        """One line for each point, the columns of `COLUMNS`."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([getattr(point, name) for name in COLUMNS] for point in self._sorted())

    def write_png(self, path: Path, *, title: str) -> None:
        """Loss by step, and the held-out loss beside it. Raises CommandError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise CommandError("a picture needs matplotlib: pip install 'tiltyard[plot]'") from error
        points = self._sorted()
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss", title=title)
        axes.plot([point.step for point in points], [point.loss for point in points], label="training")
        judged = [point for point in points if point.holdout_total]
        if judged:
            steps, losses = [point.step for point in judged], [point.holdout_loss for point in judged]
            axes.plot(steps, losses, label="held out", drawstyle="steps-post")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)

    def write_tensorboard(self, folder: Path) -> None:
        """Scalars by step. Raises CommandError without tensorboardX."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise CommandError("TensorBoard's logs need tensorboardX: pip install 'tiltyard[tensorboard]'") from error
        with SummaryWriter(str(folder)) as writer:
            for point in self._sorted():
                seconds = point.time.ToNanoseconds() / 1e9
                for name in ("loss", "learning_rate", "samples_per_second"):
                    writer.add_scalar(name, getattr(point, name), point.step, walltime=seconds)
                if point.holdout_total:
                    writer.add_scalar("holdout_loss", point.holdout_loss, point.step, walltime=seconds)

    def _sorted(self) -> "list[trainer_pb2.TrainingProgress]":
        return [self._points[step] for step in sorted(self._points)]
