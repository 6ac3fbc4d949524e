"""A task is FINAL once the record log holds the selector's events of its draws, whatever is away meanwhile."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.registry.states import SubmissionState, TaskState
from services.registry.task_states import close
from services.registry.transaction import Writing
from services.runtime.errors import ArenaError, FailedPrecondition, Unavailable
from tests.support.registry_fakes import FakeSelection, SettableClock
from tests.support.registry_world import NODES, TASK, MemoryFiles, World, model_bytes, open_database
from tiltyard.type.v1 import log_pb2, stake_pb2, task_pb2

UNDRAWN = "undrawn"
AWAY = Unavailable("SELECTOR_DOWN", "the selector cannot be reached")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Two closed tasks: one with a submission that was given up after its draw, unsettled, and one without any."""
    clock = SettableClock()
    database = open_database(tmp_path, clock)
    world = World(database, clock, FakeSelection(clock), MemoryFiles())
    for task in (TASK, UNDRAWN):
        await world.open_task(validators=3, task=task)
    number = await world.submit(NODES[0], model_bytes("a"))
    await world.turn()
    for duty in (await world.duties(number))[:2]:
        await world.decline(duty)
    await world.store.write(_close_all)
    world.selection.before = refusing("settle", AWAY)
    with pytest.raises(ExceptionGroup):
        await world.turn()
    assert (await world.submission(number)).state is SubmissionState.REJECTED
    yield world
    await database.close()


def _close_all(tx: Writing) -> None:
    for task in tx.tasks_in(TaskState.OPEN):
        close(tx, task)


def refusing(asked: str, error: ArenaError) -> Callable[[str], None]:
    def before(question: str) -> None:
        if question == asked:
            raise error

    return before


async def settled(world: World) -> World:
    world.selection.before = lambda question: None
    await world.draws.settle()
    return world


async def states(world: World) -> tuple[str, str]:
    return (await world.task()).state.name, (await world.task(UNDRAWN)).state.name


async def leaves(world: World) -> list[str]:
    """The steps of the task and the events of its draw, as far as they are in the log."""
    found = []
    for leaf in await world.store.read(lambda tx: tx.leaves(start=0, limit=10_000)):
        entry = log_pb2.LogEntry.FromString(leaf.entry)
        if entry.task_changed.task == f"tasks/{TASK}":
            found.append(task_pb2.TaskState.Name(entry.task_changed.state))
        elif entry.ledger_event.draw:
            found.append(stake_pb2.LedgerEventKind.Name(entry.ledger_event.kind))
    return [name.rpartition("_")[2] for name in found]


async def test_the_log_holds_all_charges_and_refunds_of_its_draws_before_a_task_is_final(world: World) -> None:
    assert await (await settled(world)).turns.rank() == 2
    assert await leaves(world) == ["CLOSED", "CHARGED", "CHARGED", "CHARGED", "REFUNDED", "FINAL"]


async def test_without_the_selector_a_task_waits_aloud_and_holds_up_no_other(world: World) -> None:
    (await settled(world)).selection.before = refusing("ledger_events", AWAY)
    with capture_logs() as logged:
        for _ in range(2):
            with pytest.raises(Unavailable):
                await world.turns.rank()
    assert [(line["log_level"], line["tasks"]) for line in logged] == [("warning", [TASK])]
    assert await states(world) == ("CLOSED", "FINAL")
    world.selection.before = lambda question: None
    # Another process goes on where that one was.
    assert await world.restarted().turns.rank() == 1
    assert (await leaves(world))[-2:] == ["REFUNDED", "FINAL"]


async def test_a_task_waits_until_its_duties_are_settled(world: World) -> None:
    assert await world.turns.rank() == 1
    assert await states(world) == ("CLOSED", "FINAL")
    assert await (await settled(world)).turns.rank() == 1


async def test_a_ledger_that_is_far_ahead_is_taken_page_by_page(world: World) -> None:
    for _ in range(1000):
        world.selection.record(stake_pb2.LEDGER_EVENT_KIND_DEPOSITED)
    await settled(world)
    assert [await world.turns.rank() for _ in range(3)] == [1, 0, 1]
    assert (await leaves(world))[-2:] == ["REFUNDED", "FINAL"]


async def test_a_selector_from_an_older_backup_makes_no_task_final_without_its_charges(world: World) -> None:
    await settled(world)
    await world.log.take_ledger_events()
    events, world.selection.events = world.selection.events, world.selection.events[:3]
    with pytest.raises(FailedPrecondition) as refused:
        await world.turns.rank()
    assert refused.value.reason == "LEDGER_DIVERGED"
    assert await states(world) == ("CLOSED", "FINAL")
    # Its newest backup.
    world.selection.events = events
    assert await world.turns.rank() == 1
