"""What watchers of assignments are told: in turn by task, and through any breaks each change once."""

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.registry.convert.assignments import told_of, watched_message
from services.registry.duty_watch import Told, tell, told_all
from services.registry.records import Assignment
from services.registry.states import AssignmentState
from services.runtime.errors import InvalidArgument
from tiltyard.registry.v1 import assignment_pb2

NOW = datetime(2026, 1, 1, tzinfo=UTC)
VALIDATOR = "a" * 40
OFFERED, ACCEPTED, RELEASED = AssignmentState.OFFERED, AssignmentState.ACCEPTED, AssignmentState.RELEASED


class Duties:
    """The assignments of one validator, as a store keeps them: each change gives a sequence above all others."""

    def __init__(self) -> None:
        self.sequence = 0
        self.kept: dict[tuple[str, int], Assignment] = {}

    def put(self, task: str, number: int, state: AssignmentState) -> None:
        # Other validators' changes take sequences, too.
        self.sequence += 1 + number % 3
        self.kept[task, number] = Assignment(
            task, number, 1, VALIDATOR, state, 0, NOW, NOW, deadline=None, sequence=self.sequence
        )

    def page(self, told: Told, limit: int) -> list[Assignment]:
        found = sorted(self.kept.values(), key=lambda each: each.sequence)
        return [each for each in found if each.sequence > told.seen][:limit]

    def unended(self) -> list[Assignment]:
        return [each for each in self.page(Told(), 10**6) if each.state is not RELEASED]


def through_the_wire(assignment: Assignment, told: Told) -> Told:
    """What a watcher hands back after a break."""
    cursor = watched_message(assignment, told).cursor
    read = told_of(assignment_pb2.WatchAssignmentsRequest(cursor=cursor))
    assert read is not None
    return read


CHANGES = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.sampled_from([OFFERED, ACCEPTED, RELEASED])), max_size=30
)


@given(before=CHANGES, after=st.lists(CHANGES, max_size=6), limit=st.integers(1, 8), chance=st.randoms())
@settings(max_examples=300, deadline=None)
def test_each_state_is_told_once_through_breaks_anywhere(before, after, limit, chance) -> None:
    duties = Duties()
    for change in before:
        duties.put(*change)
    begun, first = duties.sequence, duties.unended()
    heard: list[Assignment] = []

    def hear(page: list[Assignment], told: Told, reach: int) -> tuple[Told, bool]:
        """Take what a page tells, or break off within it."""
        for assignment, now in tell(page, told, reach=reach):
            heard.append(assignment)
            if chance.random() < 0.3:
                return through_the_wire(assignment, now), True
        return told_all(told, reach=reach), False

    told, _ = hear(first, Told(begun=begun), begun) if first else (Told(seen=begun), False)
    for changes in [*after, []]:
        for change in changes:
            duties.put(*change)
        while page := duties.page(told, limit):
            told, _ = hear(page, told, page[-1].sequence)
    sequences = [assignment.sequence for assignment in heard]
    assert len(sequences) == len(set(sequences)), "something was told twice"
    wanted = {each.sequence for each in duties.kept.values() if each.sequence > begun}
    wanted |= {each.sequence for each in duties.kept.values() if each.sequence <= begun and each.state is not RELEASED}
    assert wanted <= set(sequences), "something was never told"
    known = {each.sequence for each in first}
    assert all(sequence > begun or sequence in known for sequence in sequences), "something old was told"


def test_a_cursor_stays_short_whatever_the_order() -> None:
    duties = Duties()
    for task in "abcd":
        for number in range(250):
            duties.put(task, number, OFFERED)
    page = duties.unended()
    lengths = [
        len(watched_message(assignment, told).cursor)
        for assignment, told in tell(page, Told(begun=duties.sequence), reach=duties.sequence)
    ]
    assert max(lengths) < 100


@pytest.mark.parametrize(
    "cursor", ["x", "-1", "1.5", "1:", "1,2", "1,2-", "1:2:3", " 1", "9" * 30, "1" + ",2-3" * 20_000]
)
def test_what_is_no_cursor_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidArgument):
        told_of(assignment_pb2.WatchAssignmentsRequest(cursor=cursor))
