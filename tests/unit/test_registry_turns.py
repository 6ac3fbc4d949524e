"""A turn over many items: fair, several at once, one failure holding up nobody."""

import asyncio

import pytest

from services.registry.referee.turns import each, fairly
from services.runtime.errors import Unavailable


def test_owners_take_turns_and_keep_their_own_order() -> None:
    items = ["a1", "a2", "a3", "b1", "c1", "c2"]
    assert fairly(items, by=lambda item: item[0]) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert fairly([], by=str) == []


async def test_everything_done_at_once_is_counted() -> None:
    async def work(item: int) -> int:
        await asyncio.sleep(0)
        return item

    assert await each(range(100), work) == sum(range(100))


async def test_one_failure_holds_up_nobody_and_is_told() -> None:
    undone: list[int] = []
    done: list[int] = []

    async def work(item: int) -> int:
        await asyncio.sleep(0)
        if item == 3:
            raise ValueError("three")
        done.append(item)
        return 1

    with pytest.raises(ExceptionGroup) as failure:
        await each(range(20), work, undone=undone.append)
    assert failure.group_contains(ValueError, match="three")
    assert undone == [3]
    assert sorted(done) == [item for item in range(20) if item != 3]


async def test_a_peer_that_is_away_ends_the_turn_and_nothing_is_forgotten() -> None:
    undone: list[int] = []
    asked: list[int] = []

    async def work(item: int) -> int:
        asked.append(item)
        await asyncio.sleep(0)
        raise Unavailable("AWAY", "away")

    with pytest.raises(ExceptionGroup):
        await each(range(50), work, undone=undone.append)
    assert len(asked) < 50
    assert sorted(undone) == list(range(50))


async def test_a_cancelled_turn_leaves_nothing_running_and_tells_what_is_undone() -> None:
    undone: list[int] = []
    started = asyncio.Event()

    async def work(item: int) -> int:
        started.set()
        await asyncio.Event().wait()
        return 1

    turn = asyncio.create_task(each(range(20), work, undone=undone.append))
    await started.wait()
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    assert sorted(undone) == list(range(20))
    assert asyncio.all_tasks() == {asyncio.current_task()}
