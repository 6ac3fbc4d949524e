"""What a validator may expect: its weight, its chance of being drawn, and what is left of its quota."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from services.runtime.errors import NotFound
from services.selector.pool_trees import PoolWeights
from services.selector.pools import open_pool
from services.selector.quotas import Quota, quota
from services.selector.transaction import Store, Transaction
from tiltyard.curves import Split, best_split
from tiltyard.odds import Odds, odds


@dataclass(frozen=True)
class OddsEstimate:
    """A participant's weight and chance in a pool, and its owner group's quota."""

    weight: int
    pool_weight: int
    chance: Odds
    quota: Quota
    split: Split


class OddsEstimates:
    """Estimates for people; nothing is decided by them."""

    def __init__(self, store: Store, *, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._clock = clock
        # An estimate takes as long as many lookups: with one at a time the others find a reader that is free.
        self._turn = asyncio.Lock()
        # The writer's trees are the writer's. An estimate whose asker has gone goes on beside the next one's.
        self._weights = PoolWeights()
        self._lock = threading.Lock()

    async def estimate(self, task: str, *, participant: str, validators: int) -> OddsEstimate:
        """The odds of a draw of `validators` in which the creator's owner group alone is passed over.

        Raises NotFound when the participant is no validator of the task that can be drawn, FailedPrecondition for a
        closed pool.
        """

        def work(transaction: Transaction) -> OddsEstimate:
            pool = open_pool(transaction, task)
            candidate = transaction.candidate(task, participant)
            group = transaction.owner_group(participant)
            leaf = transaction.leaf(task, group)
            if candidate is None or not candidate.weight or leaf is None:
                raise NotFound(
                    "NOT_A_VALIDATOR",
                    "the participant is no validator of this task, or has less than the least stake left",
                    task=task,
                )
            creators = transaction.leaf(task, transaction.owner_group(pool.creator))
            with self._lock:
                tree = self._weights.current(transaction, pool)
                left_out = [creators.index] if creators else []
                chance, pool_weight = odds(tree, leaf.index, validators, left_out=left_out), tree.total
            members = len(transaction.seated(task, leaf_indices=[leaf.index], version=pool.version)[leaf.index])
            return OddsEstimate(
                weight=candidate.weight,
                pool_weight=pool_weight,
                chance=Odds(chance.probability / members, chance.standard_error / members),
                quota=quota(transaction, pool, owner_group=group, weight=leaf.weight, now=self._clock()),
                split=best_split(
                    candidate.locked_micros,
                    minimum_micros=pool.policy.validator_min_stake_micros,
                    curve=pool.policy.curve,
                ),
            )

        async with self._turn:
            return await self._store.read(work)
