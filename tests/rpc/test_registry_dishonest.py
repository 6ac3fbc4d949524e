"""Fifty submissions over a real registry and a real selector, a third of the validators dishonest in their own ways."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.registry.states import RoundState, SubmissionState
from services.runtime.names import AssignmentId, parse_assignment
from tests.support.registry_arena import Arena, served
from tests.support.registry_fakes import SettableClock
from tests.support.registry_world import NODES, TASK, VALIDATORS, World, model_bytes, task_config
from tests.support.selector_server import selecting
from tiltyard.registry.v1 import evaluation_pb2
from tiltyard.type.v1 import envelope_pb2
from tiltyard.type.v1 import evaluation_pb2 as type_pb2

SUBMISSIONS, TOLERANCE, OFF = 50, 5, 400
LIARS = {
    key.id: behaviour for key, behaviour in zip(VALIDATORS, ("constant", "random", "silent", "decline"), strict=False)
}


def truth_of(number: int) -> int:
    return 400 + 10 * number


def count_of(duty: AssignmentId) -> int:
    honest = truth_of(duty.number) + int(duty.participant, 16) % (TOLERANCE + 1)
    match LIARS.get(duty.participant):
        case "constant":
            return 1000
        case "random":
            # Never by chance what is right.
            return (honest + OFF + 7 * duty.number) % 1000
        case _:
            return honest


async def work(world: World, sealed: dict[AssignmentId, envelope_pb2.EvaluationReport]) -> int:
    """What all validators do in one moment."""

    async def answer(duty: AssignmentId) -> None:
        if LIARS.get(duty.participant) == "decline":
            await world.decline(duty)
        else:
            sealed[duty] = await world.evaluate(duty, count_of(duty))

    works: list[Coroutine[Any, Any, Any]] = []
    for round_ in await world.store.read(lambda tx: tx.rounds_unconcluded()):
        works += [answer(duty) for duty in await world.duties(round_.number, "OFFERED")]
        if round_.state is RoundState.OPENING:
            asked = await world.duties(round_.number, "SEALED")
            works += [world.open(duty, sealed[duty]) for duty in asked if LIARS.get(duty.participant) != "silent"]
    await asyncio.gather(*works)
    return len(works)


async def test_dishonest_validators_change_no_score_that_honest_ones_decide_and_are_named(tmp_path: Path) -> None:
    clock = SettableClock()
    async with selecting(tmp_path, clock) as selector, served(tmp_path, clock=clock, selection=selector) as arena:
        await judge_all(arena.world)
        await check(arena.world, await faults_of(arena))


async def judge_all(world: World) -> None:
    """Submit and judge, until every round has ended."""
    limits = replace(task_config().limits, daily_submissions=SUBMISSIONS)
    await world.open_task(validators=12, config=task_config(tolerance=TOLERANCE, limits=limits))
    for index in range(SUBMISSIONS):
        await world.submit(NODES[0], model_bytes(str(index)))
    await world.turn()
    sealed: dict[AssignmentId, envelope_pb2.EvaluationReport] = {}
    while await world.store.read(lambda tx: tx.rounds_unconcluded()):
        if not await work(world, sealed):
            # Nobody does anything more: the time to open runs out.
            world.clock.advance(seconds=3600)
        await world.turn()


async def faults_of(arena: Arena) -> list[evaluation_pb2.ValidatorFault]:
    request = evaluation_pb2.ListValidatorFaultsRequest(parent=f"tasks/{TASK}", page_size=1000)
    return list((await arena.peer(NODES[0]).evaluations.ListValidatorFaults(request)).faults)


async def check(world: World, faults: Sequence[evaluation_pb2.ValidatorFault]) -> None:
    """Scores and faults are what the rules say."""
    submissions = await world.store.read(lambda tx: tx.submissions(TASK))
    decided = [s for s in submissions if honest_majority([*s.scores[1].evaluations] if s.scores else [])]
    assert len(decided) > SUBMISSIONS // 2
    named: set[tuple[int, str]] = set()
    for submission in decided:
        assert submission.state is SubmissionState.SCORED
        score = submission.scores[1]
        assert abs(score.correct - truth_of(submission.number)) <= 2 * TOLERANCE
        lying = {v for v in score.evaluations if LIARS.get(v) in ("constant", "random")}
        assert set(score.outliers) == lying
        named |= {(submission.number, validator) for validator in lying}
    by_kind: dict[str, set[tuple[int, str]]] = {}
    for fault in faults:
        kind = type_pb2.ValidatorFaultKind.Name(fault.kind).removeprefix("VALIDATOR_FAULT_KIND_")
        duty = parse_assignment(fault.assignment)
        by_kind.setdefault(kind, set()).add((duty.number, duty.participant))
    assert set(by_kind) == {"OUTLIER", "SEAL_UNOPENED"}
    assert named <= by_kind["OUTLIER"]
    assert {LIARS[validator] for _, validator in by_kind["SEAL_UNOPENED"]} == {"silent"}


def honest_majority(counted: Sequence[str]) -> bool:
    return 2 * sum(validator not in LIARS or LIARS[validator] == "silent" for validator in counted) > len(counted)
