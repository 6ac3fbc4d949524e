"""Owner groups: the connected components of participants that share a funding account or an owner."""

from datetime import datetime

from services.selector.pool_trees import PoolTrees
from services.selector.records import EventKind, LedgerEvent, Role
from services.selector.transaction import Transaction


def join_funding_account(
    transaction: Transaction, trees: PoolTrees, *, participant: str, funding_account: str, now: datetime
) -> None:
    """Joins the participant with all who were funded from the account before."""
    first = transaction.funded_by(funding_account)
    if first is None:
        transaction.add_funding_account(funding_account, participant)
    else:
        join(transaction, trees, participant, first, now)


def join(transaction: Transaction, trees: PoolTrees, one: str, other: str, now: datetime) -> None:
    """Makes the owner groups of two participants one, in every open pool too. Its id is the smaller of the two ids."""
    groups = {transaction.owner_group(one), transaction.owner_group(other)}
    kept = min(groups)
    for absorbed in groups - {kept}:
        # Every member of a group of several is recorded, the one that gives it its id too.
        transaction.put_owner_group(kept, kept)
        for member in transaction.owner_group_members(absorbed):
            transaction.put_owner_group(member, kept)
            for candidate in transaction.candidacies(member):
                if candidate.role is Role.VALIDATOR:
                    _move_seat(transaction, trees, task=candidate.task, member=member, absorbed=absorbed, now=now)


def _move_seat(
    transaction: Transaction, trees: PoolTrees, *, task: str, member: str, absorbed: str, now: datetime
) -> None:
    """Takes one member, whose group is the kept one by now, from the absorbed group's leaf to that of its group."""
    pool = transaction.pool(task)
    candidate = transaction.candidate(task, member)
    if pool is None or candidate is None or candidate.weight == 0:
        return
    kept = transaction.owner_group(member)
    pool = trees.change_leaf(transaction, pool, absorbed, -candidate.locked_micros)
    transaction.unseat(task, member, until=pool.version)
    pool = trees.change_leaf(transaction, pool, kept, candidate.locked_micros)
    leaf = transaction.leaf(task, kept)
    if leaf is not None:
        transaction.seat(task, member, leaf_index=leaf.index, since=pool.version)
    transaction.append_events(
        [
            LedgerEvent(
                EventKind.WEIGHT_CHANGED,
                now,
                participant=member,
                task=task,
                owner_group=kept,
                weight=candidate.weight,
            )
        ]
    )
