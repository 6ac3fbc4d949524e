"""Quotas: how often an owner group may be assigned for one task in each rate window."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache

from services.runtime.errors import FailedPrecondition, NotFound
from services.selector.pool_trees import policy_weight
from services.selector.records import Charge, EventKind, LedgerEvent, Policy, Pool, Settlement
from services.selector.transaction import Transaction
from tiltyard.sortition import quota_limit


@dataclass(frozen=True)
class Quota:
    """Uses of a group's quota in one window, how many it may have, and when the next window starts."""

    used: int
    limit: int
    refill_time: datetime


def window_at(pool: Pool, now: datetime) -> int:
    """Number of the rate window: 0 from the task's opening on, and before it."""
    return max(0, (now - pool.open_time) // pool.policy.window)


def limit_of(pool: Pool, weight: int) -> int:
    """How often an owner group of this weight may be assigned in a window."""
    return quota_limit(weight, reference_weight=_reference_weight(pool.policy), limit=pool.policy.limit)


@lru_cache(maxsize=1024)
def _reference_weight(policy: Policy) -> int:
    # A power to fifty digits takes as long as a query, and each place of a draw asks for it.
    return policy_weight(policy, policy.reference_stake_micros)


def refill_time(pool: Pool, now: datetime) -> datetime:
    """When the next window starts."""
    return pool.open_time + (window_at(pool, now) + 1) * pool.policy.window


def quota(transaction: Transaction, pool: Pool, *, owner_group: str, weight: int, now: datetime) -> Quota:
    """The quota of an owner group of this weight."""
    used = transaction.quota_used(pool.task, window=window_at(pool, now), owner_groups=[owner_group])
    return Quota(used[owner_group], limit_of(pool, weight), refill_time(pool, now))


def charge(transaction: Transaction, charges: Mapping[Charge, str], now: datetime) -> None:
    """Uses quotas once for each charge, whose owner group now is given with it; each is one ledger event, in order."""
    transaction.add_charges(list(charges))
    transaction.append_events(
        [
            LedgerEvent(
                EventKind.QUOTA_CHARGED,
                now,
                participant=charge.participant,
                task=charge.task,
                draw=charge.draw,
                owner_group=group,
            )
            for charge, group in charges.items()
        ]
    )


def settle(transaction: Transaction, *, draw: str, participant: str, settlement: Settlement, now: datetime) -> int:
    """Lets a charge stand or gives it back. Returns the uses charged to the group in the charge's window.

    Raises NotFound for somebody who has no pick in the draw, FailedPrecondition when it was settled otherwise before.
    """
    known = transaction.charge(draw, participant)
    if known is None:
        raise NotFound("PICK_NOT_FOUND", "the participant has no pick in this draw", draw=draw)
    group = transaction.owner_group(participant)
    if known.settlement is Settlement.OPEN:
        transaction.settle_charge(replace(known, settlement=settlement))
        if settlement is Settlement.REFUNDED:
            event = LedgerEvent(
                EventKind.QUOTA_REFUNDED,
                now,
                participant=participant,
                task=known.task,
                draw=draw,
                owner_group=group,
            )
            transaction.append_events([event])
    elif known.settlement is not settlement:
        raise FailedPrecondition(
            "ALREADY_SETTLED",
            f"this pick was settled before as {known.settlement.name}",
            settlement=known.settlement.name,
        )
    return transaction.quota_used(known.task, window=known.window, owner_groups=[group])[group]
