"""`tiltyard train`: start a training on a node and follow it, with --submit to the score."""

from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    TRAINER,
    CommandError,
    JsonOption,
    KeyOption,
    ModelIndexOption,
    NodeOption,
    OriginOption,
    RegistryOption,
    TaskOption,
    TrainerOption,
    connect,
    connect_node,
    run,
    task_name,
)
from tiltyard.cli.output import as_json, print_json, print_message
from tiltyard.cli.submissions import check_accepted, until_judged
from tiltyard.cli.submissions import describe as describe_submission
from tiltyard.cli.training_progress import CurveOption, Record, TensorBoardOption, follow_to_end

if TYPE_CHECKING:
    from tiltyard.registry.v1 import submission_pb2

OPTIMIZERS = {"adamw": "OPTIMIZER_KIND_ADAMW", "sgd": "OPTIMIZER_KIND_SGD"}
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
SCHEDULES = {"cosine": "SCHEDULE_KIND_COSINE", "constant": "SCHEDULE_KIND_CONSTANT"}


def train(
    dataset: Annotated[str, typer.Argument(help="Path below the node's data folder.")],
    task: TaskOption,
    key: KeyOption,
    trainer: TrainerOption = TRAINER,
    node: NodeOption = "",
    model_index: ModelIndexOption = 0,
    epochs: Annotated[
        int, typer.Option(min=0, max=_INT32_MAX, help="Passes over the dataset; 0 takes the node's default.")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(min=0, max=_INT32_MAX, help="Rows per step; 0 takes the node's default.")
    ] = 0,
    learning_rate: Annotated[float, typer.Option(help="Step size; 0 takes the node's default.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.01 for adamw, 0 for sgd.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of sgd. Default: 0.9.")] = None,
    schedule: Annotated[str, typer.Option(help="cosine or constant, after the warm-up.")] = "cosine",
    warmup: Annotated[float | None, typer.Option(help="Share of the steps that warm up. Default: 0.05.")] = None,
    max_gradient_norm: Annotated[float, typer.Option(help="Clip gradients to this norm; 0 never.")] = 0.0,
    accumulation: Annotated[
        int, typer.Option(min=0, max=_INT32_MAX, help="Steps whose gradients are added up before one update.")
    ] = 1,
    holdout_share: Annotated[float | None, typer.Option(help="Share of the rows held out. Default: 0.1.")] = None,
    patience: Annotated[
        int, typer.Option(min=0, max=_INT32_MAX, help="Epochs without progress before stopping; 0 means never.")
    ] = 0,
    label_smoothing: Annotated[float | None, typer.Option(help="Of cross-entropy. Default: 0.1.")] = None,
    class_weights: Annotated[str, typer.Option(help="Of cross-entropy: one factor for each class, as 1,1,2.5.")] = "",
    seed: Annotated[
        int, typer.Option(min=-_INT64_MAX - 1, max=_INT64_MAX, help="Seed of weights, order and dropout.")
    ] = 0,
    augment: Annotated[bool, typer.Option("--augment", help="Shift images at random while training.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute products in bfloat16.")] = False,
    tf32: Annotated[bool, typer.Option("--tf32", help="CUDA: let float32 products be computed in TF32.")] = False,
    compile_network: Annotated[bool, typer.Option("--compile", help="Compile the network first.")] = False,
    ray_workers: Annotated[
        int, typer.Option(min=0, max=_INT32_MAX, help="Train with so many workers of Ray Train; 0: without Ray.")
    ] = 0,
    checkpoint_interval_s: Annotated[
        int, typer.Option(min=0, max=_INT32_MAX, help="Seconds between checkpoints; 0 takes 60.")
    ] = 0,
    checkpoint_interval_steps: Annotated[
        int, typer.Option(min=0, max=_INT32_MAX, help="Steps between checkpoints, too; 0: by time.")
    ] = 0,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Begin with fresh weights though the task names a base model.")
    ] = False,
    curve: CurveOption = None,
    tensorboard: TensorBoardOption = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the model, and wait for its score.")] = False,
    wait: Annotated[bool, typer.Option(help="Of --submit: whether to wait for the score.")] = True,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Train a task's model on a node's local dataset. With --submit its score is the end of it."""
    from tiltyard.client import new_request_id
    from tiltyard.trainer.v1 import trainer_pb2

    config = trainer_pb2.TrainingConfig(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=trainer_pb2.OptimizerKind.Value(_chosen("--optimizer", optimizer, OPTIMIZERS)),
        weight_decay=weight_decay,
        momentum=momentum,
        schedule=trainer_pb2.ScheduleKind.Value(_chosen("--schedule", schedule, SCHEDULES)),
        warmup=warmup,
        max_gradient_norm=max_gradient_norm,
        accumulation=accumulation,
        holdout_share=holdout_share,
        patience=patience,
        label_smoothing=label_smoothing,
        class_weights=_numbers("--class-weights", class_weights),
        seed=seed,
        augment=augment,
        precision=trainer_pb2.PRECISION_BFLOAT16 if bf16 else trainer_pb2.PRECISION_UNSPECIFIED,
        tf32=tf32,
        compile=compile_network,
        executor=trainer_pb2.EXECUTOR_RAY if ray_workers else trainer_pb2.EXECUTOR_LOCAL,
        workers=ray_workers,
        checkpoint_interval_s=checkpoint_interval_s,
        checkpoint_interval_steps=checkpoint_interval_steps,
        from_scratch=from_scratch,
    )

    async def work() -> None:
        record = Record(curve=curve, tensorboard=tensorboard)
        async with connect_node(key, trainer, node) as connection:
            request = trainer_pb2.StartTrainingRequest(
                task=task_name(task),
                model_index=model_index,
                dataset=dataset,
                config=config,
                submit=submit,
                request_id=new_request_id(),
            )
            started = (await connection.trainings.StartTraining(request)).training
            training = await follow_to_end(connection, started, record)
        if training.state != trainer_pb2.TRAINING_STATE_SUCCEEDED:
            raise CommandError(f"{training.name} did not succeed: {training.error or 'it was cancelled'}")
        judged: submission_pb2.Submission | None = None
        if submit and wait:
            async with connect(key, origin, registry) as client:
                judged = await until_judged(client, training.submission)
        if json:
            print_json(as_json(training) | ({"judged": as_json(judged)} if judged else {}))
        else:
            print_message(training, as_document=False)
            if judged:
                print(describe_submission(judged))
        if judged:
            check_accepted(judged)

    run(work())


def _chosen(option: str, word: str, known: dict[str, str]) -> str:
    """The contract's name of a word. Raises BadParameter."""
    if word not in known:
        raise typer.BadParameter(f"{word!r} is none of {', '.join(known)}", param_hint=option)
    return known[word]


def _numbers(option: str, text: str) -> list[float]:
    """Numbers between commas. Raises BadParameter."""
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers like 1,1,2.5", param_hint=option) from None
