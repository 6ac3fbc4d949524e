"""What a task's creator decides about it, down to how validators are selected."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from services.registry.states import Curve, Loss, Metric, ScoreVisibility
from tiltyard.modelspec import ModelSpec


@dataclass(frozen=True)
class DatasetDigest:
    sha256: bytes
    size_bytes: int


@dataclass(frozen=True)
class Schedule:
    prepare_deadline: datetime
    close_time: datetime
    reveal_time: timedelta
    accept_time: timedelta
    lease_time: timedelta
    evaluation_time: timedelta
    draw_time: timedelta
    holdout_time: timedelta


@dataclass(frozen=True)
class Limits:
    max_parameters: int
    max_model_bytes: int
    max_cpu_time: timedelta
    max_memory_bytes: int
    daily_submissions: int


@dataclass(frozen=True)
class ValidatorRate:
    window: timedelta
    limit: int
    reference_stake_micros: int


@dataclass(frozen=True)
class SelectionPolicy:
    curve: Curve
    alpha_millis: int
    validator_min_stake_micros: int
    training_node_min_stake_micros: int
    rate: ValidatorRate


@dataclass(frozen=True)
class TaskConfig:
    """What a task creator decided, every default filled in."""

    display_name: str
    description: str
    field: str
    models: tuple[ModelSpec, ...]
    loss: Loss
    metric: Metric
    top_k: int
    bound: float
    evaluation_dataset: DatasetDigest
    holdout: DatasetDigest | None
    schedule: Schedule
    limits: Limits
    validators_per_submission: int
    tolerance: int
    selection: SelectionPolicy
    score_visibility: ScoreVisibility
    ladder_step_micros: int
    allow_node_endpoint: bool
    class_names: tuple[str, ...]
    base_model: str = ""
    """SHA-256 in hex of the model that training starts from; empty to start from scratch."""
