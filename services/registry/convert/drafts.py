"""A task's configuration as a stranger sends it: every field checked, every default filled in."""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import Enum
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from services.registry.convert.enums import CURVE, LOSS, METRIC, SCORE_VISIBILITY, EnumWords
from services.registry.convert.participants import FIELD_OF_EXPERTISE, MAX_NAME_CHARS
from services.registry.convert.times import EPOCH, moment, span
from services.registry.states import Curve, Loss, Metric, ScoreVisibility
from services.registry.task_config import DatasetDigest, Limits, Schedule, SelectionPolicy, TaskConfig, ValidatorRate
from services.runtime import names
from services.runtime.errors import InvalidArgument
from services.runtime.fields import FieldChecks
from tiltyard import modelspec
from tiltyard.modelspec import ModelSpec
from tiltyard.type.v1 import model_pb2, task_pb2
from tiltyard.wire import WireError, model_spec_from_proto

SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
MAX_MODELS = 100
MAX_DESCRIPTION_CHARS = 10_000
# A task shows in answers and in the log, beside much else, and no message is larger than 4 MiB.
MAX_CONFIG_BYTES = 1 << 20
MAX_VALIDATORS = 99
_INT64 = (1 << 63) - 1
_MOST_ASSIGNMENTS = (1 << 31) - 1  # in one rate window, as the selector allows them
E = TypeVar("E", bound=Enum)
_LONGEST_TASK = 10 * 366 * DAY


def draft_of(message: task_pb2.TaskConfig, *, now: datetime, max_dataset_bytes: int) -> TaskConfig:
    """The configuration with its defaults, but for zeros in `selection`, which stand for the selector's.

    Raises InvalidArgument that names every bad field, as `config.models[0].mlp.hidden[2]`.
    """
    size_bytes = message.ByteSize()
    if size_bytes > MAX_CONFIG_BYTES:
        raise InvalidArgument.field("config", f"has {size_bytes} bytes, at most {MAX_CONFIG_BYTES} are allowed")
    checks = FieldChecks()
    limits = _limits(checks, message.limits)
    models = _models(checks, message.models, limits.max_parameters)
    config = TaskConfig(
        display_name=_display_name(checks, message.display_name),
        description=description_of(checks, "config.description", message.description),
        field=message.field or "general",
        models=models,
        loss=_choice(checks, "config.loss", LOSS, message.loss, Loss.CROSS_ENTROPY),
        metric=_choice(checks, "config.metric", METRIC, message.metric, Metric.ACCURACY),
        top_k=message.top_k,
        bound=message.bound,
        evaluation_dataset=_digest(
            checks, "config.evaluation_dataset", message.evaluation_dataset, max_bytes=max_dataset_bytes
        ),
        holdout=(
            _digest(checks, "config.holdout", message.holdout, max_bytes=max_dataset_bytes)
            if message.HasField("holdout")
            else None
        ),
        schedule=_schedule(checks, message.schedule, now),
        limits=limits,
        validators_per_submission=message.validators_per_submission or 3,
        tolerance=message.tolerance,
        selection=_selection(checks, message.selection),
        score_visibility=_choice(
            checks, "config.score_visibility", SCORE_VISIBILITY, message.score_visibility, ScoreVisibility.FULL
        ),
        ladder_step_micros=message.ladder_step_micros or 10_000,
        allow_node_endpoint=message.allow_node_endpoint,
        class_names=tuple(message.class_names),
        base_model=_base_model(checks, message.base_model, models),
    )
    _check_rest(checks, config)
    checks.finish()
    return config


def description_of(checks: FieldChecks, field: str, value: str) -> str:
    """A text of several lines for people."""
    if len(value) > MAX_DESCRIPTION_CHARS:
        checks.fail(field, f"has {len(value)} characters, allowed are {MAX_DESCRIPTION_CHARS}")
    return value


def time_of(checks: FieldChecks, field: str, message: Timestamp) -> datetime:
    """A moment that can be represented."""
    try:
        return moment(message)
    except (OverflowError, ValueError):
        checks.fail(field, "is no time between the years 1 and 9999")
        return EPOCH


def _choice(checks: FieldChecks, field: str, words: EnumWords[E], number: int, default: E) -> E:
    if not number:
        return default
    return words.member(number) if checks.one_of(field, number, words.numbers) else default


def _display_name(checks: FieldChecks, value: str) -> str:
    checks.text("config.display_name", value, max_chars=MAX_NAME_CHARS)
    return value


def _models(checks: FieldChecks, messages: Sequence[model_pb2.ModelSpec], max_parameters: int) -> tuple[ModelSpec, ...]:
    checks.count("config.models", messages, minimum=1, maximum=MAX_MODELS)
    models: dict[int, ModelSpec] = {}
    for index, message in enumerate(messages[:MAX_MODELS]):
        path = f"config.models[{index}]"
        try:
            model = model_spec_from_proto(message)
        except WireError as error:
            checks.fail(f"{path}.{error.field}", error.description)
            continue
        for violation in modelspec.validate(model, max_parameters=max_parameters):
            checks.fail(f"{path}.{violation.field}", violation.description)
        models[index] = model
    first = next(iter(models.values()), None)
    for index, model in models.items():
        # All are judged on one dataset.
        path = f"config.models[{index}]"
        checks.require(f"{path}.input_shape", first and model.input_shape == first.input_shape, "differs from others")
        checks.require(f"{path}.outputs", first and model.outputs == first.outputs, "differs from others")
    return tuple(models.values())


def _base_model(checks: FieldChecks, name: str, models: Sequence[ModelSpec]) -> str:
    path = "config.base_model"
    if not name:
        return ""
    if models:
        checks.require(path, len(models) == 1, f"is one of {len(models)} models: a task that starts from one has one")
        weights = not isinstance(models[0].architecture, modelspec.Onnx)
        checks.require(path, weights, "must be safetensors, and the task's model is an ONNX graph")
    try:
        return names.parse_artifact(name, path)
    except InvalidArgument as error:
        checks.fail(path, error.violations[0].description)
        return ""


def _digest(checks: FieldChecks, field: str, message: task_pb2.DatasetDigest, *, max_bytes: int) -> DatasetDigest:
    checks.digest(f"{field}.sha256", message.sha256)
    checks.range(f"{field}.size_bytes", message.size_bytes, minimum=1, maximum=max_bytes, unit="bytes")
    return DatasetDigest(message.sha256, message.size_bytes)


def _duration(
    checks: FieldChecks,
    field: str,
    parent: Message,
    message: Duration,
    *,
    default: timedelta,
    longest: timedelta,
    shortest: timedelta = SECOND,
) -> timedelta:
    name = field.rpartition(".")[2]
    if not parent.HasField(name):
        return default
    try:
        value = span(message)
    except OverflowError:
        value = timedelta.max
    seconds = value.total_seconds()
    checks.range(field, seconds, minimum=shortest.total_seconds(), maximum=longest.total_seconds(), unit="seconds")
    return value


def _schedule(checks: FieldChecks, message: task_pb2.TaskSchedule, now: datetime) -> Schedule:
    path = "config.schedule"

    def length(name: str, default: timedelta, longest: timedelta) -> timedelta:
        return _duration(checks, f"{path}.{name}", message, getattr(message, name), default=default, longest=longest)

    close_time = now + 7 * DAY
    if message.HasField("close_time"):
        close_time = time_of(checks, f"{path}.close_time", message.close_time)
        checks.require(f"{path}.close_time", close_time > now, "is not in the future")
        checks.require(f"{path}.close_time", close_time <= now + _LONGEST_TASK, "is more than ten years away")
    prepare_deadline = now + timedelta(hours=1)
    if message.HasField("prepare_deadline"):
        prepare_deadline = time_of(checks, f"{path}.prepare_deadline", message.prepare_deadline)
        checks.require(f"{path}.prepare_deadline", prepare_deadline > now, "is not in the future")
        in_order = prepare_deadline <= max(close_time, now)
        checks.require(f"{path}.prepare_deadline", in_order, "is later than close_time")
    return Schedule(
        prepare_deadline=prepare_deadline,
        close_time=close_time,
        reveal_time=length("reveal_time", timedelta(hours=1), 7 * DAY),
        accept_time=length("accept_time", timedelta(minutes=1), DAY),
        lease_time=length("lease_time", timedelta(minutes=2), DAY),
        evaluation_time=length("evaluation_time", timedelta(hours=1), 7 * DAY),
        draw_time=length("draw_time", DAY, 30 * DAY),
        holdout_time=length("holdout_time", DAY, 30 * DAY),
    )


def _limits(checks: FieldChecks, message: task_pb2.TaskLimits) -> Limits:
    def bounded(name: str, default: int, maximum: int) -> int:
        value: int = getattr(message, name) or default
        checks.range(f"config.limits.{name}", value, minimum=1, maximum=maximum)
        return value

    return Limits(
        max_parameters=bounded("max_parameters", 100_000_000, 1 << 40),
        max_model_bytes=bounded("max_model_bytes", 1 << 30, 1 << 42),
        max_cpu_time=_duration(
            checks,
            "config.limits.max_cpu_time",
            message,
            message.max_cpu_time,
            default=timedelta(minutes=10),
            longest=7 * DAY,
        ),
        max_memory_bytes=bounded("max_memory_bytes", 4 << 30, 1 << 42),
        daily_submissions=bounded("daily_submissions", 20, 1_000_000),
    )


def _selection(checks: FieldChecks, message: task_pb2.SelectionPolicy) -> SelectionPolicy:
    path = "config.selection"
    curve = _choice(checks, f"{path}.curve", CURVE, message.curve, Curve.POWER)
    if curve is Curve.POWER:
        checks.range(f"{path}.alpha_millis", message.alpha_millis, minimum=0, maximum=999, unit="thousandths")
    else:
        checks.require(f"{path}.alpha_millis", not message.alpha_millis, "is for the power curve")
    for name in ("validator_min_stake_micros", "training_node_min_stake_micros"):
        checks.range(f"{path}.{name}", getattr(message, name), minimum=0, maximum=_INT64, unit="micro-units")
    rate = message.rate
    checks.range(f"{path}.rate.limit", rate.limit, minimum=0, maximum=_MOST_ASSIGNMENTS)
    checks.range(f"{path}.rate.reference_stake_micros", rate.reference_stake_micros, minimum=0, maximum=_INT64)
    return SelectionPolicy(
        curve=curve,
        alpha_millis=message.alpha_millis,
        validator_min_stake_micros=message.validator_min_stake_micros,
        training_node_min_stake_micros=message.training_node_min_stake_micros,
        rate=ValidatorRate(
            window=_duration(checks, f"{path}.rate.window", rate, rate.window, default=timedelta(), longest=366 * DAY),
            limit=rate.limit,
            reference_stake_micros=rate.reference_stake_micros,
        ),
    )


def _check_rest(checks: FieldChecks, config: TaskConfig) -> None:
    fits = FIELD_OF_EXPERTISE.fullmatch(config.field)
    checks.require("config.field", fits, "must be 1 to 63 characters of a-z, 0-9 and -")
    _check_metric(checks, config)
    checks.range(
        "config.validators_per_submission", config.validators_per_submission, minimum=1, maximum=MAX_VALIDATORS
    )
    checks.range("config.tolerance", config.tolerance, minimum=0, maximum=_INT64)
    checks.range("config.ladder_step_micros", config.ladder_step_micros, minimum=1, maximum=1_000_000)
    if config.holdout is not None:
        other = config.holdout.sha256 != config.evaluation_dataset.sha256
        checks.require("config.holdout.sha256", other, "is the evaluation dataset")
    if config.class_names:
        outputs = config.models[0].outputs if config.models else 0
        # Of a list that is too long nothing is looked at: a stranger's may have a million values.
        if checks.require(
            "config.class_names", len(config.class_names) == outputs, f"must be one for each of {outputs} outputs"
        ):
            for index, name in enumerate(config.class_names):
                checks.text(f"config.class_names[{index}]", name, max_chars=MAX_NAME_CHARS)


def _check_metric(checks: FieldChecks, config: TaskConfig) -> None:
    outputs = config.models[0].outputs if config.models else None
    if config.metric is Metric.WITHIN_BOUND:
        checks.require("config.bound", 0 < config.bound < math.inf, "must be above 0 for WITHIN_BOUND")
    elif outputs is not None:
        checks.require("config.models[0].outputs", outputs >= 2, f"must be 2 or more for {config.metric.name}")
        if config.metric is Metric.TOP_K_ACCURACY:
            checks.range("config.top_k", config.top_k, minimum=1, maximum=outputs)
