"""What the registry asks of the selector, in the domain's own words; `peers.py` asks over gRPC.

Every question is idempotent. All of them raise the errors of the selector's contract, and Unavailable while it cannot
be reached.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.registry.records import Draw, Task, Verdict
from services.registry.states import Role, ValidatorFaultKind
from services.registry.task_config import SelectionPolicy


@dataclass(frozen=True)
class EligibilityFacts:
    """What the registry knows of somebody's merits."""

    track_record: tuple[str, ...] = ()
    """Resource names of SCORED submissions and AGREED evaluations in other owner groups' tasks."""
    endorsers: tuple[str, ...] = ()
    """Ids of trusted participants who endorsed in the task's field."""


@dataclass(frozen=True)
class Eligibility:
    """An answer to "may they?", with the policy it rests on: the one asked with, the arena's defaults filled in."""

    verdict: Verdict
    policy: SelectionPolicy


@dataclass(frozen=True)
class Candidacy:
    """What became of a candidate. Where the verdict refuses, nothing is locked."""

    verdict: Verdict
    locked_micros: int = 0
    weight: int = 0
    owner_group: str = ""


class Selection(Protocol):
    """The selector: stakes, pools and draws."""

    async def check_eligibility(
        self, *, participant: str, task: str, role: Role, facts: EligibilityFacts, policy: SelectionPolicy
    ) -> Eligibility:
        """Weigh stake and facts; no side effects. Zeros in `policy` stand for the arena's defaults."""
        ...

    async def open_pool(self, task: Task) -> None:
        """Start the pool of a task that has an open_time. AlreadyExists when it has another policy."""
        ...

    async def add_candidate(
        self, *, task: str, participant: str, role: Role, facts: EligibilityFacts, owner: str | None
    ) -> Candidacy:
        """Check, lock the stake, and enter the pool. NotFound for no pool, FailedPrecondition(POOL_CLOSED),
        AlreadyExists(ROLE_TAKEN)."""
        ...

    async def merge_owner_groups(self, participant: str, *, owner: str) -> None:
        """Make both one owner group, in every open pool too."""
        ...

    async def remove_candidate(self, *, task: str, participant: str) -> None:
        """Unlock one candidate's stake, who is in no further draw."""
        ...

    async def close_pool(self, task: str) -> None:
        """Unlock all stakes; there are no draws afterwards. NotFound for no pool."""
        ...

    async def draw_validators(
        self,
        *,
        task: str,
        number: int,
        round_: int,
        anchor: bytes,
        salt: bytes,
        validators: int,
        submitter: str,
        paused: Collection[str],
    ) -> Draw:
        """The first `validators` of the order drawn for one submission and round.

        FailedPrecondition(NOT_ENOUGH_VALIDATORS) when fewer owner groups are eligible, ResourceExhausted(QUOTA_USED_UP)
        when it is for used-up quotas alone.
        """
        ...

    async def extend_draw(self, draw: str, *, picks: int, paused: Collection[str]) -> Draw:
        """The same order with `picks` in all, or as many as there are.

        FailedPrecondition(ORDER_EXHAUSTED) when none is left.
        """
        ...

    async def find_draw(self, *, task: str, number: int, round_: int) -> Draw | None:
        """The draw of one submission and round as far as its order has been taken; None where there is none."""
        ...

    async def settle(self, draw: str, participant: str, *, refund: bool) -> None:
        """End the account of one pick: its charge stands, or is given back."""
        ...

    async def slash(self, participant: str, kind: ValidatorFaultKind, *, evidence: str) -> None:
        """Take the stake that a fault costs, once for its evidence (a resource name)."""
        ...

    async def ledger_events(self, *, start: int, limit: int) -> Sequence[tuple[int, bytes]]:
        """Changes of the selector's state from sequence number `start` (1 is the first) on, without gaps.

        Each with the bytes of its tiltyard.type.v1.LedgerEvent; fewer than `limit` where there are no more. OutOfRange
        for a start beyond the next one.
        """
        ...

    async def selector_key(self) -> bytes:
        """The BLS public key that signs draws, 48 bytes."""
        ...
