"""Which rounds are worth a look: those that changed, and those whose deadline has come. A turn costs what is due."""

from collections.abc import Callable, Collection
from datetime import datetime

from services.registry.records import Round
from services.registry.referee.turns import fairly
from services.registry.states import RoundState
from services.registry.transaction import Reading

RoundKey = tuple[str, int, int]
IsDue = Callable[[Reading, Round, datetime], bool]

ROUNDS_A_TURN = 64


def key_of(round_: Round) -> RoundKey:
    """Task, number and round."""
    return round_.task, round_.number, round_.round


class Docket:
    """The rounds in one state for which one step of the referee has something to do.

    What it knows is in memory only: a new process looks at all of them once.
    """

    def __init__(self, state: RoundState, is_due: IsDue) -> None:
        self._state = state
        self._is_due = is_due
        self._seen = 0
        self._due: dict[RoundKey, Round] = {}

    def look(self, tx: Reading, now: datetime) -> list[Round]:
        """The next rounds, fair across tasks; each once, until it changes, comes due, or `put_back` is called."""
        seen = tx.assignment_sequence()
        changed = tx.rounds_touched(self._state, after=self._seen)
        overdue = tx.rounds_due(self._state, now)
        found = {key_of(round_): round_ for round_ in (*changed, *overdue) if key_of(round_) not in self._due}
        self._due |= {key: round_ for key, round_ in found.items() if self._is_due(tx, round_, now)}
        self._seen = seen
        batch = fairly(self._due.values(), by=lambda round_: round_.task)[:ROUNDS_A_TURN]
        for round_ in batch:
            del self._due[key_of(round_)]
        return batch

    def news(self, tx: Reading, now: datetime) -> Collection[Round]:
        """Empty where `look` would find nothing."""
        return self._due.values() or tx.rounds_touched(self._state, after=self._seen) or tx.rounds_due(self._state, now)

    def is_due(self, tx: Reading, round_: Round, now: datetime) -> bool:
        """Whether there is something to do for this round as it is."""
        return round_.state is self._state and self._is_due(tx, round_, now)

    def put_back(self, round_: Round) -> None:
        """This one is still to be done."""
        self._due.setdefault(key_of(round_), round_)
