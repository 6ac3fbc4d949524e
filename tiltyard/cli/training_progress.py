"""A training as it is followed from a shell: a progress line, remarks beside it, its curve, TensorBoard's logs."""

import itertools
import sys
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.loss_curves import LossCurve, TensorBoardLogs, check_drawing
from tiltyard.cli.output import ProgressLine, enum_word

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tiltyard.client import Node
    from tiltyard.trainer.v1 import trainer_pb2

CurveOption = Annotated[
    Path | None, typer.Option("--curve", help="Write the loss curve to this PNG, and a CSV of the same name beside it.")
]
TensorBoardOption = Annotated[
    Path | None, typer.Option("--tensorboard", help="Write TensorBoard's logs into this folder as points come in.")
]


async def follow(node: "Node", training: str) -> "AsyncIterator[trainer_pb2.Training]":
    """The training at each step until it ends, through breaks of the connection and restarts of the node."""
    from tiltyard.calls import resuming
    from tiltyard.trainer.v1 import trainer_pb2

    ended = (
        trainer_pb2.TRAINING_STATE_SUCCEEDED,
        trainer_pb2.TRAINING_STATE_FAILED,
        trainer_pb2.TRAINING_STATE_CANCELLED,
    )
    messages = resuming.follow(
        lambda: node.trainings.WatchTraining(trainer_pb2.WatchTrainingRequest(name=training)),
        lambda: node.trainings.GetTraining(trainer_pb2.GetTrainingRequest(name=training)),
    )
    async with aclosing(messages):
        async for seen in messages:
            yield seen.training
            if seen.training.state in ended:
                return  # what becomes of the stream after that is nobody's trouble


class Record:
    """Where the points of a followed training go. Made before the training is, so that what is missing is told then.

    Raises CommandError without matplotlib for a curve, without tensorboardX for TensorBoard's logs.
    """

    def __init__(self, *, curve: Path | None, tensorboard: Path | None) -> None:
        self._curve = curve
        self._points = LossCurve()
        if curve is not None:
            check_drawing()
        self._logs = None if tensorboard is None else TensorBoardLogs(tensorboard)

    def add(self, point: "trainer_pb2.TrainingProgress") -> None:
        """Takes a point of the training."""
        self._points.add(point)
        if self._logs is not None:
            self._logs.add(point)

    def write(self, *, title: str) -> None:
        """Leaves all that has come as files."""
        if self._curve is not None:
            self._points.write_csv(self._curve.with_suffix(".csv"))
            self._points.write_png(self._curve, title=title)
        if self._logs is not None:
            self._logs.close()


async def follow_to_end(node: "Node", training: "trainer_pb2.Training", record: Record) -> "trainer_pb2.Training":
    """Shows the training until it ends, and keeps its points also when it fails or the command is interrupted."""
    remarks, seen = Remarks(), training
    with ExitStack() as after:
        after.callback(record.write, title=training.name)
        line = after.enter_context(ProgressLine("training", unit="steps"))
        async for seen in follow(node, training.name):
            line.update(seen.progress.step, seen.progress.total_steps, describe(seen))
            remarks.look(seen)
            record.add(seen.progress)
    return seen


def describe(training: "trainer_pb2.Training") -> str:
    """A few words on a training's last step, or on what goes before the first."""
    progress = training.progress
    if training.HasField("preparation"):
        found = training.preparation
        of_all = f" of {found.total_rows:,}" if found.total_rows else ""
        stage = enum_word(found, "stage")
        return f"{stage} the dataset, {found.rows:,}{of_all} rows"
    if not progress.total_steps:
        return "waiting for its first step"
    words = f"loss {progress.loss:.4f}, {progress.samples_per_second:,.0f} rows/s"
    if progress.device_memory_bytes:
        words += f", {progress.device_memory_bytes / 2**30:.1f} GiB on {training.device}"
    if progress.holdout_total:
        words += f", held out {progress.holdout_correct}/{progress.holdout_total}"
    return words


def describe_data(data: "trainer_pb2.DataReport") -> str:
    """One line on what a node found in its dataset."""
    words = f"{data.rows:,} rows, features {data.minimum:g} to {data.maximum:g}, mean {data.mean:.4g}"
    if data.class_rows:
        words += f", {len(data.class_rows)} classes of {min(data.class_rows):,} to {max(data.class_rows):,} rows"
    return f"{words}, {data.duplicate_rows:,} duplicates, {data.not_finite_rows:,} rows with NaN"


class Remarks:
    """Says on standard error what is new beside the progress: the data's report, and each warning, once."""

    def __init__(self) -> None:
        self._reported = False
        self._warnings: list[str] = []

    def look(self, training: "trainer_pb2.Training") -> None:
        """Says what this state has and the one before had not."""
        if training.HasField("data") and not self._reported:
            self._reported = True
            print(f"data: {describe_data(training.data)}", file=sys.stderr)
        # Where they are many an old one goes for each new one: those are new that do not follow among the last ones.
        known = iter(self._warnings)
        new = list(itertools.dropwhile(lambda text: text in known, training.warnings))
        for text in new:
            print(f"warning: {text}", file=sys.stderr)
        if new:
            self._warnings = list(training.warnings)
