"""Trainings between the contract's messages and the domain, and the checks of every field of a request."""

import math
from collections.abc import Callable
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from services.runtime.errors import InvalidArgument
from services.runtime.fields import FieldChecks
from services.runtime.names import format_artifact, format_task, format_training, parse_task
from services.runtime.paging import fitting
from services.trainer.config import Executor, LossKind, OptimizerKind, Precision, ScheduleKind, TrainingConfig
from services.trainer.ends import Stage
from services.trainer.progress import Progress
from services.trainer.schedule import DEFAULT_EPOCHS
from services.trainer.training import Training, TrainingPage, TrainingState
from services.trainer.trainings import NewTraining
from tiltyard.modelspec import ModelSpec, validate
from tiltyard.trainer.v1 import trainer_pb2 as pb
from tiltyard.type.v1 import model_pb2, task_pb2
from tiltyard.wire import WireError, model_spec_from_proto, model_spec_to_proto

# Outside a task nobody else pays for a model's size; a task's limit is checked by its registry.
MAX_PARAMETERS = 1 << 36
_MAX_LEARNING_RATE = 100.0
_MAX_WEIGHT_DECAY = 1e6
_MAX_NORM = 1e9
_MAX_CLASS_WEIGHT = 1e6

_LOSSES = {
    task_pb2.LOSS_UNSPECIFIED: LossKind.CROSS_ENTROPY,
    task_pb2.LOSS_CROSS_ENTROPY: LossKind.CROSS_ENTROPY,
    task_pb2.LOSS_MSE: LossKind.MSE,
    task_pb2.LOSS_BINARY_CROSS_ENTROPY: LossKind.BINARY_CROSS_ENTROPY,
    task_pb2.LOSS_HUBER: LossKind.HUBER,
}
_LOSS_NUMBERS = {loss: number for number, loss in _LOSSES.items() if number}
_PRECISIONS = {
    pb.PRECISION_UNSPECIFIED: Precision.FLOAT32,
    pb.PRECISION_FLOAT32: Precision.FLOAT32,
    pb.PRECISION_BFLOAT16: Precision.BFLOAT16,
}
_EXECUTORS = {
    pb.EXECUTOR_UNSPECIFIED: Executor.LOCAL,
    pb.EXECUTOR_LOCAL: Executor.LOCAL,
    pb.EXECUTOR_RAY: Executor.RAY,
}
_EXECUTOR_NUMBERS = {executor: number for number, executor in _EXECUTORS.items() if number}
_PRECISION_NUMBERS = {precision: number for number, precision in _PRECISIONS.items() if number}
_OPTIMIZERS = {
    pb.OPTIMIZER_KIND_UNSPECIFIED: OptimizerKind.ADAMW,
    pb.OPTIMIZER_KIND_SGD: OptimizerKind.SGD,
    pb.OPTIMIZER_KIND_ADAMW: OptimizerKind.ADAMW,
}
_OPTIMIZER_NUMBERS = {OptimizerKind.SGD: pb.OPTIMIZER_KIND_SGD, OptimizerKind.ADAMW: pb.OPTIMIZER_KIND_ADAMW}
_SCHEDULES = {
    pb.SCHEDULE_KIND_UNSPECIFIED: ScheduleKind.COSINE,
    pb.SCHEDULE_KIND_CONSTANT: ScheduleKind.CONSTANT,
    pb.SCHEDULE_KIND_COSINE: ScheduleKind.COSINE,
}
_SCHEDULE_NUMBERS = {ScheduleKind.CONSTANT: pb.SCHEDULE_KIND_CONSTANT, ScheduleKind.COSINE: pb.SCHEDULE_KIND_COSINE}
_STATE_NUMBERS = {
    TrainingState.QUEUED: pb.TRAINING_STATE_QUEUED,
    TrainingState.RUNNING: pb.TRAINING_STATE_RUNNING,
    TrainingState.SUBMITTING: pb.TRAINING_STATE_SUBMITTING,
    TrainingState.SUCCEEDED: pb.TRAINING_STATE_SUCCEEDED,
    TrainingState.FAILED: pb.TRAINING_STATE_FAILED,
    TrainingState.CANCELLED: pb.TRAINING_STATE_CANCELLED,
}
_STAGE_NUMBERS = {
    Stage.PACKING: pb.PREPARATION_STAGE_PACKING,
    Stage.EXAMINING: pb.PREPARATION_STAGE_EXAMINING,
}
_DEFAULT_LEARNING_RATE = {OptimizerKind.ADAMW: 0.003, OptimizerKind.SGD: 0.05}
_DEFAULT_WEIGHT_DECAY = {OptimizerKind.ADAMW: 0.01, OptimizerKind.SGD: 0.0}


def loss_from_proto(loss: task_pb2.Loss.ValueType, field: str) -> LossKind:
    """Raises InvalidArgument on `field` for a loss that is not known."""
    if loss not in _LOSSES:
        raise InvalidArgument.field(field, f"{int(loss)} is not known")
    return _LOSSES[loss]


def new_training(request: pb.StartTrainingRequest) -> NewTraining:
    """What a request asks for. Raises InvalidArgument naming every bad field."""
    checks = FieldChecks()
    config = _config(checks, request.config)
    task, spec, loss = "", None, LossKind.CROSS_ENTROPY
    if request.task:
        task = parse_task(request.task, "task")
        checks.range("model_index", request.model_index, minimum=0, maximum=1 << 16)
        checks.require("model", not request.HasField("model"), "is the task's, leave it out")
        checks.require("loss", not request.loss, "is the task's, leave it out")
    else:
        checks.require("submit", not request.submit, "needs a task")
        checks.require("model_index", not request.model_index, "needs a task")
        loss = loss_from_proto(request.loss, "loss")
        if checks.require("model", request.HasField("model"), "is required without a task"):
            spec = _spec(checks, request.model, loss)
    checks.finish()
    return NewTraining(
        task=task,
        model_index=request.model_index,
        dataset=request.dataset,
        config=config,
        epochs_given=request.config.epochs > 0,
        label_smoothing_given=request.config.HasField("label_smoothing"),
        submit=request.submit,
        spec=spec,
        loss=loss,
    )


def _spec(checks: FieldChecks, message: model_pb2.ModelSpec, loss: LossKind) -> ModelSpec | None:
    try:
        spec = model_spec_from_proto(message)
    except WireError as error:
        checks.fail(f"model.{error.field}", error.description)
        return None
    for violation in validate(spec, max_parameters=MAX_PARAMETERS):
        checks.fail(f"model.{violation.field}", violation.description)
    if loss is LossKind.CROSS_ENTROPY and spec.outputs == 1:
        checks.fail("model.outputs", "is 1, cross-entropy needs 2 classes or more")
    return spec


def _config(checks: FieldChecks, message: pb.TrainingConfig) -> TrainingConfig:
    def whole(name: str, maximum: int, default: int) -> int:
        value: int = getattr(message, name)
        checks.range(f"config.{name}", value, minimum=0, maximum=maximum)
        return value or default

    def optional(name: str, default: float, maximum: float, *, below: bool = False) -> float:
        if not message.HasField(name):  # type: ignore[arg-type]  # a name of the message, by its callers
            return default
        return bounded(name, maximum, below=below)

    def bounded(name: str, maximum: float, *, below: bool = False) -> float:
        value: float = getattr(message, name)
        inside = 0 <= value < maximum if below else 0 <= value <= maximum
        word = "below" if below else "at most"
        checks.require(f"config.{name}", inside, f"is {value:g}, must be 0 or more and {word} {maximum:g}")
        return value

    known = message.optimizer in _OPTIMIZERS
    checks.require("config.optimizer", known, f"is {message.optimizer}, which is not known")
    checks.require("config.schedule", message.schedule in _SCHEDULES, f"is {message.schedule}, which is not known")
    checks.require("config.precision", message.precision in _PRECISIONS, f"is {message.precision}, which is not known")
    checks.require("config.executor", message.executor in _EXECUTORS, f"is {message.executor}, which is not known")
    checks.require("config.workers", message.workers <= 1 or message.executor == pb.EXECUTOR_RAY, "needs executor RAY")
    for index, weight in enumerate(message.class_weights):
        good = 0 <= weight <= _MAX_CLASS_WEIGHT
        checks.require(f"config.class_weights[{index}]", good, f"is {weight:g}, must be 0 to {_MAX_CLASS_WEIGHT:g}")
    optimizer = _OPTIMIZERS.get(message.optimizer, OptimizerKind.ADAMW)
    rate = message.learning_rate
    checks.require(
        "config.learning_rate",
        math.isfinite(rate) and 0 <= rate <= _MAX_LEARNING_RATE,
        f"is {rate:g}, must be above 0 and at most {_MAX_LEARNING_RATE:g}",
    )
    config = TrainingConfig(
        epochs=whole("epochs", 100_000, DEFAULT_EPOCHS),
        batch_size=whole("batch_size", 1_000_000, 64),
        learning_rate=rate or _DEFAULT_LEARNING_RATE[optimizer],
        optimizer=optimizer,
        weight_decay=optional("weight_decay", _DEFAULT_WEIGHT_DECAY[optimizer], _MAX_WEIGHT_DECAY),
        momentum=optional("momentum", 0.9, 1.0, below=True),
        schedule=_SCHEDULES.get(message.schedule, ScheduleKind.COSINE),
        warmup=optional("warmup", 0.05, 1.0, below=True),
        max_gradient_norm=bounded("max_gradient_norm", _MAX_NORM),
        accumulation=whole("accumulation", 10_000, 1),
        holdout_share=optional("holdout_share", 0.1, 1.0, below=True),
        patience=whole("patience", 100_000, 0),
        label_smoothing=optional("label_smoothing", 0.0, 1.0, below=True),
        seed=message.seed,
        augment=message.augment,
        checkpoint_interval_s=whole("checkpoint_interval_s", 86_400, 60),
        class_weights=tuple(message.class_weights),
        precision=_PRECISIONS.get(message.precision, Precision.FLOAT32),
        compile=message.compile,
        tf32=message.tf32,
        executor=_EXECUTORS.get(message.executor, Executor.LOCAL),
        workers=whole("workers", 1024, 1),
        from_scratch=message.from_scratch,
        checkpoint_interval_steps=whole("checkpoint_interval_steps", 1_000_000_000, 0),
    )
    if config.patience:
        checks.require("config.patience", config.holdout_share > 0, "needs a holdout_share above 0")
    return config


def training_to_proto(training: Training) -> pb.Training:
    """The message of a training as it is; what cannot be read of it is left unset."""
    message = pb.Training(
        name=format_training(training.id),
        task=format_task(training.task) if training.task else "",
        dataset=training.dataset,
        state=_STATE_NUMBERS[training.state],
        error=training.error,
        model_digest=training.model_digest,
        submission=training.submission,
        device=training.device,
        create_time=_timestamp(training.created_at),
        submit=training.submit,
        base_model=format_artifact(training.base_model) if training.base_model else "",
        warnings=training.warnings,
    )
    if not training.unreadable:
        message.model.CopyFrom(model_spec_to_proto(training.spec))
        message.loss = _LOSS_NUMBERS[training.loss]
        message.config.CopyFrom(_config_to_proto(training.config))
    if training.data is not None:
        message.data.CopyFrom(pb.DataReport(**training.data.to_json()))
    if training.preparation is not None:
        found = training.preparation
        message.preparation.stage = _STAGE_NUMBERS[found.stage]
        message.preparation.rows, message.preparation.total_rows = found.rows, found.total_rows
    if training.progress is not None:
        message.progress.CopyFrom(_progress_to_proto(training.progress))
    if training.ended_at is not None:
        message.end_time.CopyFrom(_timestamp(training.ended_at))
    return message


def _config_to_proto(config: TrainingConfig) -> pb.TrainingConfig:
    return pb.TrainingConfig(
        **{
            **config.to_json(),
            "optimizer": _OPTIMIZER_NUMBERS[config.optimizer],
            "schedule": _SCHEDULE_NUMBERS[config.schedule],
            "executor": _EXECUTOR_NUMBERS[config.executor],
            "precision": _PRECISION_NUMBERS[config.precision],
        }
    )


def _progress_to_proto(point: Progress) -> pb.TrainingProgress:
    fields = point.to_json()
    time = datetime.fromtimestamp(fields.pop("time_s"), UTC)
    return pb.TrainingProgress(**fields, time=_timestamp(time))


def _timestamp(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message


def start_response(training: Training) -> pb.StartTrainingResponse:
    """The answer of StartTraining."""
    return pb.StartTrainingResponse(training=training_to_proto(training))


def cancel_response(training: Training) -> pb.CancelTrainingResponse:
    """The answer of CancelTraining."""
    return pb.CancelTrainingResponse(training=training_to_proto(training))


def list_response(page: TrainingPage, token: Callable[[str], str]) -> pb.ListTrainingsResponse:
    """The answer of ListTrainings, with fewer trainings where one message cannot hold them all."""
    trainings = fitting(training_to_proto(training) for training in page.trainings)
    ended = len(trainings) == len(page.trainings) and not page.more
    cursor = "" if ended else page.cursors[len(trainings) - 1]
    return pb.ListTrainingsResponse(trainings=trainings, next_page_token=token(cursor))
