"""How to descend: what a caller chooses and what a newcomer gets by leaving it out."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from services.trainer.jsonfields import from_fields


class OptimizerKind(StrEnum):
    """How gradients become steps."""

    SGD = "sgd"
    ADAMW = "adamw"


class ScheduleKind(StrEnum):
    """How the learning rate moves after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"


class Executor(StrEnum):
    """Where the training function runs."""

    LOCAL = "local"
    RAY = "ray"


class LossKind(StrEnum):
    """The training objective l of L = (1/N) * sum l(f(x_i), y_i)."""

    CROSS_ENTROPY = "cross_entropy"
    MSE = "mse"
    BINARY_CROSS_ENTROPY = "binary_cross_entropy"
    HUBER = "huber"

    def takes_labels(self) -> bool:
        """Whether class labels can be learned by it; the others need targets."""
        return self in (LossKind.CROSS_ENTROPY, LossKind.BINARY_CROSS_ENTROPY)


class Precision(StrEnum):
    """What products are computed in while training; weights stay float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class TrainingConfig:
    """A complete configuration; the meaning of each field is that of tiltyard.trainer.v1.TrainingConfig.

    Where a caller leaves epochs or label smoothing to data and loss, services.trainer.trainings fills them in; epochs
    are 0 until the rows are known.
    """

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 0.003
    optimizer: OptimizerKind = OptimizerKind.ADAMW
    weight_decay: float = 0.01
    momentum: float = 0.9
    schedule: ScheduleKind = ScheduleKind.COSINE
    warmup: float = 0.05
    max_gradient_norm: float = 0.0
    accumulation: int = 1
    holdout_share: float = 0.1
    patience: int = 0
    label_smoothing: float = 0.0
    seed: int = 0
    augment: bool = False
    checkpoint_interval_s: int = 60
    class_weights: tuple[float, ...] = ()
    precision: Precision = Precision.FLOAT32
    compile: bool = False
    tf32: bool = False
    executor: Executor = Executor.LOCAL
    workers: int = 1
    from_scratch: bool = False
    checkpoint_interval_steps: int = 0

    def to_json(self) -> dict[str, Any]:
        """The fields by name; `from_json` gives back an equal configuration."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> "TrainingConfig":
        """The configuration that `to_json` wrote. Raises TypeError and ValueError for anything else."""
        return from_fields(cls, value)
