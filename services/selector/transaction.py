"""What the domain asks of its store: transactions that see and change everything the selector remembers."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Protocol, TypeVar

from services.selector.records import (
    Accounts,
    Candidate,
    Charge,
    Deposit,
    Draw,
    LeafChange,
    LedgerEvent,
    Pool,
    Slash,
    Unbonding,
)

T = TypeVar("T")


class StakeRecords(Protocol):
    """Accounts, what moved them, and the events."""

    def accounts(self, participant: str) -> Accounts:
        """All zero for somebody who never deposited."""
        ...

    def put_accounts(self, accounts: Accounts) -> None: ...

    def list_accounts(self, *, after: str, limit: int) -> Sequence[Accounts]:
        """By participant id."""
        ...

    def deposit(self, reference: str) -> Deposit | None: ...

    def add_deposit(self, deposit: Deposit) -> None: ...

    def total_deposited(self) -> int:
        """Sum of all deposits there have ever been, in micro-units."""
        ...

    def unbondings(self, participant: str) -> Sequence[Unbonding]:
        """Those not yet withdrawn, by release time."""
        ...

    def unbondings_of(self, participants: Collection[str]) -> Mapping[str, Sequence[Unbonding]]:
        """The same of each."""
        ...

    def add_unbonding(self, participant: str, amount_micros: int, release_time: datetime) -> None: ...

    def put_unbonding(self, unbonding: Unbonding) -> None:
        """Changes the amount; one of 0 is gone."""
        ...

    def slash(self, participant: str, evidence: str) -> Slash | None: ...

    def add_slash(self, slash: Slash) -> None: ...

    def unlock_all(self, task: str, now: datetime) -> None:
        """Gives back what a task has locked of its active candidates, of whom there may be a million.

        Each UNLOCKED is an event, in order of participant id.
        """
        ...

    def append_events(self, events: Sequence[LedgerEvent]) -> None:
        """Gives the events the next sequence numbers."""
        ...

    def last_sequence(self) -> int: ...

    def list_events(self, *, start: int, limit: int) -> Sequence[LedgerEvent]: ...


class GroupRecords(Protocol):
    """Owner groups. A group's id is the smallest participant id in it."""

    def owner_group(self, participant: str) -> str:
        """The participant's own id for somebody who stands alone."""
        ...

    def owner_groups(self, participants: Collection[str]) -> Mapping[str, str]:
        """The group of each."""
        ...

    def owner_group_members(self, owner_group: str) -> Sequence[str]:
        """By participant id."""
        ...

    def put_owner_group(self, participant: str, owner_group: str) -> None: ...

    def funded_by(self, funding_account: str) -> str | None:
        """The first participant who was funded from the account."""
        ...

    def add_funding_account(self, funding_account: str, participant: str) -> None: ...


class PoolRecords(Protocol):
    """Pools, their candidates and the history of their leaves."""

    def pool(self, task: str) -> Pool | None: ...

    def put_pool(self, pool: Pool) -> None: ...

    def candidate(self, task: str, participant: str) -> Candidate | None: ...

    def put_candidate(self, candidate: Candidate) -> None: ...

    def release_candidates(self, task: str) -> None:
        """No candidate of the task is active any more, nor has it anything locked."""
        ...

    def candidacies(self, participant: str) -> Sequence[Candidate]:
        """The active ones, by task id."""
        ...

    def put_leaf(self, task: str, change: LeafChange) -> None: ...

    def leaf(self, task: str, owner_group: str) -> LeafChange | None:
        """The newest state of a group's leaf."""
        ...

    def leaf_changes(self, task: str, *, after: int, upto: int) -> Iterable[LeafChange]:
        """Those with after < version <= upto, by version."""
        ...

    def forget_leaves(self, task: str) -> None:
        """All that was kept of a pool's leaves and seats: with each task there is as much again."""
        ...

    def seat(self, task: str, participant: str, *, leaf_index: int, since: int) -> None:
        """The participant can be picked by way of this leaf from version `since` on."""
        ...

    def unseat(self, task: str, participant: str, *, until: int) -> None:
        """It cannot be picked any more from version `until` on."""
        ...

    def seated(self, task: str, *, leaf_indices: Collection[int], version: int) -> Mapping[int, Sequence[str]]:
        """For each leaf those who could be picked by way of it at a version and still are in the pool, by id."""
        ...


class DrawRecords(Protocol):
    """Draws and the uses of quotas."""

    def draws(self, names: Collection[str]) -> Mapping[str, Draw]:
        """Those of the names that there are."""
        ...

    def add_draws(self, draws: Sequence[Draw]) -> None: ...

    def put_places(self, draw: Draw) -> None:
        """Changes the places of a draw; nothing else of it ever changes."""
        ...

    def charge(self, draw: str, participant: str) -> Charge | None: ...

    def add_charges(self, charges: Sequence[Charge]) -> None: ...

    def settle_charge(self, charge: Charge) -> None:
        """Records what became of a charge that was open. A refunded one is no use of a quota any more."""
        ...

    def quota_used(self, task: str, *, window: int, owner_groups: Collection[str]) -> Mapping[str, int]:
        """Charges in one window, but for refunded ones, of all who are in each group now."""
        ...


class Transaction(StakeRecords, GroupRecords, PoolRecords, DrawRecords, Protocol):
    """Everything, in one transaction: all of its changes are kept or none."""


class Store(Protocol):
    """Where the selector remembers. Writes run one after the other and are durable when they return."""

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Runs `work`, which must have no other effects: it may run more than once."""
        ...

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """Runs `work` on a consistent snapshot."""
        ...
