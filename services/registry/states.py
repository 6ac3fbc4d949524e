"""The closed lists that the registry's records choose from: one enum for each kind of state, role or reason.

Names of members are those of the contract without their prefix.
"""

from enum import Enum, auto


class Role(Enum):
    TASK_CREATOR = auto()
    TRAINING_NODE = auto()
    VALIDATOR = auto()


class TaskState(Enum):
    PREPARING = auto()
    OPEN = auto()
    CLOSED = auto()
    FINAL = auto()
    CANCELLED = auto()


class MembershipState(Enum):
    PENDING = auto()
    ACTIVE = auto()
    PAUSED = auto()
    LEFT = auto()
    REFUSED = auto()


class SubmissionState(Enum):
    COMMITTED = auto()
    REVEALED = auto()
    EVALUATING = auto()
    SCORED = auto()
    REJECTED = auto()


class RejectionReason(Enum):
    REVEAL_EXPIRED = auto()
    TOO_LARGE = auto()
    BAD_FORMAT = auto()
    SHAPE_MISMATCH = auto()
    DIGEST_MISMATCH = auto()
    COPY = auto()
    VALIDATORS_UNAVAILABLE = auto()
    NAN_OUTPUT = auto()
    TOO_SLOW = auto()
    OUT_OF_MEMORY = auto()
    CRASHED = auto()
    AMBIGUOUS = auto()
    TASK_CANCELLED = auto()


class AssignmentState(Enum):
    OFFERED = auto()
    ACCEPTED = auto()
    SEALED = auto()
    OPENED = auto()
    DECLINED = auto()
    EXPIRED = auto()
    RELEASED = auto()


class EvaluationVerdict(Enum):
    AGREED = auto()
    OUTLIER = auto()
    UNOPENED = auto()


class ValidatorFaultKind(Enum):
    OFFER_EXPIRED = auto()
    LEASE_EXPIRED = auto()
    SEAL_UNOPENED = auto()
    OUTLIER = auto()


class Loss(Enum):
    CROSS_ENTROPY = auto()
    MSE = auto()
    BINARY_CROSS_ENTROPY = auto()
    HUBER = auto()


class Metric(Enum):
    ACCURACY = auto()
    TOP_K_ACCURACY = auto()
    WITHIN_BOUND = auto()


class ScoreVisibility(Enum):
    FULL = auto()
    LADDER = auto()


class Curve(Enum):
    POWER = auto()
    LOG = auto()
    LOGISTIC = auto()


class ModelFormat(Enum):
    SAFETENSORS = auto()
    ONNX = auto()


class HoldoutState(Enum):
    """Where a task's second evaluation dataset stands."""

    NONE = auto()
    """The task has none."""
    EXPECTED = auto()
    """To be published after close."""
    PUBLISHED = auto()
    """Handed in by the creator; waits for its scan."""
    ACCEPTED = auto()
    """Decides the final ranking as round 2."""
    FAILED = auto()
    """Too late, of a wrong digest, or failing the scan: round 1 ranks."""


class RoundState(Enum):
    """Where the judging of one submission in one round stands."""

    WAITING = auto()
    """To be drawn: too few owner groups have been eligible so far."""
    SEALING = auto()
    """Validators evaluate and seal."""
    OPENING = auto()
    """All who sealed are asked to open."""
    CONCLUDED = auto()
    """A score, a fault or the lack of both is recorded."""


class ArtifactPurpose(Enum):
    EVALUATION_DATASET = auto()
    HOLDOUT = auto()
    MODEL = auto()
    BASE_MODEL = auto()
