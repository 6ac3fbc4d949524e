"""What the registry remembers: one frozen dataclass for each kind of row.

Participants, tasks and submissions are held by their ids (not resource names); `services.runtime.names` formats them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from services.registry.states import (
    ArtifactPurpose,
    AssignmentState,
    EvaluationVerdict,
    HoldoutState,
    MembershipState,
    ModelFormat,
    RejectionReason,
    Role,
    RoundState,
    SubmissionState,
    TaskState,
    ValidatorFaultKind,
)
from services.registry.task_config import TaskConfig
from tiltyard.identity import Envelope


@dataclass(frozen=True)
class Participant:
    id: str
    display_name: str
    public_key: bytes
    owner: str | None
    create_time: datetime
    endpoint: str = ""


@dataclass(frozen=True)
class Endorsement:
    endorser: str
    subject: str
    field: str
    create_time: datetime
    trusted: bool = False
    """Whether the arena's policy counts this endorser's word; filled in when read, never stored."""


@dataclass(frozen=True)
class Evidence:
    kind: str
    """STAKE, TRACK_RECORD or REPUTATION."""
    sufficient: bool
    amount_micros: int = 0
    threshold_micros: int = 0
    references: tuple[str, ...] = ()
    """Resource names."""


@dataclass(frozen=True)
class Verdict:
    task: str
    participant: str
    role: Role
    eligible: bool
    evidence: tuple[Evidence, ...]
    explanation: str
    decide_time: datetime


@dataclass(frozen=True)
class Task:
    id: str
    creator: str
    config: TaskConfig
    state: TaskState
    create_time: datetime
    update_time: datetime
    state_reason: str = ""
    evaluation_rows: int = 0
    holdout: HoldoutState = HoldoutState.NONE
    holdout_rows: int = 0
    holdout_leaf: bytes = b""
    """Hash of the leaf that accepted the holdout, 32 bytes; anchors the draws of round 2."""
    ranking_round: int = 0
    open_time: datetime | None = None
    close_time: datetime | None = None
    """When it really was closed; config.schedule.close_time is when it was to be."""
    pool_open: bool = False
    """Whether the selector keeps a pool that is still to be closed."""
    revision: int = 0
    """Grows with every change; the cursor of WatchTask and WatchLeaderboard."""
    training_nodes: int = 0
    validators: int = 0
    submissions: int = 0


@dataclass(frozen=True)
class Member:
    task: str
    participant: str
    role: Role
    state: MembershipState
    statement: Envelope | None
    create_time: datetime
    locked_micros: int = 0
    weight: int = 0
    owner_group: str = ""
    removed: bool = False
    """LEFT or task ended: whether the selector has unlocked the stake."""


@dataclass(frozen=True)
class Counts:
    correct: int
    total: int
    ambiguous: int
    loss_sum_micros: int = 0


@dataclass(frozen=True)
class Finding:
    """What one report says: counts, or a fault of the model (by its name in the contract)."""

    counts: Counts | None
    fault: str | None
    node_endpoint: bool = False
    prediction_root: str = ""
    """Hex; empty with a fault."""
    prediction_blocks: int = 0


@dataclass(frozen=True)
class Score:
    """What was concluded for one submission in one round. `outcome` is SCORED, FAULT or AMBIGUOUS."""

    round: int
    outcome: str
    correct: int = 0
    total: int = 0
    fault: str = ""
    tolerance: int = 0
    evaluations: tuple[str, ...] = ()
    """Ids of the validators whose reports were counted."""
    outliers: tuple[str, ...] = ()
    """Ids of those among them that lie further off than the tolerance."""


@dataclass(frozen=True)
class Submission:
    task: str
    number: int
    participant: str
    state: SubmissionState
    commitment: bytes
    commit_time: datetime
    deadline: datetime | None
    reason: RejectionReason | None = None
    detail: str = ""
    original: int | None = None
    """COPY: number of the submission in the same task whose commit was earlier."""
    model_digest: bytes = b""
    size_bytes: int = 0
    format: ModelFormat | None = None
    model_index: int = 0
    salt: bytes = b""
    reveal_leaf: bytes = b""
    """Hash of the reveal's leaf, 32 bytes; anchors the draw of round 1."""
    structure_checked: bool = False
    scores: Mapping[int, Score] = field(default_factory=dict)
    """By round."""
    public_best: int | None = None
    """LADDER: the node's public best in steps, where this submission has set it."""
    hidden: bool = False
    """LADDER: whether reports or the score are still to be laid open in the log, at close."""
    score_salt: bytes = b""
    """LADDER: of the commitment that the log holds to the score of round 1, 32 bytes; else empty."""
    draws: Mapping[int, str] = field(default_factory=dict)
    """Draw ids by round."""
    reveal_time: datetime | None = None
    end_time: datetime | None = None
    trace: str = ""
    """The trace of its reveal, as `tiltyard.telemetry.tracing.carried` says it: what follows belongs to it."""


@dataclass(frozen=True)
class Round:
    """The judging of one submission on one evaluation dataset."""

    task: str
    number: int
    round: int
    state: RoundState
    deadline: datetime
    """WAITING: draws are retried until then. SEALING: the last seal. OPENING: the last opening."""
    draw: str = ""
    picks: int = 0
    """Length of the draw's order taken so far."""
    exhausted: bool = False
    """Whether the order has no reserves left."""
    wanted: int = 0
    """Seals and opened reports that it waits for: k, in a dispute as many more as were called in."""
    disputed: bool = False
    """Whether the one round of further reserves has been called in."""
    detail: str = ""
    """What it waits for, in one sentence."""
    trace: str = ""
    """The submission's."""
    unsure: bool = False
    """Whether the selector may have drawn somebody of whom no answer has told."""


@dataclass(frozen=True)
class Assignment:
    task: str
    number: int
    round: int
    validator: str
    state: AssignmentState
    position: int
    create_time: datetime
    update_time: datetime
    deadline: datetime | None
    opening: bool = False
    lease_token: str = ""
    lease_holder: bytes = b""
    settled: bool = False
    """Whether the selector has been told to charge or refund; only for states that have ended."""
    refund: bool = False
    """ENDED without the validator's fault and without a report: the use of its quota is given back."""
    sequence: int = 0
    """Set by the store at every put, growing over all assignments: the cursor of WatchAssignments."""
    trace: str = ""
    """The submission's."""


@dataclass(frozen=True)
class Evaluation:
    task: str
    number: int
    round: int
    validator: str
    seal: bytes
    statement: Envelope
    seal_time: datetime
    report: Envelope | None = None
    salt: bytes = b""
    finding: Finding | None = None
    open_time: datetime | None = None
    verdict: EvaluationVerdict | None = None
    disclosed: bool = False
    """Whether report and salt are a leaf, and may be shown to everybody."""


@dataclass(frozen=True)
class ValidatorFault:
    """One duty that was not done, or done wrongly."""

    task: str
    number: int
    round: int
    validator: str
    kind: ValidatorFaultKind
    time: datetime


@dataclass(frozen=True)
class Artifact:
    sha256: str
    """Hex."""
    size_bytes: int
    create_time: datetime


@dataclass(frozen=True)
class ArtifactUse:
    """Why an artifact is kept, and for whom: the one place that decides who may read it."""

    sha256: str
    task: str
    """Empty for a BASE_MODEL that no task has named yet."""
    purpose: ArtifactPurpose
    owner: str
    """Who uploads it: the task's creator, or the submitter."""
    create_time: datetime = field(compare=False)
    number: int = 0
    """MODEL: the submission's number."""


@dataclass(frozen=True)
class Draw:
    """What the selector answered; the receipt's bytes are the registry's to record, not to change."""

    id: str
    order: tuple[str, ...]
    """Participant ids in the order drawn so far."""
    receipt: bytes
    """Bytes of one tiltyard.type.v1.DrawReceipt."""
