"""Pools: who takes part in a task, which stake it has locked, and what weight that gives in draws."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from services.runtime.errors import AlreadyExists, FailedPrecondition, NotFound
from services.selector import owner_groups
from services.selector.eligibility import Applicant, Eligibility
from services.selector.pool_trees import PoolTrees, policy_weight
from services.selector.records import Candidate, EventKind, LedgerEvent, Policy, Pool, Role, Verdict
from services.selector.transaction import Store, Transaction


@dataclass(frozen=True)
class Admission:
    """The verdict on an applicant, and what its admission locked; nothing where it was refused."""

    verdict: Verdict
    locked_micros: int
    weight: int
    owner_group: str


class Pools:
    """Opens and closes pools, and lets candidates in and out."""

    def __init__(
        self, store: Store, trees: PoolTrees, eligibility: Eligibility, *, clock: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._trees = trees
        self._eligibility = eligibility
        self._clock = clock

    async def open(self, *, task: str, policy: Policy, open_time: datetime, creator: str) -> Pool:
        """Starts a task's pool; once more, with nothing different, it answers the same. Else raises AlreadyExists."""

        def work(transaction: Transaction) -> Pool:
            pool = transaction.pool(task)
            if pool is None:
                pool = Pool(task, policy, open_time, creator)
                transaction.put_pool(pool)
                transaction.append_events(
                    [LedgerEvent(EventKind.POOL_OPENED, self._clock(), participant=creator, task=task)]
                )
            elif (pool.policy, pool.open_time, pool.creator) != (policy, open_time, creator):
                raise AlreadyExists(
                    "POOL_EXISTS", "the pool of this task has another policy, opening or creator", task=task
                )
            return pool

        return await self._store.write(work)

    async def add(self, applicant: Applicant, *, owner: str) -> Admission:
        """Decides on an applicant and, when it is eligible, locks its stake, in one step. `owner` may be empty.

        Raises NotFound, FailedPrecondition for a closed pool, AlreadyExists for a second role.
        """

        def work(transaction: Transaction) -> Admission:
            pool = open_pool(transaction, applicant.task)
            known = transaction.candidate(applicant.task, applicant.participant)
            taken = Role.TASK_CREATOR if pool.creator == applicant.participant else known.role if known else None
            if taken not in (None, applicant.role):
                raise AlreadyExists(
                    "ROLE_TAKEN", "a participant takes one role in a task", role=taken.name if taken else ""
                )
            now = self._clock()
            entered = known if known and known.active else None
            verdict = entered.verdict if entered else self._eligibility.decide(transaction, applicant, pool.policy)
            if not verdict.eligible:
                return Admission(verdict, 0, 0, transaction.owner_group(applicant.participant))
            if owner and not entered:
                # Its CANDIDATE_ADDED tells of it: every change of a group is an event.
                owner_groups.join(transaction, self._trees, applicant.participant, owner, now)
            candidate = entered or self._admit(transaction, verdict, now)
            return Admission(
                candidate.verdict,
                candidate.locked_micros,
                candidate.weight,
                transaction.owner_group(applicant.participant),
            )

        return await self._store.write(work)

    async def merge_owner_groups(self, participant: str, *, owner: str) -> str:
        """Makes the owner groups of a participant and its owner one. Returns the group's id."""

        def work(transaction: Transaction) -> str:
            if transaction.owner_group(participant) != transaction.owner_group(owner):
                now = self._clock()
                owner_groups.join(transaction, self._trees, participant, owner, now)
                merged = LedgerEvent(
                    EventKind.OWNER_GROUPS_MERGED,
                    now,
                    participant=participant,
                    owner_group=transaction.owner_group(participant),
                    reference=f"participants/{owner}",
                )
                transaction.append_events([merged])
            return transaction.owner_group(participant)

        return await self._store.write(work)

    async def remove(self, *, task: str, participant: str) -> int:
        """Unlocks the stake of one candidate, who is in no further draw. Returns its micro-units, 0 for nobody."""

        def work(transaction: Transaction) -> int:
            pool = find_pool(transaction, task)
            candidate = transaction.candidate(task, participant)
            if candidate is None or not candidate.active:
                return 0
            now = self._clock()
            if candidate.weight:
                group = transaction.owner_group(participant)
                pool = self._trees.change_leaf(transaction, pool, group, -candidate.locked_micros)
                transaction.unseat(task, participant, until=pool.version)
            _release(transaction, candidate, now)
            transaction.append_events(
                [
                    LedgerEvent(
                        EventKind.CANDIDATE_REMOVED,
                        now,
                        participant=participant,
                        task=task,
                        owner_group=transaction.owner_group(participant),
                    )
                ]
            )
            return candidate.locked_micros

        return await self._store.write(work)

    async def close(self, task: str) -> None:
        """Unlocks all stakes; there are no draws afterwards. Raises NotFound; a second time it does nothing."""

        def work(transaction: Transaction) -> None:
            pool = find_pool(transaction, task)
            if pool.closed:
                return
            now = self._clock()
            transaction.unlock_all(task, now)
            transaction.release_candidates(task)
            # Draws of a closed pool are read, and go on no more. What its tree was, the events tell.
            transaction.forget_leaves(task)
            transaction.put_pool(replace(pool, closed=True))
            transaction.append_events([LedgerEvent(EventKind.POOL_CLOSED, now, task=task)])
            self._trees.forget(task)

        await self._store.write(work)

    def _admit(self, transaction: Transaction, verdict: Verdict, now: datetime) -> Candidate:
        pool = open_pool(transaction, verdict.task)
        participant = verdict.participant
        accounts = transaction.accounts(participant)
        group = transaction.owner_group(participant)
        locked = weight = 0
        match verdict.role:
            case Role.VALIDATOR:
                locked = accounts.available_micros
                weight = policy_weight(pool.policy, locked)
            case Role.TRAINING_NODE:
                locked = pool.policy.training_node_min_stake_micros
        candidate = Candidate(verdict, locked, weight)
        transaction.put_candidate(candidate)
        transaction.put_accounts(
            replace(
                accounts,
                available_micros=accounts.available_micros - locked,
                locked_micros=accounts.locked_micros + locked,
            )
        )
        if locked:
            transaction.append_events(
                [LedgerEvent(EventKind.LOCKED, now, participant=participant, amount_micros=locked, task=verdict.task)]
            )
        transaction.append_events(
            [
                LedgerEvent(
                    EventKind.CANDIDATE_ADDED,
                    now,
                    participant=participant,
                    task=verdict.task,
                    owner_group=group,
                    weight=weight,
                )
            ]
        )
        if weight:
            pool = self._trees.change_leaf(transaction, pool, group, locked)
            leaf = transaction.leaf(pool.task, group)
            if leaf is not None:
                transaction.seat(pool.task, participant, leaf_index=leaf.index, since=pool.version)
        return candidate


def find_pool(transaction: Transaction, task: str) -> Pool:
    """The pool of a task. Raises NotFound."""
    pool = transaction.pool(task)
    if pool is None:
        raise NotFound("POOL_NOT_FOUND", "the task has no pool", task=task)
    return pool


def open_pool(transaction: Transaction, task: str) -> Pool:
    """The open pool of a task. Raises NotFound, and FailedPrecondition for a closed one."""
    pool = find_pool(transaction, task)
    if pool.closed:
        raise FailedPrecondition("POOL_CLOSED", "the pool of this task is closed", task=task)
    return pool


def take_locked(
    transaction: Transaction, trees: PoolTrees, *, participant: str, amount_micros: int, now: datetime
) -> None:
    """Takes slashed stake from the pools that have locked it, in order of their tasks, and weighs what is left.

    A validator that falls below the task's minimum is drawn no more. The participant's accounts are the caller's.
    """
    for candidate in transaction.candidacies(participant):
        taken = min(amount_micros, candidate.locked_micros)
        if not taken:
            continue
        amount_micros -= taken
        left = candidate.locked_micros - taken
        if not candidate.weight:
            transaction.put_candidate(replace(candidate, locked_micros=left))
            continue
        pool = find_pool(transaction, candidate.task)
        group = transaction.owner_group(participant)
        stays = left >= pool.policy.validator_min_stake_micros
        weight = policy_weight(pool.policy, left) if stays else 0
        pool = trees.change_leaf(transaction, pool, group, -taken if stays else -candidate.locked_micros)
        if not stays:
            transaction.unseat(pool.task, participant, until=pool.version)
        transaction.put_candidate(replace(candidate, locked_micros=left, weight=weight))
        transaction.append_events(
            [
                LedgerEvent(
                    EventKind.WEIGHT_CHANGED,
                    now,
                    participant=participant,
                    task=pool.task,
                    owner_group=group,
                    weight=weight,
                )
            ]
        )


def _release(transaction: Transaction, candidate: Candidate, now: datetime) -> None:
    """Gives the locked stake back, and marks the candidate as gone."""
    accounts = transaction.accounts(candidate.participant)
    locked = candidate.locked_micros
    transaction.put_candidate(replace(candidate, locked_micros=0, weight=0, active=False))
    if not locked:
        return
    transaction.put_accounts(
        replace(
            accounts,
            available_micros=accounts.available_micros + locked,
            locked_micros=accounts.locked_micros - locked,
        )
    )
    transaction.append_events(
        [
            LedgerEvent(
                EventKind.UNLOCKED, now, participant=candidate.participant, amount_micros=locked, task=candidate.task
            )
        ]
    )
