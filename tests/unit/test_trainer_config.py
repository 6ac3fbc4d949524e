"""Every field of TrainingConfig: what leaving it out means, what is taken, and what is refused by the field's path."""

import math
from dataclasses import fields, replace

import pytest

from services.runtime.errors import InvalidArgument
from services.trainer import convert
from services.trainer.config import Executor, OptimizerKind, Precision, ScheduleKind, TrainingConfig
from services.trainer.training import Training, TrainingPage
from tests.unit.test_trainer_live import RUNNING
from tiltyard.trainer.v1 import trainer_pb2 as pb
from tiltyard.type.v1 import model_pb2

NAN = math.nan
SGD, RAY = pb.OPTIMIZER_KIND_SGD, pb.EXECUTOR_RAY
# Of each field: values that are taken as they are, and values that are refused.
BOUNDS: dict[str, tuple[list[object], list[object]]] = {
    "epochs": ([1, 100_000], [-1, 100_001]),
    "batch_size": ([1, 1_000_000], [-1, 1_000_001]),
    "learning_rate": ([1e-9, 100.0], [-1e-9, 100.1, NAN, math.inf]),
    "weight_decay": ([0.0, 1e6], [-0.1, 1.1e6, NAN]),
    "momentum": ([0.0, 0.99], [-0.1, 1.0, NAN]),
    "warmup": ([0.0, 0.99], [-0.1, 1.0, NAN]),
    "max_gradient_norm": ([0.5, 1e9], [-0.1, 1.1e9, NAN]),
    "accumulation": ([1, 10_000], [-1, 10_001]),
    "holdout_share": ([0.0, 0.99], [-0.1, 1.0, NAN]),
    "patience": ([0, 100_000], [-1, 100_001]),
    "label_smoothing": ([0.0, 0.99], [-0.1, 1.0, NAN]),
    "seed": ([-(2**63), 0, 2**63 - 1], []),
    "augment": ([True, False], []),
    "checkpoint_interval_s": ([1, 86_400], [-1, 86_401]),
    "checkpoint_interval_steps": ([0, 1_000_000_000], [-1, 1_000_000_001]),
    "class_weights": ([(), (0.0, 1e6)], [(-0.1,), (1.1e6,), (NAN,)]),
    "compile": ([True, False], []),
    "tf32": ([True, False], []),
    "from_scratch": ([True, False], []),
    "workers": ([1, 1024], [-1, 1025]),
    "optimizer": ([pb.OPTIMIZER_KIND_SGD, pb.OPTIMIZER_KIND_ADAMW], [-1, 3]),
    "schedule": ([pb.SCHEDULE_KIND_CONSTANT, pb.SCHEDULE_KIND_COSINE], [-1, 3]),
    "precision": ([pb.PRECISION_FLOAT32, pb.PRECISION_BFLOAT16], [-1, 3]),
    "executor": ([pb.EXECUTOR_LOCAL, pb.EXECUTOR_RAY], [-1, 3]),
}
# What another field has to be for this one to be set.
BESIDE: dict[str, dict[str, object]] = {"workers": {"executor": RAY}}


def read(**given: object) -> TrainingConfig:
    """The configuration that a request with these fields asks for."""
    return convert.new_training(
        pb.StartTrainingRequest(
            dataset="d",
            config=pb.TrainingConfig(**given),  # type: ignore[arg-type]  # by name
            model=model_pb2.ModelSpec(input_shape=[2], outputs=2, linear=model_pb2.Linear()),
        )
    ).config


def echoed(config: TrainingConfig) -> pb.TrainingConfig:
    """What a caller is told of a configuration."""
    training: Training = replace(RUNNING, config=config)
    return convert.training_to_proto(training).config


def test_the_table_names_every_field() -> None:
    assert (
        set(BOUNDS)
        == set(pb.TrainingConfig.DESCRIPTOR.fields_by_name)
        == {each.name for each in fields(TrainingConfig)}
    )


def test_what_is_left_out_is_the_default() -> None:
    assert read() == TrainingConfig()
    sgd = TrainingConfig(optimizer=OptimizerKind.SGD, learning_rate=0.05, weight_decay=0.0)
    assert read(optimizer=SGD) == sgd
    default = TrainingConfig()
    assert (default.optimizer, default.schedule) == (OptimizerKind.ADAMW, ScheduleKind.COSINE)
    assert (default.precision, default.executor) == (Precision.FLOAT32, Executor.LOCAL)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (good, _) in BOUNDS.items() for value in good])
def test_what_is_inside_the_bounds_is_taken_and_told_again(name: str, value: object) -> None:
    given = BESIDE.get(name, {}) | {name: value}
    config = read(**given)
    told = getattr(echoed(config), name)
    assert (tuple(told) if name == "class_weights" else told) == value
    assert TrainingConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, bad) in BOUNDS.items() for value in bad])
def test_what_is_outside_the_bounds_is_refused_by_its_path(name: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(**(BESIDE.get(name, {}) | {name: value}))
    path = "config.class_weights[0]" if name == "class_weights" else f"config.{name}"
    assert [violation.field for violation in caught.value.violations] == [path]


def test_what_goes_together_is_asked_for_together() -> None:
    for given, path in (
        ({"workers": 2}, "config.workers"),
        ({"patience": 1, "holdout_share": 0.0}, "config.patience"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            read(**given)
        assert [violation.field for violation in caught.value.violations] == [path]


def test_a_page_of_large_trainings_goes_into_one_message_and_the_next_one_begins_after_it():
    large = replace(RUNNING, config=replace(TrainingConfig(), class_weights=(0.5,) * 60_000))
    trainings = [replace(large, id=str(number)) for number in range(9, 0, -1)]
    cursors = [training.id for training in trainings]
    first = convert.list_response(TrainingPage(trainings, cursors, more=False), "token of {}".format)
    assert [training.name for training in first.trainings] == [f"trainings/{number}" for number in (9, 8, 7, 6)]
    assert first.ByteSize() < 4 * 1024 * 1024
    assert first.next_page_token == "token of 6"
    whole = TrainingPage(trainings[5:], cursors[5:], more=True)
    assert convert.list_response(whole, "token of {}".format).next_page_token == "token of 1"
    last = convert.list_response(replace(whole, more=False), "token of {}".format)
    assert (len(last.trainings), last.next_page_token) == (4, "token of ")
