"""What a watcher of assignments has been told, so that a watch which breaks anywhere goes on without gap or repeat."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from services.registry.records import Assignment
from services.registry.referee.turns import fairly
from services.registry.states import AssignmentState

_ENDED = (AssignmentState.OPENED, AssignmentState.DECLINED, AssignmentState.EXPIRED, AssignmentState.RELEASED)

Range = tuple[int, int]
"""The first and the last sequence of several, both of them included."""


@dataclass(frozen=True)
class Told:
    """Changes by their sequences, which grow with each: those up to `seen` have been told, and those in `beyond`.

    Who has begun at sequence `begun` hears nothing of what had ended by then.
    """

    seen: int = 0
    beyond: tuple[Range, ...] = ()
    begun: int = 0

    def knows(self, assignment: Assignment) -> bool:
        """Whether there is nothing more to tell of an assignment, as it is."""
        at = assignment.sequence
        if at <= self.seen or (at <= self.begun and assignment.state in _ENDED):
            return True
        return any(first <= at <= last for first, last in self.beyond)


def tell(page: Sequence[Assignment], told: Told, *, reach: int) -> Iterator[tuple[Assignment, Told]]:
    """What is new in a page, by task in turn: a task with many submissions does not hold up one with few.

    Each comes with all that is told then. The page has everything from `told.seen` up to the sequence `reach`.
    """
    sequences = sorted(assignment.sequence for assignment in page)
    new = fairly([each for each in page if not told.knows(each)], by=lambda assignment: assignment.task)
    left = {assignment.sequence for assignment in new}
    for assignment in new:
        left.remove(assignment.sequence)
        yield assignment, _after(told, sequences, left, reach)


def told_all(told: Told, *, reach: int) -> Told:
    """What is told once a page that goes up to `reach` has been."""
    return replace(told, seen=max(told.seen, reach), beyond=_above(told.beyond, reach))


def _after(told: Told, sequences: Sequence[int], left: Collection[int], reach: int) -> Told:
    if not left:
        return told_all(told, reach=reach)
    seen, ranges, begin = min(left) - 1, list[Range](), 0
    for sequence, following in zip(sequences, [*sequences[1:], 0], strict=True):
        if sequence <= seen or sequence in left:
            continue
        begin = begin or sequence
        if not following or following in left:
            ranges.append((begin, sequence))
            begin = 0
    return replace(told, seen=max(told.seen, seen), beyond=(*ranges, *_above(told.beyond, reach)))


def _above(ranges: Sequence[Range], reach: int) -> tuple[Range, ...]:
    return tuple((max(first, reach + 1), last) for first, last in ranges if last > reach)
