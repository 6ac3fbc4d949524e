"""A task's configuration, exactly as the domain holds it and as the record log and the database keep it."""

from services.registry.convert import enums
from services.registry.convert.times import duration, moment, span, timestamp
from services.registry.task_config import DatasetDigest, Limits, Schedule, SelectionPolicy, TaskConfig, ValidatorRate
from services.runtime import names
from tiltyard.type.v1 import task_pb2
from tiltyard.wire import model_spec_from_proto, model_spec_to_proto


def config_message(config: TaskConfig) -> task_pb2.TaskConfig:
    """The whole configuration; `config_of` gives back an equal one."""
    return task_pb2.TaskConfig(
        display_name=config.display_name,
        description=config.description,
        field=config.field,
        models=[model_spec_to_proto(model) for model in config.models],
        loss=enums.LOSS.number(config.loss),
        metric=enums.METRIC.number(config.metric),
        top_k=config.top_k,
        bound=config.bound,
        evaluation_dataset=_digest_message(config.evaluation_dataset),
        holdout=None if config.holdout is None else _digest_message(config.holdout),
        schedule=_schedule_message(config.schedule),
        limits=_limits_message(config.limits),
        validators_per_submission=config.validators_per_submission,
        tolerance=config.tolerance,
        selection=policy_message(config.selection),
        score_visibility=enums.SCORE_VISIBILITY.number(config.score_visibility),
        ladder_step_micros=config.ladder_step_micros,
        allow_node_endpoint=config.allow_node_endpoint,
        class_names=config.class_names,
        base_model=names.format_artifact(config.base_model) if config.base_model else "",
    )


def config_of(message: task_pb2.TaskConfig) -> TaskConfig:
    """The configuration that `config_message` made the message of; one by a stranger goes through `drafts`."""
    schedule, limits = message.schedule, message.limits
    return TaskConfig(
        display_name=message.display_name,
        description=message.description,
        field=message.field,
        models=tuple(model_spec_from_proto(model) for model in message.models),
        loss=enums.LOSS.member(message.loss),
        metric=enums.METRIC.member(message.metric),
        top_k=message.top_k,
        bound=message.bound,
        evaluation_dataset=_digest_of(message.evaluation_dataset),
        holdout=_digest_of(message.holdout) if message.HasField("holdout") else None,
        schedule=Schedule(
            prepare_deadline=moment(schedule.prepare_deadline),
            close_time=moment(schedule.close_time),
            reveal_time=span(schedule.reveal_time),
            accept_time=span(schedule.accept_time),
            lease_time=span(schedule.lease_time),
            evaluation_time=span(schedule.evaluation_time),
            draw_time=span(schedule.draw_time),
            holdout_time=span(schedule.holdout_time),
        ),
        limits=Limits(
            max_parameters=limits.max_parameters,
            max_model_bytes=limits.max_model_bytes,
            max_cpu_time=span(limits.max_cpu_time),
            max_memory_bytes=limits.max_memory_bytes,
            daily_submissions=limits.daily_submissions,
        ),
        validators_per_submission=message.validators_per_submission,
        tolerance=message.tolerance,
        selection=policy_of(message.selection),
        score_visibility=enums.SCORE_VISIBILITY.member(message.score_visibility),
        ladder_step_micros=message.ladder_step_micros,
        allow_node_endpoint=message.allow_node_endpoint,
        class_names=tuple(message.class_names),
        base_model=names.parse_artifact(message.base_model) if message.base_model else "",
    )


def policy_message(policy: SelectionPolicy) -> task_pb2.SelectionPolicy:
    """The selection policy; zeros stay zeros."""
    return task_pb2.SelectionPolicy(
        curve=enums.CURVE.number(policy.curve),
        alpha_millis=policy.alpha_millis,
        validator_min_stake_micros=policy.validator_min_stake_micros,
        training_node_min_stake_micros=policy.training_node_min_stake_micros,
        rate=task_pb2.ValidatorRate(
            window=duration(policy.rate.window) if policy.rate.window else None,
            limit=policy.rate.limit,
            reference_stake_micros=policy.rate.reference_stake_micros,
        ),
    )


def policy_of(message: task_pb2.SelectionPolicy) -> SelectionPolicy:
    """The policy of a message whose curve is set."""
    return SelectionPolicy(
        curve=enums.CURVE.member(message.curve),
        alpha_millis=message.alpha_millis,
        validator_min_stake_micros=message.validator_min_stake_micros,
        training_node_min_stake_micros=message.training_node_min_stake_micros,
        rate=ValidatorRate(
            window=span(message.rate.window),
            limit=message.rate.limit,
            reference_stake_micros=message.rate.reference_stake_micros,
        ),
    )


def _digest_message(digest: DatasetDigest) -> task_pb2.DatasetDigest:
    return task_pb2.DatasetDigest(sha256=digest.sha256, size_bytes=digest.size_bytes)


def _digest_of(message: task_pb2.DatasetDigest) -> DatasetDigest:
    return DatasetDigest(sha256=message.sha256, size_bytes=message.size_bytes)


def _schedule_message(schedule: Schedule) -> task_pb2.TaskSchedule:
    return task_pb2.TaskSchedule(
        prepare_deadline=timestamp(schedule.prepare_deadline),
        close_time=timestamp(schedule.close_time),
        reveal_time=duration(schedule.reveal_time),
        accept_time=duration(schedule.accept_time),
        lease_time=duration(schedule.lease_time),
        evaluation_time=duration(schedule.evaluation_time),
        draw_time=duration(schedule.draw_time),
        holdout_time=duration(schedule.holdout_time),
    )


def _limits_message(limits: Limits) -> task_pb2.TaskLimits:
    return task_pb2.TaskLimits(
        max_parameters=limits.max_parameters,
        max_model_bytes=limits.max_model_bytes,
        max_cpu_time=duration(limits.max_cpu_time),
        max_memory_bytes=limits.max_memory_bytes,
        daily_submissions=limits.daily_submissions,
    )
