"""What draws have to know of a pool's leaves: who can be picked by way of them, and what is used of their quotas."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from services.selector.transaction import Transaction

_MOST_REMEMBERED = 200_000


@dataclass(frozen=True, slots=True)
class SeatedGroup:
    """Those who can be picked when a leaf comes up: members of one owner group by id, or nobody."""

    owner_group: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class _Known:
    """Owner groups by participant; seats by task, version of the pool and leaf; uses by task, window and group."""

    groups: dict[str, str] = field(default_factory=dict)
    seats: dict[tuple[str, int, int], SeatedGroup] = field(default_factory=dict)
    used: dict[tuple[str, int, str], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.groups) + len(self.seats) + len(self.used)


class Seating:
    """Groups, seats and uses as one transaction sees them, its own uses included. What is not known yet is read."""

    def __init__(self, transaction: Transaction, known: _Known, sequence: int) -> None:
        self._transaction = transaction
        self._known = known
        self._fresh = _Known()
        self._sequence = sequence

    def look(
        self, task: str, *, version: int, window: int, leaf_indices: Sequence[int]
    ) -> Sequence[tuple[SeatedGroup, int]]:
        """Who can be picked by way of each leaf, and the uses of their quota; 0 for nobody.

        What is missing is read in as many questions for many leaves as for one.
        """
        known, fresh = self._known.seats, self._fresh.seats
        missing = {
            index
            for index in leaf_indices
            if (task, version, index) not in known and (task, version, index) not in fresh
        }
        if missing:
            seated = self._transaction.seated(task, leaf_indices=missing, version=version)
            groups = self.groups({member for members in seated.values() for member in members})
            for index, members in seated.items():
                fresh[task, version, index] = SeatedGroup(groups[members[0]] if members else "", tuple(members))
        found = [known.get((task, version, index)) or fresh[task, version, index] for index in leaf_indices]
        return [(seats, self._used(task, window, seats.owner_group, found)) for seats in found]

    def groups(self, participants: Iterable[str]) -> Mapping[str, str]:
        """The owner group of each."""
        found = {one: self._known.groups.get(one) or self._fresh.groups.get(one) for one in participants}
        unknown = [participant for participant, group in found.items() if group is None]
        if unknown:
            self._fresh.groups.update(self._transaction.owner_groups(unknown))
        return {one: group or self._fresh.groups[one] for one, group in found.items()}

    def use(self, task: str, window: int, owner_groups: Collection[str]) -> None:
        """Counts one use more of each group's quota, which the transaction records as one ledger event each."""
        for group in owner_groups:
            self._fresh.used[task, window, group] = self._used(task, window, group) + 1
        self._sequence += len(owner_groups)

    def remembered(self) -> tuple[_Known, int]:
        """All that is known, and the number of the ledger event up to which it is true."""
        known, fresh = self._known, self._fresh
        if len(known) + len(fresh) > _MOST_REMEMBERED:
            return _Known(), self._sequence
        known.groups.update(fresh.groups)
        known.seats.update(fresh.seats)
        known.used.update(fresh.used)
        return known, self._sequence

    def _used(self, task: str, window: int, owner_group: str, beside: Iterable[SeatedGroup] = ()) -> int:
        """Uses of one group's quota. Where they are not known, those of the groups beside it are read, too."""
        if not owner_group:
            return 0
        key = (task, window, owner_group)
        used = self._fresh.used.get(key, self._known.used.get(key))
        if used is None:
            groups = {seats.owner_group for seats in beside if seats.owner_group} | {owner_group}
            unknown = [one for one in groups if (task, window, one) not in self._fresh.used]
            read = self._transaction.quota_used(task, window=window, owner_groups=unknown)
            self._fresh.used.update({(task, window, group): number for group, number in read.items()})
            used = read[owner_group]
        return used


class SeatingMemory:
    """Remembers seating between transactions, for as long as no ledger event tells of a change made elsewhere.

    Whatever changes groups, seats or uses is an event in the same transaction, and events are numbered without gaps. So
    what was true at the last number is true while that number is the last. What a transaction has read and used is kept
    only once it is committed; the database is the truth, also after a restart.
    """

    def __init__(self) -> None:
        self._known = _Known()
        self._sequence = 0

    def at(self, transaction: Transaction) -> Seating:
        """The seating that a transaction sees."""
        sequence = transaction.last_sequence()
        return Seating(transaction, self._known if sequence == self._sequence else _Known(), sequence)

    def keep(self, seating: Seating) -> None:
        """Remembers the seating of a transaction that has been committed; only one lies between `at` and this."""
        self._known, self._sequence = seating.remembered()
