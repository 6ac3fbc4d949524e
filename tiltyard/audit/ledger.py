"""The selector's ledger rebuilt from its events: every account, every owner group, and every pool with its root."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tiltyard.curves import Curve, CurveKind, weight
from tiltyard.faults import Fault, cost_micros
from tiltyard.sumtree import SumTree
from tiltyard.type.v1 import stake_pb2, task_pb2

_WEIGHT_SHOWN = 2**64 - 1
_CURVES = {
    task_pb2.CURVE_UNSPECIFIED: CurveKind.POWER,
    task_pb2.CURVE_POWER: CurveKind.POWER,
    task_pb2.CURVE_LOG: CurveKind.LOG,
    task_pb2.CURVE_LOGISTIC: CurveKind.LOGISTIC,
}
_DEFAULT_ALPHA_MILLIS = 500
_FAULTS = {stake_pb2.StakeFault.Value(f"STAKE_FAULT_{fault.name}"): fault for fault in Fault}


class LedgerMismatch(ValueError):
    """An event that does not follow from those before it."""


@dataclass(frozen=True)
class PoolState:
    """A pool at one moment, as a receipt names it."""

    root: bytes
    weight: int
    size: int


@dataclass
class _Account:
    available: int = 0
    unbonding: int = 0
    locked: dict[str, int] = field(default_factory=dict)
    """By task."""
    balances: set[int] = field(default_factory=lambda: {0})
    """Every available amount there has been."""

    @property
    def stake_micros(self) -> int:
        """All of it, wherever it is."""
        return self.available + self.unbonding + sum(self.locked.values())

    def move(self, *, available: int = 0, unbonding: int = 0) -> None:
        self.available += available
        self.unbonding += unbonding
        if self.available < 0 or self.unbonding < 0:
            raise LedgerMismatch("more is taken from an account than it holds")
        self.balances.add(self.available)


@dataclass
class _Pool:
    minimum_micros: int
    curve: Curve
    tree: SumTree = field(default_factory=SumTree)
    leaves: dict[str, int] = field(default_factory=dict)
    """Index of each owner group's leaf."""
    stakes: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Of each owner group."""
    seats: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Owner group and stake of each validator that counts."""

    def weigh(self, stake_micros: int) -> int:
        return weight(stake_micros, minimum_micros=self.minimum_micros, curve=self.curve)

    def seat(self, participant: str, group: str, stake_micros: int) -> None:
        self.seats[participant] = (group, stake_micros)
        self._change(group, stake_micros)

    def unseat(self, participant: str) -> None:
        if participant in self.seats:
            group, stake = self.seats.pop(participant)
            self._change(group, -stake)

    def _change(self, group: str, by: int) -> None:
        self.stakes[group] += by
        weighs = self.weigh(self.stakes[group])
        if group in self.leaves:
            self.tree.set_weight(self.leaves[group], weighs)
        else:
            self.leaves[group] = self.tree.append(group, weighs)

    def state(self) -> PoolState:
        return PoolState(self.tree.root(), self.tree.total, len(self.tree))


class Ledger:
    """Follows the events one by one. `selection_of` gives a task's policy, which the log holds when it was created."""

    def __init__(self, selection_of: Callable[[str], task_pb2.SelectionPolicy | None]) -> None:
        self._selection_of = selection_of
        self._accounts: defaultdict[str, _Account] = defaultdict(_Account)
        self._pools: dict[str, _Pool] = {}
        self._drawn: dict[str, PoolState] = {}
        self._charges: dict[tuple[str, str], bool] = {}
        self.sequence = 0
        self.last_time_ns = 0

    @property
    def drawn(self) -> Mapping[str, PoolState]:
        """The pool of each draw as it was when its first place was charged."""
        return self._drawn

    @property
    def charges(self) -> Mapping[tuple[str, str], bool]:
        """Whether each charge has been given back, by draw and participant."""
        return self._charges

    def had(self, participant: str, available_micros: int) -> bool:
        """Whether this much of somebody's stake was available at some moment."""
        return available_micros in self._accounts[participant].balances

    def take(self, event: stake_pb2.LedgerEvent) -> None:
        """The next event. Raises LedgerMismatch."""
        if event.sequence != self.sequence + 1:
            raise LedgerMismatch(f"ledger event {event.sequence} follows {self.sequence}")
        self.sequence = event.sequence
        if not event.HasField("time"):
            raise LedgerMismatch(f"ledger event {event.sequence} bears no time")
        try:
            self.last_time_ns = max(self.last_time_ns, event.time.ToNanoseconds())
        except ValueError:
            raise LedgerMismatch(f"ledger event {event.sequence} bears a time that there is not") from None
        step = _STEPS.get(event.kind)
        if step is None:
            raise LedgerMismatch(f"ledger event {event.sequence} is of an unknown kind")
        if event.amount_micros < 0:
            raise LedgerMismatch(f"ledger event {event.sequence} moves less than nothing")
        step(self, event)

    def _deposited(self, event: stake_pb2.LedgerEvent) -> None:
        self._accounts[event.participant].move(available=event.amount_micros)

    def _withdrawal_requested(self, event: stake_pb2.LedgerEvent) -> None:
        self._accounts[event.participant].move(available=-event.amount_micros, unbonding=event.amount_micros)

    def _withdrawn(self, event: stake_pb2.LedgerEvent) -> None:
        self._accounts[event.participant].move(unbonding=-event.amount_micros)

    def _locked(self, event: stake_pb2.LedgerEvent) -> None:
        account = self._accounts[event.participant]
        account.move(available=-event.amount_micros)
        account.locked[event.task] = account.locked.get(event.task, 0) + event.amount_micros

    def _unlocked(self, event: stake_pb2.LedgerEvent) -> None:
        account = self._accounts[event.participant]
        if account.locked.pop(event.task, 0) != event.amount_micros:
            raise LedgerMismatch(f"{event.participant} had another amount locked for {event.task}")
        account.move(available=event.amount_micros)

    def _slashed(self, event: stake_pb2.LedgerEvent) -> None:
        """From what is available, then from what is locked in order of the tasks, then from what is unbonding."""
        account, left = self._accounts[event.participant], event.amount_micros
        fault = _FAULTS.get(event.fault)
        costs = 0 if fault is None else cost_micros(fault, stake_micros=account.stake_micros)
        if left != costs:
            raise LedgerMismatch(f"{event.participant} is slashed by {left}, its fault costs {costs}")
        taken = min(left, account.available)
        account.move(available=-taken)
        left -= taken
        for task in sorted(account.locked):
            taken = min(left, account.locked[task])
            account.locked[task] -= taken
            left -= taken
        account.move(unbonding=-left)

    def _pool_opened(self, event: stake_pb2.LedgerEvent) -> None:
        selection = self._selection_of(event.task)
        if selection is None:
            raise LedgerMismatch(f"a pool is opened for {event.task}, which was never created")
        if event.task in self._pools:
            raise LedgerMismatch(f"the pool of {event.task} is opened twice")
        self._pools[event.task] = _pool(event.task, selection)

    def _candidate_added(self, event: stake_pb2.LedgerEvent) -> None:
        pool = self._pool(event)
        if not event.weight:
            return
        # Twice, its stake would count twice in its owner group.
        if event.participant in pool.seats:
            raise LedgerMismatch(f"{event.participant} enters the pool of {event.task} twice")
        stake = self._accounts[event.participant].locked.get(event.task, 0)
        self._check_weight(pool, event, stake)
        pool.seat(event.participant, event.owner_group, stake)

    def _candidate_removed(self, event: stake_pb2.LedgerEvent) -> None:
        self._pool(event).unseat(event.participant)

    def _weight_changed(self, event: stake_pb2.LedgerEvent) -> None:
        pool = self._pool(event)
        stake = self._accounts[event.participant].locked.get(event.task, 0)
        pool.unseat(event.participant)
        if event.weight:
            self._check_weight(pool, event, stake)
            pool.seat(event.participant, event.owner_group, stake)

    def _pool_closed(self, event: stake_pb2.LedgerEvent) -> None:
        self._pool(event)

    def _quota_charged(self, event: stake_pb2.LedgerEvent) -> None:
        pool = self._pool(event)
        if (event.draw, event.participant) in self._charges:
            raise LedgerMismatch(f"{event.participant} is charged twice for {event.draw}")
        if event.draw not in self._drawn:
            self._drawn[event.draw] = pool.state()
        self._charges[event.draw, event.participant] = False

    def _quota_refunded(self, event: stake_pb2.LedgerEvent) -> None:
        if self._charges.get((event.draw, event.participant)) is not False:
            raise LedgerMismatch(f"{event.participant} is refunded for {event.draw}, which was never charged, or twice")
        self._charges[event.draw, event.participant] = True

    def _owner_groups_merged(self, event: stake_pb2.LedgerEvent) -> None:
        """Members who sit in a pool are told of by a WEIGHT_CHANGED each."""

    def _pool(self, event: stake_pb2.LedgerEvent) -> _Pool:
        if event.task not in self._pools:
            raise LedgerMismatch(f"{event.task} has no pool")
        return self._pools[event.task]

    def _check_weight(self, pool: _Pool, event: stake_pb2.LedgerEvent, stake_micros: int) -> None:
        expected = min(_WEIGHT_SHOWN, pool.weigh(stake_micros))
        if event.weight != expected:
            raise LedgerMismatch(
                f"{event.participant} weighs {event.weight} in {event.task}, its stake gives {expected}"
            )


def _pool(task: str, selection: task_pb2.SelectionPolicy) -> _Pool:
    """An empty pool. Raises LedgerMismatch for a policy that weighs nothing."""
    kind = _CURVES.get(selection.curve)
    if kind is None:
        raise LedgerMismatch(f"no pool can be weighed by the policy of {task}: there is no curve {selection.curve}")
    alpha = (selection.alpha_millis or _DEFAULT_ALPHA_MILLIS) if kind is CurveKind.POWER else 0
    try:
        pool = _Pool(selection.validator_min_stake_micros, Curve(kind, alpha))
        pool.weigh(0)
    except ValueError as error:
        raise LedgerMismatch(f"no pool can be weighed by the policy of {task}: {error}") from error
    return pool


_STEPS: Mapping[int, Callable[[Ledger, stake_pb2.LedgerEvent], None]] = {
    stake_pb2.LEDGER_EVENT_KIND_DEPOSITED: Ledger._deposited,
    stake_pb2.LEDGER_EVENT_KIND_LOCKED: Ledger._locked,
    stake_pb2.LEDGER_EVENT_KIND_UNLOCKED: Ledger._unlocked,
    stake_pb2.LEDGER_EVENT_KIND_WITHDRAWAL_REQUESTED: Ledger._withdrawal_requested,
    stake_pb2.LEDGER_EVENT_KIND_WITHDRAWN: Ledger._withdrawn,
    stake_pb2.LEDGER_EVENT_KIND_SLASHED: Ledger._slashed,
    stake_pb2.LEDGER_EVENT_KIND_POOL_OPENED: Ledger._pool_opened,
    stake_pb2.LEDGER_EVENT_KIND_CANDIDATE_ADDED: Ledger._candidate_added,
    stake_pb2.LEDGER_EVENT_KIND_CANDIDATE_REMOVED: Ledger._candidate_removed,
    stake_pb2.LEDGER_EVENT_KIND_POOL_CLOSED: Ledger._pool_closed,
    stake_pb2.LEDGER_EVENT_KIND_QUOTA_CHARGED: Ledger._quota_charged,
    stake_pb2.LEDGER_EVENT_KIND_QUOTA_REFUNDED: Ledger._quota_refunded,
    stake_pb2.LEDGER_EVENT_KIND_WEIGHT_CHANGED: Ledger._weight_changed,
    stake_pb2.LEDGER_EVENT_KIND_OWNER_GROUPS_MERGED: Ledger._owner_groups_merged,
}
