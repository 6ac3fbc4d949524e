"""A clock that was put forward is not believed before it has held for a day."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.trainer.steadyclock import SteadyClock

NOW = datetime(2026, 6, 1, tzinfo=UTC)
HOUR, DAY, YEAR = timedelta(hours=1), timedelta(days=1), timedelta(days=365)


class Node:
    """A node whose clock is put where the test wants it, and which starts anew before each look."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "clock.json"
        self._time = NOW

    def now_at(self, time: datetime) -> datetime | None:
        self._time = time
        return SteadyClock(self._path, lambda: self._time).now()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """One whose clock is known to be right at NOW."""
    node = Node(tmp_path)
    assert node.now_at(NOW - DAY) is None
    assert node.now_at(NOW - HOUR) is None
    assert node.now_at(NOW) == NOW
    return node


def test_a_clock_that_goes_on_is_believed(node: Node) -> None:
    for hours in range(1, 100, 7):
        assert node.now_at(NOW + hours * HOUR) == NOW + hours * HOUR


def test_a_clock_that_is_put_forward_is_believed_once_it_has_held_for_a_day(node: Node) -> None:
    later = NOW + YEAR
    for hours in range(24):
        assert node.now_at(later + hours * HOUR) == NOW
    assert node.now_at(later + DAY) == later + DAY
    assert node.now_at(later + DAY + HOUR) == later + DAY + HOUR


def test_a_clock_that_jumps_again_while_it_is_doubted_has_not_held(node: Node) -> None:
    # The node was off for three days, and wakes up once more with another time.
    assert node.now_at(NOW + 3 * DAY) == NOW
    later = NOW + YEAR
    assert node.now_at(later) == NOW
    for hours in range(24):
        assert node.now_at(later + hours * HOUR) == NOW
    assert node.now_at(later + DAY) == later + DAY


def test_a_clock_that_is_put_right_again_is_believed_at_once(node: Node) -> None:
    assert node.now_at(NOW + YEAR) == NOW
    assert node.now_at(NOW + HOUR) == NOW + HOUR
    # What was doubted before counts for nothing when it comes again.
    assert node.now_at(NOW + YEAR + 2 * DAY) == NOW + HOUR


def test_a_clock_that_is_put_back_is_believed(node: Node) -> None:
    assert node.now_at(NOW - YEAR) == NOW - YEAR
    assert node.now_at(NOW) == NOW - YEAR
    assert node.now_at(NOW + DAY) == NOW + DAY


@pytest.mark.parametrize("left", ["", "[]", "{}", '{"believed": 3, "doubted_since": ""}', '{"believed": "now"}'])
def test_what_cannot_be_read_has_yet_to_hold(tmp_path: Path, node: Node, left: str) -> None:
    (tmp_path / "clock.json").write_text(left)
    assert node.now_at(NOW) is None
    assert node.now_at(NOW + DAY) == NOW + DAY


def test_where_nothing_can_be_written_down_it_goes_by_what_it_has_seen(tmp_path: Path) -> None:
    times = iter([NOW, NOW + HOUR, NOW + DAY, NOW + YEAR])
    clock = SteadyClock(tmp_path / "no" / "such" / "folder", lambda: next(times))
    assert [clock.now() for _ in range(4)] == [None, None, NOW + DAY, NOW + DAY]
