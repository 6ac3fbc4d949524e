"""Quotas: how often an owner group may be assigned for one task in each rate window."""

from dataclasses import dataclass, replace
from datetime import datetime

from services.runtime.errors import FailedPrecondition, NotFound
from services.selector.records import Charge, EventKind, LedgerEvent, Pool, Settlement
from services.selector.transaction import Transaction
from tiltyard.sortition import quota_limit


@dataclass(frozen=True)
class Quota:
    """Uses of a group's quota in one window, how many it may have, and when the next window starts."""

    used: int
    limit: int
    refill_time: datetime

    @property
    def is_used_up(self) -> bool:
        """True when there is no use left."""
        return self.used >= self.limit


def window_at(pool: Pool, now: datetime) -> int:
    """Number of the rate window: 0 from the task's opening on, and before it."""
    return max(0, (now - pool.open_time) // pool.policy.window)


def quota(transaction: Transaction, pool: Pool, owner_group: str, now: datetime) -> Quota:
    """The quota of an owner group by the stake that the pool has locked of all its validators now."""
    leaf = transaction.leaf(pool.task, owner_group)
    policy, window = pool.policy, window_at(pool, now)
    return Quota(
        used=transaction.quota_used(pool.task, window=window, owner_group=owner_group),
        limit=quota_limit(
            leaf.stake_micros if leaf else 0,
            minimum_micros=policy.validator_min_stake_micros,
            curve=policy.curve,
            limit=policy.limit,
            reference_stake_micros=policy.reference_stake_micros,
        ),
        refill_time=pool.open_time + (window + 1) * policy.window,
    )


def charge(transaction: Transaction, pool: Pool, *, draw: str, participant: str, now: datetime) -> None:
    """Uses the quota of the participant's owner group once."""
    transaction.put_charge(Charge(draw, participant, pool.task, window_at(pool, now)))
    transaction.append_event(_event(transaction, EventKind.QUOTA_CHARGED, pool.task, draw, participant, now))


def settle(transaction: Transaction, *, draw: str, participant: str, settlement: Settlement, now: datetime) -> int:
    """Lets a charge stand or gives it back. Returns the uses charged to the group in the charge's window.

    Raises NotFound for somebody who has no pick in the draw, FailedPrecondition when it was settled otherwise before.
    """
    known = transaction.charge(draw, participant)
    if known is None:
        raise NotFound("PICK_NOT_FOUND", "the participant has no pick in this draw", draw=draw)
    if known.settlement is Settlement.OPEN:
        transaction.put_charge(replace(known, settlement=settlement))
        if settlement is Settlement.REFUNDED:
            event = _event(transaction, EventKind.QUOTA_REFUNDED, known.task, draw, participant, now)
            transaction.append_event(event)
    elif known.settlement is not settlement:
        raise FailedPrecondition(
            "ALREADY_SETTLED",
            f"this pick was settled before as {known.settlement.name}",
            settlement=known.settlement.name,
        )
    group = transaction.owner_group(participant)
    return transaction.quota_used(known.task, window=known.window, owner_group=group)


def _event(
    transaction: Transaction, kind: EventKind, task: str, draw: str, participant: str, now: datetime
) -> LedgerEvent:
    group = transaction.owner_group(participant)
    return LedgerEvent(kind, now, participant=participant, task=task, draw=draw, owner_group=group)
