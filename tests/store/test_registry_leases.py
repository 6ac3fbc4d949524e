"""Leases pass on in order, are held once, are shared out fairly, and outlive the registry's own absence."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from services.registry.duty_watch import Told
from services.registry.leaderboard import Ranking
from services.registry.listing import Listing
from services.registry.queries import SqlReading
from services.registry.records import Assignment
from services.registry.referee import docket
from services.registry.referee.outages import Outages
from services.registry.states import MembershipState, Role, RoundState, SubmissionState, ValidatorFaultKind
from services.registry.transaction import Store, Writing
from services.runtime.errors import AlreadyExists, ArenaError, DiskFull, FailedPrecondition, NotFound, ResourceExhausted
from services.runtime.names import format_assignment
from tests.support.registry_fakes import FakeSelection, SettableClock
from tests.support.registry_world import (
    KEYS,
    NODES,
    TASK,
    VALIDATORS,
    MemoryFiles,
    World,
    model_bytes,
    open_database,
    task_config,
)
from tiltyard.identity import Key

MINUTE_S, HOUR_S = 60, 3600


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    clock = SettableClock()
    database = open_database(tmp_path, clock)
    yield World(database, clock, FakeSelection(clock), MemoryFiles())
    await database.close()


async def evaluating(world: World) -> int:
    await world.open_task()
    number = await world.submit(NODES[0], model_bytes("a"))
    await world.turn()
    return number


async def faults(world: World) -> list[tuple[str, str]]:
    found = await world.store.read(lambda tx: tx.validator_faults(Listing(), task=TASK))
    return [(fault.validator, fault.kind.name) for _, fault in found]


# Held once


async def test_of_two_processes_with_one_key_one_holds_the_lease(world: World) -> None:
    number = await evaluating(world)
    duty = (await world.duties(number))[0]
    attempts = await asyncio.gather(
        *(world.accept(duty, holder=bytes([process]) * 32) for process in range(8)), return_exceptions=True
    )
    held = [attempt for attempt in attempts if isinstance(attempt, str)]
    refused = [attempt for attempt in attempts if isinstance(attempt, ArenaError)]
    assert len(held) == 1
    assert len(refused) == 7
    assert {(type(error), error.reason) for error in refused} == {(AlreadyExists, "LEASE_HELD")}
    # The one that holds it gets the same token again, as after a restart.
    holder = attempts.index(held[0])
    assert await world.accept(duty, holder=bytes([holder]) * 32) == held[0]


async def test_who_is_back_late_is_told_so_at_every_step(world: World) -> None:
    number = await evaluating(world)
    late, offered, _ = await world.duties(number)
    token = await world.accept(late)
    world.clock.advance(seconds=2 * MINUTE_S)
    await world.turn()
    report = await world.report(late, 900)
    with pytest.raises(FailedPrecondition, match="LEASE_LOST"):
        await world.assignments.renew(late.participant, late, token=token)
    with pytest.raises(FailedPrecondition, match="LEASE_LOST"):
        await world.seal(late, report, token=token)
    with pytest.raises(FailedPrecondition, match="ASSIGNMENT_ENDED"):
        await world.accept(late)
    with pytest.raises(FailedPrecondition, match="ASSIGNMENT_ENDED"):
        await world.decline(offered)
    assert (late.participant, "LEASE_EXPIRED") in await faults(world)
    assert (offered.participant, "OFFER_EXPIRED") in await faults(world)


# Joining

PENDING = MembershipState.PENDING


async def test_who_is_still_joining_is_not_drawn(world: World) -> None:
    await world.open_task(validators=4)
    await world.join(VALIDATORS[0], Role.VALIDATOR, state=PENDING)
    number = await world.submit(NODES[0], model_bytes("a"))
    await world.turn()
    assert {duty.participant for duty in await world.duties(number)} == {key.id for key in VALIDATORS[1:4]}


async def test_who_was_drawn_while_joining_is_released_and_not_blamed(world: World) -> None:
    number = await evaluating(world)
    duty = (await world.duties(number))[0]
    await world.join(KEYS[duty.participant], Role.VALIDATOR, state=PENDING)
    world.clock.advance(seconds=MINUTE_S)
    await world.turn()
    assert await world.states(number) == ["RELEASED", "EXPIRED", "EXPIRED", *["OFFERED"] * 3]
    assert duty.participant not in dict(await faults(world))
    draw = (await world.submission(number)).draws[1]
    assert world.selection.settlements[draw, duty.participant] is True


# Faults are recorded, and cost stake


async def test_every_fault_is_recorded_once_and_taken_to_the_selector(world: World) -> None:
    await world.open_task(validators=9)
    number = await world.submit(NODES[0], model_bytes("a"))
    await world.turn()
    leased, *_ = await world.duties(number)
    await world.accept(leased)
    sealed = {duty: await world.evaluate(duty, 900) for duty in (await world.duties(number))[1:]}
    world.clock.advance(seconds=2 * MINUTE_S)
    await world.turn()
    reserve = (await world.duties(number, "OFFERED"))[0]
    sealed[reserve] = await world.evaluate(reserve, 500)
    await world.turn()
    opened = [duty for duty in sealed if duty != (await world.duties(number))[1]]
    for duty in opened:
        await world.open(duty, sealed[duty])
    world.clock.advance(seconds=HOUR_S)
    await world.turn()
    # One of two is off: reserves are called in, and decide.
    await world.judge(number, *[900] * len(await world.duties(number, "OFFERED")))
    assert (await world.submission(number)).state is SubmissionState.SCORED
    unopened = (await world.duties(number))[1]
    expected = [
        (leased.participant, "LEASE_EXPIRED"),
        (unopened.participant, "SEAL_UNOPENED"),
        (reserve.participant, "OUTLIER"),
    ]
    assert await faults(world) == expected
    assert (await world.leaf_kinds()).count("validator_fault") == 3
    assert [(participant, kind.name) for (participant, _), kind in world.selection.slashes.items()] == expected


async def test_a_slash_whose_answer_was_lost_is_asked_for_again(world: World) -> None:
    number = await evaluating(world)
    duty = (await world.duties(number))[0]
    await world.accept(duty)
    world.clock.advance(seconds=2 * MINUTE_S)
    await world.judging.expire_assignments()
    world.selection.unavailable = True
    with pytest.raises(ExceptionGroup):
        await world.faults.slash()
    world.selection.unavailable = False
    assert await world.faults.slash() == 1
    assert await world.faults.slash() == 0
    assert list(world.selection.slashes.values()) == [ValidatorFaultKind.LEASE_EXPIRED]


@pytest.mark.parametrize("reason", ["DRAW_NOT_FOUND", "PICK_NOT_FOUND"])
async def test_what_the_selector_says_of_settled_duties_and_known_evidence_stands(world: World, reason: str) -> None:
    number = await evaluating(world)
    duty = (await world.duties(number))[0]
    await world.accept(duty)
    world.clock.advance(seconds=2 * MINUTE_S)
    await world.judging.expire_assignments()
    # One of the two services has come back from an older backup than the other.
    known = {(duty.participant, format_assignment(duty)): ValidatorFaultKind.OUTLIER}
    world.selection.slashes |= known

    def forgotten(question: str) -> None:
        if question == "settle":
            raise NotFound(reason, "there is no such draw, or no such pick in it")

    world.selection.before = forgotten
    assert [await world.faults.slash(), await world.faults.slash()] == [1, 0]
    assert [await world.draws.settle(), await world.draws.settle()] == [3, 0]
    assert world.selection.slashes == known


# Fair across tasks


async def test_a_task_with_many_submissions_does_not_starve_one_with_few(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, many = 8, 14
    monkeypatch.setattr(docket, "ROUNDS_A_TURN", at_once)
    crowded = task_config(limits=replace(task_config().limits, daily_submissions=10_000))
    for task in (TASK, "small"):
        await world.open_task(task=task, config=crowded)
    for index in range(many):
        await world.submit(NODES[0], model_bytes(f"many {index}"))
    for index in range(2):
        await world.submit(NODES[1], model_bytes(f"few {index}"), task="small")
    await world.structure.check()
    # One turn draws no more than so many, in turn by task: the latest two are among them.
    assert await world.draws.draw() == at_once
    for number in (1, 2):
        drawn = await world.store.read(lambda tx, number=number: tx.submission("small", number))
        assert drawn is not None
        assert drawn.state is SubmissionState.EVALUATING
    await world.turn()
    rounds = await world.store.read(lambda tx: tx.rounds_unconcluded())
    assert {round_.state for round_ in rounds} == {RoundState.SEALING}
    # And so is what a validator hears first.
    validator = VALIDATORS[0]
    own = await world.store.read(lambda tx: tx.assignments_unended_of(validator.id))
    few = {assignment.number for assignment in own if assignment.task == "small"}
    heard: list[Assignment] = []
    async with aclosing(world.assignments.watch(validator.id, after=None)) as watched:
        async for assignment, _ in watched:
            heard.append(assignment)
            if len(heard) == 2 * len(few):
                break
    assert {assignment.number for assignment in heard if assignment.task == "small"} == few


async def test_a_watch_that_breaks_anywhere_neither_misses_nor_repeats(world: World) -> None:
    for task in (TASK, "small"):
        await world.open_task(task=task)
    for index in range(3):
        await world.submit(NODES[index], model_bytes(f"many {index}"))
    await world.submit(NODES[1], model_bytes("few"), task="small")
    await world.turn()
    validator = max(VALIDATORS[:6], key=lambda key: _drawn(world, key.id)).id
    own = {(a.task, a.number) for a in await world.store.read(lambda tx: tx.assignments_unended_of(validator))}
    assert len(own) > 1
    for cut in range(1, len(own) + 1):
        heard: list[tuple[str, int]] = []
        told: Told | None = None
        while len(heard) < len(own):
            async with aclosing(world.assignments.watch(validator, after=told)) as watched:
                taken = 0
                async for assignment, reached in watched:
                    heard.append((assignment.task, assignment.number))
                    told, taken = reached, taken + 1
                    if taken == cut or len(heard) == len(own):
                        break
        assert sorted(heard) == sorted(own), f"breaking off after each {cut}"


async def test_a_watched_ranking_is_told_once_for_each_change_of_its_places_through_breaks(world: World) -> None:
    await world.open_task()

    async def scored(node: Key, name: str, correct: int) -> None:
        number = await world.submit(node, model_bytes(name))
        await world.turn()
        await world.judge(number, correct, correct, correct)

    async def next_of(seen: str) -> Ranking:
        async with aclosing(world.leaderboard.watch(TASK, after=seen)) as rankings, asyncio.timeout(20):
            return await anext(aiter(rankings))

    empty = await next_of("")
    assert empty.places == ()
    await scored(NODES[0], "first", 600)
    one = await next_of(empty.face)
    assert [place.correct for place in one.places] == [600]
    # The task changes with each commitment, the ranking does not: a watcher that was away hears nothing of it.
    await world.commit(NODES[1], model_bytes("never revealed"))
    resumed = asyncio.ensure_future(next_of(one.face))
    await scored(NODES[2], "better", 900)
    assert [place.correct for place in (await resumed).places] == [900, 600]


def _drawn(world: World, validator: str) -> int:
    return sum(validator in draw.picks for draw in world.selection.draws.values())


# The registry's own absence


class FillingDisk:
    """A store that cannot be written to while its disk is full."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.full = False

    async def write(self, work: Callable[[Writing], Any], **options: bool) -> Any:
        if self.full:
            raise DiskFull("the disk is full", resource="database")
        return await self._store.write(work, **options)


async def test_deadlines_that_passed_while_the_registry_was_away_punish_nobody(world: World) -> None:
    number = await evaluating(world)
    unrevealed = await world.commit(NODES[1], model_bytes("later"))
    first, second, third = await world.duties(number)
    token = await world.accept(first)
    sealed = await world.evaluate(second, 900)
    await world.outages.beat()
    world.clock.advance(seconds=5 * HOUR_S)
    world = world.restarted()
    assert await world.outages.end() == timedelta(hours=5)
    await world.turn()
    assert await world.states(number) == ["ACCEPTED", "SEALED", "OFFERED"]
    assert (await world.submission(unrevealed)).state is SubmissionState.COMMITTED
    await world.upload(NODES[1], unrevealed, model_bytes("later"))
    await world.reveal(NODES[1], unrevealed, model_bytes("later"))
    reports = {first: await world.report(first, 900), second: sealed}
    await world.seal(first, reports[first], token=token)
    reports[third] = await world.evaluate(third, 900)
    await world.turn()
    # Away once more, while all are to open.
    await world.open(first, reports[first])
    await world.outages.beat()
    world.clock.advance(seconds=2 * HOUR_S)
    world = world.restarted()
    await world.outages.end()
    await world.turn()
    for duty in (second, third):
        await world.open(duty, reports[duty])
    await world.turn()
    assert (await world.submission(number)).state is SubmissionState.SCORED
    assert await faults(world) == []
    assert (await world.leaf_kinds()).count("outage_ended") == 2


async def test_deadlines_that_passed_while_nothing_could_be_written_punish_nobody(world: World) -> None:
    number = await evaluating(world)
    unrevealed = await world.commit(NODES[1], model_bytes("later"))
    await world.accept((await world.duties(number))[0])
    disk = FillingDisk(world.store)
    world.outages = Outages(cast(Store, disk), world.clock)
    await world.outages.beat()
    disk.full = True
    for _ in range(3):
        world.clock.advance(seconds=2 * HOUR_S)
        with pytest.raises(DiskFull):
            await world.outages.beat()
    disk.full = False
    await world.outages.beat()
    await world.turn()
    assert await world.states(number) == ["ACCEPTED", "OFFERED", "OFFERED"]
    assert (await world.submission(unrevealed)).state is SubmissionState.COMMITTED
    world.clock.advance(seconds=3)
    await world.outages.beat()
    assert await faults(world) == []
    assert (await world.leaf_kinds()).count("outage_ended") == 1


async def test_deadlines_that_passed_while_the_registry_slept_with_its_machine_punish_nobody(world: World) -> None:
    number = await evaluating(world)
    await world.accept((await world.duties(number))[0])
    watching = asyncio.create_task(world.outages.watch())
    await asyncio.sleep(0)
    await world.outages.beat()
    # A pause of a few seconds is none: calls were taken in.
    world.clock.advance(seconds=8)
    await world.outages.beat()
    assert "outage_ended" not in await world.leaf_kinds()
    world.clock.advance(seconds=5 * HOUR_S)
    await world.outages.beat()
    await world.turn()
    assert await world.states(number) == ["ACCEPTED", "OFFERED", "OFFERED"]
    assert await faults(world) == []
    assert (await world.leaf_kinds()).count("outage_ended") == 1
    watching.cancel()


async def test_an_outage_is_one_also_when_the_clock_was_put_back_before(world: World) -> None:
    await world.outages.beat()
    world.clock.advance(seconds=-5 * HOUR_S)
    number = await evaluating(world)
    await world.accept((await world.duties(number))[0])
    await world.outages.beat()
    world.clock.advance(seconds=2 * HOUR_S)
    world = world.restarted()
    assert await world.outages.end() == timedelta(hours=2)
    await world.turn()
    assert await world.states(number) == ["ACCEPTED", "OFFERED", "OFFERED"]
    assert await faults(world) == []


async def test_what_was_late_before_the_outage_stays_late(world: World) -> None:
    number = await evaluating(world)
    duty = (await world.duties(number))[0]
    await world.accept(duty)
    world.clock.advance(seconds=2 * MINUTE_S)
    await world.outages.beat()
    world.clock.advance(seconds=HOUR_S)
    world = world.restarted()
    await world.outages.end()
    await world.turn()
    assert (duty.participant, "LEASE_EXPIRED") in await faults(world)


async def test_a_restart_within_a_moment_moves_nothing(world: World) -> None:
    number = await evaluating(world)
    before = await world.all_duties(number)
    assert await world.outages.end() == timedelta(0)
    await world.outages.beat()
    world.clock.advance(seconds=3)
    assert await world.restarted().outages.end() == timedelta(0)
    assert await world.all_duties(number) == before
    assert "outage_ended" not in await world.leaf_kinds()


# Daily limits


async def test_the_daily_limit_holds_against_many_commits_at_once(world: World) -> None:
    await world.open_task()
    attempts = await asyncio.gather(
        *(world.commit(NODES[0], model_bytes(str(index))) for index in range(20)), return_exceptions=True
    )
    assert sorted(number for number in attempts if isinstance(number, int)) == [1, 2, 3]
    refused = [error for error in attempts if isinstance(error, ResourceExhausted)]
    assert len(refused) == 17
    assert {error.reason for error in refused} == {"DAILY_LIMIT"}


# What a turn costs


async def test_a_turn_looks_only_at_what_has_changed_or_come_due(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.open_task(config=task_config(limits=replace(task_config().limits, daily_submissions=100)))
    for index in range(20):
        await world.submit(NODES[0], model_bytes(str(index)))
    await world.turn()
    looked_at: list[int] = []
    read_states = SqlReading.assignment_states

    def counted(self: SqlReading, task: str, number: int, round_: int) -> Any:
        looked_at.append(number)
        return read_states(self, task, number, round_)

    monkeypatch.setattr(SqlReading, "assignment_states", counted)
    await world.turn()
    assert looked_at == []
    await world.accept((await world.duties(7))[0])
    looked_at.clear()
    await world.turn()
    assert set(looked_at) == {7}
    # A new process looks at everything, once.
    world = world.restarted()
    await world.turn()
    assert set(looked_at) == set(range(1, 21))
    looked_at.clear()
    await world.turn()
    assert looked_at == []


async def test_a_refused_draw_is_asked_for_less_and_less_often(world: World) -> None:
    await world.open_task(validators=2)
    await world.submit(NODES[0], model_bytes("a"))
    asked: list[str] = []
    world.selection.before = asked.append
    times = []
    for second in range(200):
        before = asked.count("draw_validators")
        await world.draws.draw() if second else await world.turn()
        if asked.count("draw_validators") > before:
            times.append(second)
        world.clock.advance(seconds=1)
    assert times == [0, 3, 9, 21, 45, 93, 153]
    # Who comes is asked for at once.
    await world.join(VALIDATORS[2], Role.VALIDATOR)
    await world.turn()
    assert (await world.submission(1)).state is SubmissionState.EVALUATING
