"""The stake ledger: every micro-unit lies on one account, and every change is an event in the same transaction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from services.runtime.errors import AlreadyExists, FailedPrecondition, OutOfRange, ResourceExhausted
from services.selector.owner_groups import join_funding_account
from services.selector.pool_trees import PoolTrees
from services.selector.pools import take_locked
from services.selector.records import (
    MAX_MICROS,
    Deposit,
    EventKind,
    LedgerEvent,
    Slash,
    Stake,
    Unbonding,
)
from services.selector.transaction import Store, Transaction
from tiltyard.faults import Fault, cost_micros

MAX_UNBONDINGS = 32
"""Amounts of one participant that may wait at once: each is told with its stake, of which a page holds a thousand."""


@dataclass(frozen=True)
class WithdrawalRequested:
    """The stake after a request, and how long its amount waits."""

    stake: Stake
    wait: timedelta


@dataclass(frozen=True)
class Withdrawn:
    """The stake after a withdrawal, and the micro-units that left the ledger."""

    stake: Stake
    withdrawn_micros: int


@dataclass(frozen=True)
class Slashed:
    """The stake after a punishment, and the micro-units that were there to take."""

    stake: Stake
    slashed_micros: int


@dataclass(frozen=True)
class LedgerPage:
    """Events in order, and the sequence number to go on from."""

    events: tuple[LedgerEvent, ...]
    next_sequence: int


class Stakes:
    """Deposits, withdrawals after a waiting time, punishments."""

    def __init__(
        self, store: Store, trees: PoolTrees, *, clock: Callable[[], datetime], unbonding_time: timedelta
    ) -> None:
        self._store = store
        self._trees = trees
        self._clock = clock
        self._unbonding_time = unbonding_time

    async def deposit(self, deposit: Deposit) -> Stake:
        """Adds to a participant's available stake, once for each reference.

        Raises AlreadyExists for a reference used before for another deposit, ResourceExhausted when the sum of all
        deposits would not fit in 63 bits.
        """

        def work(transaction: Transaction) -> Stake:
            known = transaction.deposit(deposit.reference)
            if known is not None:
                if known != deposit:
                    raise AlreadyExists(
                        "REFERENCE_REUSED",
                        "this reference was used before for another participant, amount or funding account",
                        reference=deposit.reference,
                    )
                return stake_of(transaction, deposit.participant)
            free = MAX_MICROS - transaction.total_deposited()
            if deposit.amount_micros > free:
                raise ResourceExhausted(
                    "LEDGER_FULL",
                    f"all deposits together stay below 2^63 micro-units, {free} are left",
                    free_micros=str(free),
                )
            now = self._clock()
            accounts = transaction.accounts(deposit.participant)
            transaction.add_deposit(deposit)
            transaction.put_accounts(
                replace(accounts, available_micros=accounts.available_micros + deposit.amount_micros)
            )
            join_funding_account(
                transaction,
                self._trees,
                participant=deposit.participant,
                funding_account=deposit.funding_account,
                now=now,
            )
            transaction.append_events(
                [
                    LedgerEvent(
                        EventKind.DEPOSITED,
                        now,
                        participant=deposit.participant,
                        amount_micros=deposit.amount_micros,
                        owner_group=transaction.owner_group(deposit.participant),
                        reference=deposit.reference,
                        funding_account=deposit.funding_account,
                    )
                ]
            )
            return stake_of(transaction, deposit.participant)

        return await self._store.write(work)

    async def request_withdrawal(self, participant: str, amount_micros: int) -> WithdrawalRequested:
        """Moves available stake to unbonding.

        Raises FailedPrecondition when more is asked for than is available, or as many amounts wait as may.
        """

        def work(transaction: Transaction) -> WithdrawalRequested:
            accounts = transaction.accounts(participant)
            if amount_micros > accounts.available_micros:
                raise FailedPrecondition(
                    "STAKE_NOT_AVAILABLE",
                    f"{amount_micros} micro-units were asked for, {accounts.available_micros} are available",
                    available_micros=str(accounts.available_micros),
                    locked_micros=str(accounts.locked_micros),
                )
            waiting = transaction.unbondings(participant)
            if len(waiting) >= MAX_UNBONDINGS:
                release_time = waiting[0].release_time.isoformat()
                raise FailedPrecondition(
                    "TOO_MANY_UNBONDING",
                    f"{len(waiting)} amounts wait, as many as may; the first can be withdrawn at {release_time}",
                    release_time=release_time,
                    limit=str(MAX_UNBONDINGS),
                )
            now = self._clock()
            transaction.put_accounts(
                replace(
                    accounts,
                    available_micros=accounts.available_micros - amount_micros,
                    unbonding_micros=accounts.unbonding_micros + amount_micros,
                )
            )
            transaction.add_unbonding(participant, amount_micros, now + self._unbonding_time)
            transaction.append_events(
                [LedgerEvent(EventKind.WITHDRAWAL_REQUESTED, now, participant=participant, amount_micros=amount_micros)]
            )
            return WithdrawalRequested(stake_of(transaction, participant), self._unbonding_time)

        return await self._store.write(work)

    async def withdraw(self, participant: str) -> Withdrawn:
        """Takes out all stake whose waiting time is over. Raises FailedPrecondition when there is none."""

        def work(transaction: Transaction) -> Withdrawn:
            now = self._clock()
            waiting = transaction.unbondings(participant)
            ready = [unbonding for unbonding in waiting if unbonding.release_time <= now]
            if not ready:
                raise _nothing_ready(waiting)
            amount = sum(unbonding.amount_micros for unbonding in ready)
            for unbonding in ready:
                transaction.put_unbonding(replace(unbonding, amount_micros=0))
            accounts = transaction.accounts(participant)
            transaction.put_accounts(replace(accounts, unbonding_micros=accounts.unbonding_micros - amount))
            transaction.append_events(
                [LedgerEvent(EventKind.WITHDRAWN, now, participant=participant, amount_micros=amount)]
            )
            return Withdrawn(stake_of(transaction, participant), amount)

        return await self._store.write(work)

    async def slash(self, participant: str, *, fault: Fault, evidence: str) -> Slashed:
        """Takes the share of the stake that a fault costs: available, then locked, then unbonding; once for evidence.

        Locked stake is taken from the pools in order of their tasks, unbonding stake from what is released first.
        Raises AlreadyExists for evidence used before for another fault.
        """

        def work(transaction: Transaction) -> Slashed:
            known = transaction.slash(participant, evidence)
            if known is not None:
                if known.fault is not fault:
                    raise AlreadyExists(
                        "EVIDENCE_REUSED",
                        f"this evidence was used before, for {known.fault.name}",
                        evidence=evidence,
                        fault=known.fault.name,
                    )
                return Slashed(stake_of(transaction, participant), known.taken_micros)
            now = self._clock()
            accounts = transaction.accounts(participant)
            taken = cost_micros(
                fault, stake_micros=accounts.available_micros + accounts.locked_micros + accounts.unbonding_micros
            )
            available = min(taken, accounts.available_micros)
            locked = min(taken - available, accounts.locked_micros)
            unbonding = taken - available - locked
            transaction.add_slash(Slash(participant, evidence, fault, taken))
            if taken:
                transaction.put_accounts(
                    replace(
                        accounts,
                        available_micros=accounts.available_micros - available,
                        locked_micros=accounts.locked_micros - locked,
                        unbonding_micros=accounts.unbonding_micros - unbonding,
                        slashed_micros=accounts.slashed_micros + taken,
                    )
                )
                transaction.append_events(
                    [
                        LedgerEvent(
                            EventKind.SLASHED,
                            now,
                            participant=participant,
                            amount_micros=taken,
                            reference=evidence,
                            fault=fault,
                        )
                    ]
                )
                take_locked(transaction, self._trees, participant=participant, amount_micros=locked, now=now)
                _take_unbonding(transaction, participant, unbonding)
            return Slashed(stake_of(transaction, participant), taken)

        return await self._store.write(work)

    async def get(self, participant: str) -> Stake:
        """One participant's stake; all zero for somebody who never deposited."""
        return await self._store.read(lambda transaction: stake_of(transaction, participant))

    async def list(self, *, after: str, limit: int) -> Sequence[Stake]:
        """Those who have or had stake, by participant id."""

        def work(transaction: Transaction) -> Sequence[Stake]:
            listed = transaction.list_accounts(after=after, limit=limit)
            everybody = [accounts.participant for accounts in listed]
            groups, waiting = transaction.owner_groups(everybody), transaction.unbondings_of(everybody)
            return [
                Stake(accounts, groups[accounts.participant], tuple(waiting[accounts.participant]))
                for accounts in listed
            ]

        return await self._store.read(work)

    async def list_events(self, *, start: int, limit: int) -> LedgerPage:
        """Events from a sequence number on. Raises OutOfRange for one beyond the next."""

        def work(transaction: Transaction) -> LedgerPage:
            following = transaction.last_sequence() + 1
            if start > following:
                raise OutOfRange(
                    "CURSOR_FROM_THE_FUTURE",
                    f"event {start} was asked for, the next one will be {following}",
                    next_sequence=str(following),
                )
            events = tuple(transaction.list_events(start=start, limit=limit))
            return LedgerPage(events, events[-1].sequence + 1 if events else start)

        return await self._store.read(work)


def stake_of(transaction: Transaction, participant: str) -> Stake:
    """A participant's accounts, owner group and what waits to be withdrawn."""
    return Stake(
        transaction.accounts(participant),
        transaction.owner_group(participant),
        tuple(transaction.unbondings(participant)),
    )


def _take_unbonding(transaction: Transaction, participant: str, amount_micros: int) -> None:
    for unbonding in transaction.unbondings(participant):
        taken = min(amount_micros, unbonding.amount_micros)
        if taken:
            transaction.put_unbonding(replace(unbonding, amount_micros=unbonding.amount_micros - taken))
        amount_micros -= taken


def _nothing_ready(waiting: Sequence[Unbonding]) -> FailedPrecondition:
    if not waiting:
        return FailedPrecondition("NOTHING_UNBONDING", "no stake was asked back")
    release_time = waiting[0].release_time.isoformat()
    return FailedPrecondition(
        "STILL_UNBONDING", f"the first amount can be withdrawn at {release_time}", release_time=release_time
    )
