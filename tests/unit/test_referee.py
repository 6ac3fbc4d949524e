"""What a turn of the background loop does, and when it is told of."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from services.registry.referee import referee
from services.registry.referee.referee import Referee
from services.runtime.errors import Unavailable
from tests.support.registry_fakes import SettableClock

NOBODY = cast(Any, None)  # what a turn itself asks nothing of


def step(asked: list[str], name: str, done: int) -> Callable[[], Awaitable[int]]:
    async def run() -> int:
        asked.append(name)
        return done

    return run


@pytest.mark.parametrize(
    ("done", "due", "expected"), [(0, False, ["a"]), (0, True, ["a", "l"]), (1, False, ["a", "l"])]
)
async def test_the_ledger_is_asked_where_it_is_due_or_something_was_done(
    done: int, due: bool, expected: list[str]
) -> None:
    asked: list[str] = []
    turning = Referee(
        step(asked, "b", 0), [step(asked, "a", done)], step(asked, "l", 2), NOBODY, NOBODY, SettableClock()
    )
    assert await turning.turn(ledger_due=due) == done + 2 * ("l" in expected)
    assert asked == ["b", *expected]


async def test_a_step_that_fails_holds_up_neither_the_others_nor_the_ledger() -> None:
    asked: list[str] = []

    async def fails() -> int:
        raise Unavailable("SELECTOR_UNAVAILABLE", "the selector is away")

    turning = Referee(
        step(asked, "b", 0), [fails, step(asked, "a", 0)], step(asked, "l", 0), NOBODY, NOBODY, SettableClock()
    )
    assert await turning.turn() == 0
    assert asked == ["b", "a", "l"]


async def test_nothing_is_done_before_it_is_known_that_the_registry_is_at_work() -> None:
    asked: list[str] = []

    async def fails() -> int:
        raise Unavailable("DATABASE_UNAVAILABLE", "the database is away")

    turning = Referee(fails, [step(asked, "a", 1)], step(asked, "l", 0), NOBODY, NOBODY, SettableClock())
    assert await turning.turn() == 0
    assert asked == []


async def test_a_registry_that_cannot_write_tells_of_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(referee._TURNED, "set", told.append)

    async def fails() -> int:
        raise Unavailable("DISK_FULL", "the disk is full")

    clock = SettableClock()
    await Referee(fails, [], step([], "l", 0), NOBODY, NOBODY, clock).turn()
    assert told == []
    await Referee(step([], "b", 0), [], step([], "l", 0), NOBODY, NOBODY, clock).turn()
    assert told == [clock().timestamp()]
