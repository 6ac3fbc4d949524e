"""Whom the selector drew by an answer that never came: found, released and refunded before a task ends."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.registry.states import AssignmentState, TaskState
from services.registry.task_states import cancel
from services.registry.transaction import Writing
from services.runtime.errors import Unavailable
from tests.support.registry_fakes import FakeSelection, SettableClock
from tests.support.registry_world import NODES, TASK, MemoryFiles, World, model_bytes, open_database
from tiltyard.type.v1 import log_pb2, stake_pb2


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    clock = SettableClock()
    database = open_database(tmp_path, clock)
    world = World(database, clock, FakeSelection(clock), MemoryFiles())
    await world.open_task(validators=6)
    yield world
    await database.close()


def losing(world: World, asked: str) -> None:
    """The selector does what it is asked, and its answers do not come."""
    heard = getattr(world.selection, asked)

    async def unheard(*args: Any, **kwargs: Any) -> None:
        await heard(*args, **kwargs)
        raise Unavailable("SELECTOR_DOWN", "the selector cannot be reached")

    setattr(world.selection, asked, unheard)


def cancel_all(tx: Writing) -> None:
    for task in tx.tasks_in(TaskState.OPEN):
        cancel(tx, task, reason="its creator wants it no more")


def participants_of(world: World, kind: stake_pb2.LedgerEventKind.ValueType) -> list[str]:
    """Of the ledger's events of that kind, in order of their names."""
    events = [stake_pb2.LedgerEvent.FromString(event) for event in world.selection.events]
    return sorted(event.participant.removeprefix("participants/") for event in events if event.kind == kind)


@pytest.mark.parametrize(("asked", "drawn"), [("draw_validators", 3), ("extend_draw", 4)])
async def test_who_was_drawn_by_an_answer_that_never_came_is_released(world: World, asked: str, drawn: int) -> None:
    number = await world.submit(NODES[0], model_bytes("a"))
    declined = []
    if asked == "extend_draw":
        await world.turn()
        declined = (await world.duties(number))[:1]
        await world.decline(declined[0])
    losing(world, asked)
    with pytest.raises(ExceptionGroup):
        await world.turn()
    await world.store.write(cancel_all)
    assert await world.store.read(lambda tx: tx.has_unsure_rounds(TASK))
    # Another process has heard of nothing.
    world = world.restarted()
    await world.turn()
    charged = participants_of(world, stake_pb2.LEDGER_EVENT_KIND_QUOTA_CHARGED)
    duties = await world.all_duties(number, 1)
    assert len(charged) == drawn
    assert sorted(duty.validator for duty in duties) == charged
    released = sorted(duty.validator for duty in duties if duty.state is AssignmentState.RELEASED)
    assert released == sorted(set(charged) - {duty.participant for duty in declined})
    assert participants_of(world, stake_pb2.LEDGER_EVENT_KIND_QUOTA_REFUNDED) == released
    assert not await world.store.read(lambda tx: tx.has_unsure_rounds(TASK))
    # The log shows each of them as picked.
    leaves = await world.store.read(lambda tx: tx.leaves(start=0, limit=10_000))
    receipts = [entry.draw for leaf in leaves if (entry := log_pb2.LogEntry.FromString(leaf.entry)).HasField("draw")]
    assert sorted(pick.participant.removeprefix("participants/") for pick in receipts[-1].picks) == charged


async def test_a_pool_stays_open_until_what_was_drawn_is_known(world: World) -> None:
    await world.submit(NODES[0], model_bytes("a"))
    losing(world, "draw_validators")
    with pytest.raises(ExceptionGroup):
        await world.turn()
    await world.store.write(cancel_all)
    assert await world.turns.close_pools() == 0
    assert await world.draws.find_unheard() == 1
    await world.draws.settle()
    assert await world.turns.close_pools() == 1


async def test_for_a_round_that_nobody_was_drawn_for_nothing_is_found(world: World) -> None:
    number = await world.submit(NODES[0], model_bytes("a"))
    await world.structure.check()
    await world.store.write(cancel_all)
    assert await world.draws.find_unheard() == 1
    assert await world.draws.find_unheard() == 0
    assert await world.all_duties(number, 1) == []
