"""`tiltyard train`: start a training on a node and follow it."""

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
                ),
                submit=submit,
                request_id=new_request_id(),
            )
            started = (await connection.trainings.StartTraining(request)).training
            training = started
            with ProgressLine("training", unit="steps") as line:
                async for training in follow(connection, started.name):
                    line.update(training.progress.step, training.progress.total_steps, describe(training))
        if training.state != trainer_pb2.TRAINING_STATE_SUCCEEDED:
            raise CommandError(f"{training.name} did not succeed: {training.error or 'it was cancelled'}")
        print_message(training, as_document=json)

    run(work())
