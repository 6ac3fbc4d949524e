"""`tiltyard train`: start a training on a node and follow it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import (
    TRAINER,
    CommandError,
    JsonOption,
    KeyOption,
    NodeOption,
    TaskOption,
    TrainerOption,
    connect_node,
    run,
    task_name,
)
from tiltyard.cli.loss_curves import LossCurve
from tiltyard.cli.output import ProgressLine, print_message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tiltyard.client import Node
    from tiltyard.trainer.v1 import trainer_pb2

OPTIMIZERS = {"adamw": "OPTIMIZER_KIND_ADAMW", "sgd": "OPTIMIZER_KIND_SGD"}


async def follow(node: "Node", training: str) -> "AsyncIterator[trainer_pb2.Training]":
    """The training at each step until it ends, through breaks of the connection and restarts of the node."""
    import grpc

    from tiltyard.client import is_transient, persist
    from tiltyard.trainer.v1 import trainer_pb2

    ended = (
        trainer_pb2.TRAINING_STATE_SUCCEEDED,
        trainer_pb2.TRAINING_STATE_FAILED,
        trainer_pb2.TRAINING_STATE_CANCELLED,
    )
    while True:
        try:
            async for seen in node.trainings.WatchTraining(trainer_pb2.WatchTrainingRequest(name=training)):
                yield seen.training
                if seen.training.state in ended:
                    return
        except grpc.aio.AioRpcError as error:
            if not is_transient(error):
                raise
        # The node answers again before it is watched again.
        await persist(lambda: node.trainings.GetTraining(trainer_pb2.GetTrainingRequest(name=training)))


def describe(training: "trainer_pb2.Training") -> str:
    """A few words on a training's last step."""
    progress = training.progress
    words = f"loss {progress.loss:.4f}, {progress.samples_per_second:,.0f} rows/s"
    if progress.holdout_total:
        words += f", held out {progress.holdout_correct}/{progress.holdout_total}"
    return words


def describe_data(data: "trainer_pb2.DataReport") -> str:
    """One line on what a node found in its dataset."""
    words = f"{data.rows:,} rows, features {data.minimum:g} to {data.maximum:g}, mean {data.mean:.4g}"
    if data.class_rows:
        words += f", {len(data.class_rows)} classes of {min(data.class_rows):,} to {max(data.class_rows):,} rows"
    return f"{words}, {data.duplicate_rows:,} duplicates, {data.not_finite_rows:,} rows with NaN"


class _Remarks:
    """Says on standard error what is new beside the progress: the data's report, and each warning, once."""

    def __init__(self) -> None:
        self._reported = False
        self._warnings = 0

    def look(self, training: "trainer_pb2.Training") -> None:
        if training.HasField("data") and not self._reported:
            self._reported = True
            print(f"data: {describe_data(training.data)}", file=sys.stderr)
        for text in training.warnings[self._warnings :]:
            print(f"warning: {text}", file=sys.stderr)
        self._warnings = max(self._warnings, len(training.warnings))


def train(
    dataset: Annotated[str, typer.Argument(help="Path below the node's data folder.")],
    task: TaskOption,
    key: KeyOption,
    trainer: TrainerOption = TRAINER,
    node: NodeOption = "",
    model_index: Annotated[int, typer.Option(help="Which of the task's models, counted from 0.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the dataset; 0 takes the node's default.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows per step; 0 takes the node's default.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Step size; 0 takes the node's default.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    seed: Annotated[int, typer.Option(help="Seed of weights, order and dropout.")] = 0,
    patience: Annotated[int, typer.Option(help="Epochs without progress before stopping; 0 means never.")] = 0,
    augment: Annotated[bool, typer.Option("--augment", help="Shift images at random while training.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute products in bfloat16.")] = False,
    compile_network: Annotated[bool, typer.Option("--compile", help="Compile the network first.")] = False,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Begin with fresh weights though the task names a base model.")
    ] = False,
    curve: Annotated[
        Path | None, typer.Option(help="Write the loss curve to this PNG, and a CSV of the same name beside it.")
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Write TensorBoard's logs into this folder.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the model when it has been trained.")] = False,
    json: JsonOption = False,
) -> None:
    """Train a task's model on a node's local dataset, and submit it with --submit."""
    from tiltyard.client import new_request_id
    from tiltyard.trainer.v1 import trainer_pb2

    if optimizer not in OPTIMIZERS:
        raise typer.BadParameter(f"{optimizer!r} is neither adamw nor sgd", param_hint="--optimizer")

    async def work() -> None:
        async with connect_node(key, trainer, node) as connection:
            request = trainer_pb2.StartTrainingRequest(
                task=task_name(task),
                model_index=model_index,
                dataset=dataset,
                config=trainer_pb2.TrainingConfig(
                    epochs=epochs,
                    batch_size=batch_size,
                    learning_rate=learning_rate,
                    optimizer=trainer_pb2.OptimizerKind.Value(OPTIMIZERS[optimizer]),
                    seed=seed,
                    patience=patience,
                    augment=augment,
                    precision=trainer_pb2.PRECISION_BFLOAT16 if bf16 else trainer_pb2.PRECISION_UNSPECIFIED,
                    compile=compile_network,
                    from_scratch=from_scratch,
                ),
                submit=submit,
                request_id=new_request_id(),
            )
            started = (await connection.trainings.StartTraining(request)).training
            training = started
            points, remarks = LossCurve(), _Remarks()
            with ProgressLine("training", unit="steps") as line:
                async for training in follow(connection, started.name):
                    line.update(training.progress.step, training.progress.total_steps, describe(training))
                    remarks.look(training)
                    points.add(training.progress)
        # Also of a training that failed: that is when one looks at its curve.
        if curve is not None:
            points.write_csv(curve.with_suffix(".csv"))
            points.write_png(curve, title=training.name)
        if tensorboard is not None:
            points.write_tensorboard(tensorboard)
        if training.state != trainer_pb2.TRAINING_STATE_SUCCEEDED:
            raise CommandError(f"{training.name} did not succeed: {training.error or 'it was cancelled'}")
        print_message(training, as_document=json)

    run(work())
