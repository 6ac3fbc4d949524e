"""What the selector remembers: accounts, pools, candidates, draws, quotas and the events that tell of their changes."""

import enum
from dataclasses import dataclass
from datetime import datetime, timedelta

from tiltyard.faults import Fault
from tiltyard.sortition import Curve, Place

MAX_MICROS = 2**63 - 1


class Role(enum.Enum):
    """What a participant does in one task."""

    TASK_CREATOR = "task_creator"
    TRAINING_NODE = "training_node"
    VALIDATOR = "validator"


class EventKind(enum.Enum):
    """A change of the selector's state."""

    DEPOSITED = "deposited"
    LOCKED = "locked"
    UNLOCKED = "unlocked"
    WITHDRAWAL_REQUESTED = "withdrawal_requested"
    WITHDRAWN = "withdrawn"
    SLASHED = "slashed"
    POOL_OPENED = "pool_opened"
    CANDIDATE_ADDED = "candidate_added"
    CANDIDATE_REMOVED = "candidate_removed"
    POOL_CLOSED = "pool_closed"
    QUOTA_CHARGED = "quota_charged"
    QUOTA_REFUNDED = "quota_refunded"
    WEIGHT_CHANGED = "weight_changed"
    OWNER_GROUPS_MERGED = "owner_groups_merged"


@dataclass(frozen=True)
class LedgerEvent:
    """One change. `participant`, `task` and `draw` are bare ids, empty where the event has none."""

    kind: EventKind
    time: datetime
    participant: str = ""
    amount_micros: int = 0
    task: str = ""
    draw: str = ""
    owner_group: str = ""
    weight: int = 0
    reference: str = ""
    funding_account: str = ""
    fault: Fault | None = None
    sequence: int = 0
    """Given by the ledger, from 1 without gaps."""


@dataclass(frozen=True)
class Accounts:
    """Where a participant's micro-units lie."""

    participant: str
    available_micros: int = 0
    locked_micros: int = 0
    unbonding_micros: int = 0
    slashed_micros: int = 0


@dataclass(frozen=True)
class Unbonding:
    """Stake on its way out. `number` tells those of one participant apart."""

    participant: str
    number: int
    amount_micros: int
    release_time: datetime


@dataclass(frozen=True)
class Stake:
    """All that can be said of a participant's stake."""

    accounts: Accounts
    owner_group: str
    unbondings: tuple[Unbonding, ...]


@dataclass(frozen=True)
class Deposit:
    """A payment, once for each reference."""

    reference: str
    participant: str
    amount_micros: int
    funding_account: str


@dataclass(frozen=True)
class Slash:
    """A punishment, once for each participant and evidence, with what it took."""

    participant: str
    evidence: str
    fault: Fault
    taken_micros: int


@dataclass(frozen=True)
class Policy:
    """How stake becomes likelihood in one task; nothing is left to defaults."""

    curve: Curve
    validator_min_stake_micros: int
    training_node_min_stake_micros: int
    window: timedelta
    limit: int
    reference_stake_micros: int


@dataclass(frozen=True)
class Pool:
    """A task's pool. `version` counts the changes of its tree, whose root after the last of them is `root`."""

    task: str
    policy: Policy
    open_time: datetime
    creator: str
    closed: bool = False
    version: int = 0
    leaf_count: int = 0
    root: bytes = b""


@dataclass(frozen=True)
class LeafChange:
    """The leaf of an owner group from one version of its pool on. `stake_micros` is the sum of its members' stakes."""

    index: int
    version: int
    owner_group: str
    stake_micros: int
    weight: int


class EvidenceKind(enum.Enum):
    """What an eligibility verdict rests on."""

    STAKE = "stake"
    TRACK_RECORD = "track_record"
    REPUTATION = "reputation"


@dataclass(frozen=True)
class Evidence:
    """One fact that was weighed. Amounts are micro-units and belong to STAKE, `references` are names for the others."""

    kind: EvidenceKind
    sufficient: bool
    amount_micros: int = 0
    threshold_micros: int = 0
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The answer to: may this participant take this role in this task?"""

    task: str
    participant: str
    role: Role
    evidence: tuple[Evidence, ...]
    explanation: str
    decide_time: datetime

    @property
    def eligible(self) -> bool:
        """True when some fact alone qualifies the participant."""
        return any(fact.sufficient for fact in self.evidence)


@dataclass(frozen=True)
class Candidate:
    """A member of a pool with the stake that the pool has locked. It stays recorded after it has left."""

    verdict: Verdict
    locked_micros: int
    weight: int
    active: bool = True

    @property
    def task(self) -> str:
        """The pool's task."""
        return self.verdict.task

    @property
    def participant(self) -> str:
        """Who it is."""
        return self.verdict.participant

    @property
    def role(self) -> Role:
        """The one role it may take in this task."""
        return self.verdict.role


class PassedOverReason(enum.Enum):
    """Why a group could not be picked when its place came up. Values are the metadata keys of a refused draw."""

    SUBMITTER = "submitter"
    PAUSED = "paused"
    QUOTA = "quota"
    TASK_CREATOR = "task_creator"
    ALREADY_PICKED = "already_picked"
    LEFT = "left"


@dataclass(frozen=True)
class DrawnPlace:
    """A place of a draw's order and what came of it: somebody was picked, or the group was passed over for a reason."""

    place: Place
    owner_group: str = ""
    path: bytes = b""
    """As from SumTree.path; empty, as the group's id, while it is not proved."""
    members: tuple[str, ...] = ()
    participant: str = ""
    passed_over: PassedOverReason | None = None


@dataclass(frozen=True)
class Draw:
    """A draw as recorded. `submission` is a resource name, `pool_version` the version of the pool under `pool_root`."""

    draw: str
    task: str
    submission: str
    round: int
    anchor: bytes
    sigma: bytes
    reveal_salt: bytes
    seed: bytes
    pool_root: bytes
    pool_weight: int
    pool_size: int
    pool_version: int
    curve: Curve
    assigned: int
    submitter: str
    places: tuple[DrawnPlace, ...]
    draw_time: datetime

    @property
    def picks(self) -> tuple[DrawnPlace, ...]:
        """Those who were picked, in order."""
        return tuple(place for place in self.places if place.passed_over is None)


class Settlement(enum.Enum):
    """Who was to blame for the end of an assignment: OPEN while it lasts."""

    OPEN = "open"
    CHARGED = "charged"
    REFUNDED = "refunded"


@dataclass(frozen=True)
class Charge:
    """One use of a quota, in the rate window `window` counted from the task's opening."""

    draw: str
    participant: str
    task: str
    window: int
    settlement: Settlement = Settlement.OPEN
