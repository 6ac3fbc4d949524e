"""What the leaves read so far say: the state that the next leaf must follow from."""

from collections import defaultdict
from dataclasses import dataclass, field

from tiltyard.type.v1 import draw_pb2, envelope_pb2, evaluation_pb2, participation_pb2, task_pb2

FIRST_ROUND = 1
HOLDOUT_ROUND = 2


@dataclass
class Task:
    """One task. `holdout_leaf` is the hash of the leaf that accepted the holdout."""

    name: str
    creator: str
    config: task_pb2.TaskConfig
    state: "task_pb2.TaskState.ValueType" = task_pb2.TASK_STATE_PREPARING
    holdout_leaf: bytes = b""
    holdout_told: bool = False
    """Whether a leaf says what became of it."""
    ranking_round: int = FIRST_ROUND
    submissions: int = 0
    """How many were committed."""

    def dataset(self, round_: int) -> bytes:
        """Digest of the dataset that a round is judged on."""
        return self.config.evaluation_dataset.sha256 if round_ == FIRST_ROUND else self.config.holdout.sha256

    @property
    def hides(self) -> bool:
        """Whether its scores are only committed to for now."""
        return self.config.score_visibility == task_pb2.SCORE_VISIBILITY_LADDER and self.state in (
            task_pb2.TASK_STATE_PREPARING,
            task_pb2.TASK_STATE_OPEN,
        )


@dataclass
class Submission:
    """One submission. Scores are by round; a hidden one is its commitment until it is opened."""

    name: str
    task: Task
    commit: envelope_pb2.CommitStatement
    commit_time_ns: int = 0
    state: "evaluation_pb2.SubmissionState.ValueType" = evaluation_pb2.SUBMISSION_STATE_COMMITTED
    reveal: envelope_pb2.RevealStatement | None = None
    reveal_leaf: bytes = b""
    scores: dict[int, evaluation_pb2.Score] = field(default_factory=dict)
    hidden: dict[int, bytes] = field(default_factory=dict)
    reason: "evaluation_pb2.RejectionReason.ValueType" = evaluation_pb2.REJECTION_REASON_UNSPECIFIED
    """Why it was rejected."""
    end_index: int = -1
    """The leaf that rejected it."""

    @property
    def number(self) -> int:
        """Grows with the commits of one task."""
        return int(self.name.rpartition("/")[2])


@dataclass
class Duty:
    """One assignment. `index` is the leaf of its last step, `owed` the fault that a leaf has still to name, or 0."""

    state: int
    position: int
    index: int
    owed: int = 0


@dataclass(frozen=True)
class PendingVerdict:
    """A verdict whose stake is compared with the ledger when all of it is known."""

    index: int
    verdict: participation_pb2.EligibilityVerdict
    decide_time_ns: int


@dataclass
class Story:
    """Everything known so far."""

    origin: str = ""
    selector_key: bytes = b""
    participants: dict[str, str] = field(default_factory=dict)
    """Names for people by participants/{id}."""
    owners: dict[str, str] = field(default_factory=dict)
    endorsements: set[tuple[str, str, str]] = field(default_factory=set)
    """Endorser, subject, field; those taken back are kept, since a verdict may be older."""
    tasks: dict[str, Task] = field(default_factory=dict)
    eligible: set[tuple[str, str, int]] = field(default_factory=set)
    """Task, participant, role."""
    endorsed: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    """Whose endorsements a verdict on a task's creator names, by task and creator."""
    members: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    """Role and state by task and participant."""
    duties: dict[str, Duty] = field(default_factory=dict)
    """By assignment."""
    faults: set[tuple[str, int]] = field(default_factory=set)
    """Assignment and kind of what was named."""
    verdicts: list[PendingVerdict] = field(default_factory=list)
    submissions: dict[str, Submission] = field(default_factory=dict)
    draws: dict[tuple[str, int], draw_pb2.DrawReceipt] = field(default_factory=dict)
    draw_leaves: dict[tuple[str, int], int] = field(default_factory=dict)
    picked: dict[tuple[str, str], int] = field(default_factory=dict)
    """The leaf that first says it, by draw and participant."""
    seals: dict[str, envelope_pb2.SealStatement] = field(default_factory=dict)
    reports: defaultdict[tuple[str, int], dict[str, envelope_pb2.EvaluationReport]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    """By evaluation, of each submission and round."""
    outliers: defaultdict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    """Evaluations that were named as outliers by faults, by submission and round."""

    def group(self, participant: str) -> frozenset[str]:
        """The participant with all that are bound to the same owner."""
        owner = self.owners.get(participant, participant)
        return frozenset({participant, owner} | {each for each, of in self.owners.items() if of == owner})
