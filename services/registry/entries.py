"""What can become a leaf of the record log, one dataclass for each kind of tiltyard.type.v1.LogEntry.

`leaves.py` makes the bytes; whoever changes a state appends the entry in the same transaction.
"""

from dataclasses import dataclass
from datetime import datetime

from services.registry.records import Score, Verdict
from services.registry.states import (
    AssignmentState,
    MembershipState,
    RejectionReason,
    Role,
    SubmissionState,
    TaskState,
    ValidatorFaultKind,
)
from services.registry.task_config import TaskConfig
from tiltyard.identity import Envelope


@dataclass(frozen=True)
class Genesis:
    origin: str
    log_key: bytes
    selector_key: bytes
    operators: tuple[str, ...]


@dataclass(frozen=True)
class ParticipantRegistered:
    participant: str
    public_key: bytes
    display_name: str
    endpoint: str = ""


@dataclass(frozen=True)
class OwnerBound:
    statement: Envelope


@dataclass(frozen=True)
class EndorsementChanged:
    statement: Envelope


@dataclass(frozen=True)
class VerdictGiven:
    verdict: Verdict


@dataclass(frozen=True)
class TaskCreated:
    task: str
    creator: str
    config: TaskConfig


@dataclass(frozen=True)
class TaskChanged:
    task: str
    state: TaskState
    config: TaskConfig | None = None
    reason: str = ""


@dataclass(frozen=True)
class MembershipChanged:
    task: str
    participant: str
    role: Role
    state: MembershipState
    statement: Envelope | None = None


@dataclass(frozen=True)
class SubmissionCommitted:
    task: str
    number: int
    statement: Envelope


@dataclass(frozen=True)
class SubmissionRevealed:
    task: str
    number: int
    statement: Envelope
    size_bytes: int


@dataclass(frozen=True)
class SubmissionChanged:
    task: str
    number: int
    state: SubmissionState
    reason: RejectionReason | None = None
    detail: str = ""
    original: int | None = None


@dataclass(frozen=True)
class DrawMade:
    receipt: bytes


@dataclass(frozen=True)
class AssignmentChanged:
    task: str
    number: int
    round: int
    validator: str
    state: AssignmentState
    position: int
    deadline: datetime | None = None


@dataclass(frozen=True)
class EvaluationSealed:
    task: str
    number: int
    round: int
    validator: str
    statement: Envelope


@dataclass(frozen=True)
class EvaluationOpened:
    task: str
    number: int
    round: int
    validator: str
    report: Envelope
    salt: bytes


@dataclass(frozen=True)
class ScoreConcluded:
    task: str
    number: int
    score: Score
    salt: bytes = b""
    """Given where the score is, or was, committed to only: 32 bytes."""
    hidden: bool = False
    """Whether the log holds the commitment alone for now."""


@dataclass(frozen=True)
class ValidatorFaultFound:
    task: str
    number: int
    round: int
    validator: str
    kind: ValidatorFaultKind


@dataclass(frozen=True)
class OutageEnded:
    last_alive: datetime
    back: datetime


@dataclass(frozen=True)
class LedgerEventSeen:
    event: bytes
    """Bytes of one tiltyard.type.v1.LedgerEvent."""


@dataclass(frozen=True)
class HoldoutChanged:
    task: str
    accepted: bool
    reason: str = ""


Entry = (
    Genesis
    | ParticipantRegistered
    | OwnerBound
    | EndorsementChanged
    | VerdictGiven
    | TaskCreated
    | TaskChanged
    | MembershipChanged
    | SubmissionCommitted
    | SubmissionRevealed
    | SubmissionChanged
    | DrawMade
    | AssignmentChanged
    | EvaluationSealed
    | EvaluationOpened
    | ScoreConcluded
    | ValidatorFaultFound
    | OutageEnded
    | LedgerEventSeen
    | HoldoutChanged
)
