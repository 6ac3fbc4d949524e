"""A training's history as files: a picture, a table, TensorBoard's logs."""

import csv
import importlib.util
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


# Who watches a training there does not wait longer than this.
_FLUSHED_AFTER_S = 5


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
        check_drawing()
        from matplotlib.figure import Figure

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

    def _sorted(self) -> "list[trainer_pb2.TrainingProgress]":
        return [self._points[step] for step in sorted(self._points)]


def check_drawing() -> None:
    """Raises CommandError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("a picture needs matplotlib: pip install 'tiltyard[plot]'")


class TensorBoardLogs:
    """A training's scalars by step, written while it goes on. Raises CommandError without tensorboardX."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise CommandError("TensorBoard's logs need tensorboardX: pip install 'tiltyard[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder), flush_secs=_FLUSHED_AFTER_S)
        self._written = 0

    def add(self, point: "trainer_pb2.TrainingProgress") -> None:
        """Writes a point; what a resumed training or a watch that began anew repeats is left out."""
        if point.step <= self._written:
            return
        self._written = point.step
        seconds = point.time.ToNanoseconds() / 1e9
        names = ("loss", "learning_rate", "samples_per_second")
        for name in (*names, "holdout_loss") if point.holdout_total else names:
            self._writer.add_scalar(name, getattr(point, name), point.step, walltime=seconds)

    def close(self) -> None:
        """Everything is in the folder."""
        self._writer.close()
