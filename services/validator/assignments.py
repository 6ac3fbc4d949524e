"""What the validator owes and to whom: assignments, leases, orders, and the registry that hands them out."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from services.validator.runs import Finding
from tiltyard.counting import Metric
from tiltyard.modelspec import ModelSpec


class AssignmentState(StrEnum):
    """Where one duty stands in the registry's books, as tiltyard.type.v1.AssignmentState names it."""

    OFFERED = "OFFERED"
    ACCEPTED = "ACCEPTED"
    SEALED = "SEALED"
    OPENED = "OPENED"
    DECLINED = "DECLINED"
    EXPIRED = "EXPIRED"
    RELEASED = "RELEASED"


ENDED_ASSIGNMENTS = frozenset(
    {AssignmentState.OPENED, AssignmentState.DECLINED, AssignmentState.EXPIRED, AssignmentState.RELEASED}
)


@dataclass(frozen=True)
class Assignment:
    """One duty at one moment. `deadline` is when its state ends by itself, None where it has no end.

    `trace` is the trace that the submission belongs to, as `tracing.parse` reads it, empty for none.
    """

    name: str
    task: str
    state: AssignmentState
    opening: bool = False
    deadline: datetime | None = None
    trace: str = ""


@dataclass(frozen=True)
class Node:
    """The training node of a submission: its participant id, and its own endpoint as it registered it."""

    id: str
    endpoint: str


@dataclass(frozen=True)
class Order:
    """What is to be evaluated; digests are SHA-256 in 64 hex digits, `metric` None for one that is not counted yet.

    `node` is set where the task lets its own endpoint be asked.
    """

    dataset_digest: str
    dataset_bytes: int
    model_digest: str
    model_bytes: int
    spec: ModelSpec
    max_cpu_s: float
    max_memory_bytes: int
    metric: Metric | None = Metric.ACCURACY
    top_k: int = 1
    bound: float = 0.0
    node: Node | None = None


@dataclass(frozen=True)
class Lease:
    """An accepted duty: the token to show, the seconds that the lease still runs, and the order.

    `order` is None when the order cannot be read here; `refusal` then says why.
    """

    token: str
    left_s: float
    order: Order | None
    refusal: str = ""


class DigestMismatch(Exception):
    """The registry's bytes are not those that it promised; nobody's model is at fault."""


class Registry(Protocol):
    """The registry as the validator sees it. Every method raises `services.runtime.errors.ArenaError`."""

    def watch(self, cursor: str) -> AsyncIterator[tuple[Assignment, str]]:
        """Own assignments that have not ended, then each change, with the cursor to resume after it."""
        ...

    async def assignments(self, submission: str = "") -> list[Assignment]:
        """All own assignments, those that have ended too; of one submission, where it is named, everybody's."""
        ...

    async def accept(self, assignment: str, lease_holder: bytes) -> Lease:
        """Takes the lease, or takes it again with the same holder's secret."""
        ...

    async def renew(self, assignment: str, token: str) -> float:
        """Prolongs the lease and returns the seconds that it runs from now on."""
        ...

    async def decline(self, assignment: str, token: str, reason: str) -> None:
        """Gives the duty back."""
        ...

    async def fetch(self, digest: str, size_bytes: int, destination: Path) -> None:
        """Brings an artifact, its digest checked. Raises DigestMismatch too."""
        ...

    async def seal(self, statement: bytes, token: str) -> None:
        """Records a seal: a signed envelope, serialised."""
        ...

    async def open(self, report: bytes, salt: bytes, hashes: bytes) -> None:
        """Lays a sealed report open: the signed envelope, serialised, the seal's salt, the hashes under its root."""
        ...


class Notary(Protocol):
    """Signs what the validator states; envelopes come back serialised."""

    def report(self, assignment: str, order: Order, finding: Finding) -> bytes:
        """The signed report of a finding."""
        ...

    def seal(self, assignment: str, report: bytes, salt: bytes) -> bytes:
        """The signed seal of a report made by `report`."""
        ...
