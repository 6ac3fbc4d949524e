"""The registry's judging over a real selector behind a real server: the order of one draw, its reserves, its end."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from services.registry.states import AssignmentState, MembershipState, Role, SubmissionState, TaskState
from services.registry.task_states import cancel
from services.runtime.errors import Unavailable
from tests.support.registry_fakes import FakeSelection, SettableClock
from tests.support.registry_world import (
    NODES,
    TASK,
    VALIDATORS,
    MemoryFiles,
    World,
    model_bytes,
    open_database,
)
from tests.support.selector_server import selecting
from tiltyard.type.v1 import draw_pb2
from tiltyard.type.v1 import stake_pb2 as stake_types_pb2


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    clock = SettableClock()
    async with selecting(tmp_path, clock) as selector:
        database = open_database(tmp_path, clock)
        # The world asks of a selection what the Protocol says, and both fulfil it.
        yield World(database, clock, cast(FakeSelection, selector), MemoryFiles())
        await database.close()


async def receipt(world: World, number: int) -> draw_pb2.DrawReceipt:
    draw = (await world.submission(number)).draws[1]
    kept = await world.store.read(lambda tx: tx.draw_receipt(draw))
    assert kept is not None
    return draw_pb2.DrawReceipt.FromString(kept)


async def test_a_dispute_takes_the_rest_of_the_order_and_names_the_outlier(world: World) -> None:
    await world.open_task(validators=6)
    number = await world.submit(NODES[0], model_bytes("a"))
    await world.turn()
    await world.decline((await world.duties(number))[0])
    await world.turn()
    await world.judge(number, 900, 500, 900)
    await world.judge(number, 900, 900)
    scored = await world.submission(number)
    assert scored.state is SubmissionState.SCORED
    duties = await world.duties(number)
    assert scored.scores[1].outliers == (duties[2].participant,)
    # An outlier costs 50 of 1000 of its stake, at the selector and in the record.
    events = await world.selection.ledger_events(start=1, limit=1000)
    read = [stake_types_pb2.LedgerEvent.FromString(event) for _, event in events]
    slashes = [event for event in read if event.kind == stake_types_pb2.LEDGER_EVENT_KIND_SLASHED]
    assert [(s.participant, s.amount_micros) for s in slashes] == [(f"participants/{duties[2].participant}", 50)]
    assert slashes[0].fault == stake_types_pb2.STAKE_FAULT_REPORT_OUTSIDE_TOLERANCE
    assert await world.faults.slash() == 0
    assert [pick.participant for pick in (await receipt(world, number)).picks] == [
        f"participants/{duty.participant}" for duty in duties
    ]
    assert all(assignment.settled for assignment in await world.all_duties(number))


async def test_an_extension_whose_answer_was_lost_is_not_lost(world: World) -> None:
    await world.open_task(validators=5)
    number = await world.submit(NODES[0], model_bytes("a"))
    await world.turn()
    for duty in (await world.duties(number))[:2]:
        await world.decline(duty)
    # The registry dies after the selector has given its last two reserves; three are wanted by the next question.
    draw = (await world.submission(number)).draws[1]
    await world.selection.extend_draw(draw, picks=6, paused=())
    await world.decline((await world.duties(number))[2])
    await world.turn()
    assert await world.states(number) == ["DECLINED", "DECLINED", "DECLINED", "OFFERED", "OFFERED"]


async def test_a_draw_whose_answer_was_lost_as_its_task_was_cancelled_is_found_and_given_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.open_task(validators=5)
    assert await world.selection.find_draw(task=TASK, number=1, round_=1) is None
    number = await world.submit(NODES[0], model_bytes("a"))
    draw = world.selection.draw_validators

    async def unheard(**asked: Any) -> None:
        await draw(**asked)
        raise Unavailable("SELECTOR_DOWN", "the answer did not come")

    with monkeypatch.context() as lost:
        lost.setattr(world.selection, "draw_validators", unheard)
        with pytest.raises(ExceptionGroup):
            await world.turn()
    await world.store.write(lambda tx: [cancel(tx, task, reason="") for task in tx.tasks_in(TaskState.OPEN)])
    await world.turn()
    found = [(a.state, a.refund, a.settled) for a in await world.all_duties(number)]
    assert found == [(AssignmentState.RELEASED, True, True)] * 3
    assert len((await receipt(world, number)).picks) == 3


async def test_a_draw_waits_for_the_selectors_pool_to_grow(world: World) -> None:
    await world.open_task(validators=2)
    number = await world.submit(NODES[0], model_bytes("a"))
    await world.turn()
    assert (await world.submission(number)).state is SubmissionState.REVEALED
    assert (await world.submission(number)).detail
    await world.join(VALIDATORS[2], Role.VALIDATOR)
    await world.join(VALIDATORS[3], Role.VALIDATOR)
    await world.join(VALIDATORS[3], Role.VALIDATOR, state=MembershipState.PAUSED)
    await world.turn()
    assigned = {duty.participant for duty in await world.duties(number)}
    assert assigned == {validator.id for validator in VALIDATORS[:3]}
    assert TASK in (await receipt(world, number)).task


async def test_released_validators_get_their_quota_back(world: World) -> None:
    await world.open_task(validators=3)
    number = await world.submit(NODES[0], model_bytes("a"))
    await world.turn()
    await world.decline((await world.duties(number))[0])
    await world.turn()
    await world.decline((await world.duties(number))[1])
    await world.turn()
    assert (await world.submission(number)).state is SubmissionState.REJECTED
    found = [(a.state, a.refund, a.settled) for a in await world.all_duties(number)]
    assert found == [
        (AssignmentState.DECLINED, False, True),
        (AssignmentState.DECLINED, False, True),
        (AssignmentState.RELEASED, True, True),
    ]
