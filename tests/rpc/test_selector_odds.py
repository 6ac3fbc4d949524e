"""Odds over a real selector: exact in small pools, estimated in large ones."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from tests.support.selector_arena import MINIMUM, TASK, SelectorArena, refused, someone
from tiltyard.selector.v1 import draw_pb2


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[SelectorArena]:
    started = SelectorArena(tmp_path)
    await started.start()
    yield started
    await started.stop()


async def test_odds_are_exact_in_a_small_pool(arena: SelectorArena) -> None:
    await arena.open_pool()
    await arena.add_validator(arena.alice.name, 4)
    for name in "bc":
        await arena.add_validator(someone(name))
    odds = await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=2))
    assert (odds.weight, odds.pool_weight) == (2 * 2**32, str(4 * 2**32))
    # 1 minus the chance that the two others come first: 2 * 1/4 * 1/3.
    assert odds.probability == pytest.approx(1 - 2 * (1 / 4) * (1 / 3))
    assert odds.standard_error == 0
    of_another = draw_pb2.EstimateOddsRequest(task=TASK, validators=3, participant=someone("b"))
    assert (await arena.alice.draws.EstimateOdds(of_another)).probability == 1
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="validators"):
        await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK))


async def test_a_stake_of_very_many_minimums_has_a_best_split(arena: SelectorArena) -> None:
    await arena.open_pool(validator_min_stake_micros=1)
    await arena.add_validator(arena.alice.name, 2**40 // MINIMUM)
    odds = await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1))
    assert odds.best_split == 2**40 // MINIMUM * MINIMUM


async def test_odds_know_that_the_creators_owner_group_is_never_drawn(arena: SelectorArena) -> None:
    await arena.open_pool()
    await arena.add_validator(arena.alice.name, 4)
    for name in "bc":
        await arena.add_validator(someone(name))

    async def chance(participant: str, validators: int) -> float:
        request = draw_pb2.EstimateOddsRequest(task=TASK, validators=validators, participant=participant)
        return (await arena.alice.draws.EstimateOdds(request)).probability

    assert await chance(someone("b"), 3) == 1
    await arena.deposit(someone("creator"), 1, account=f"account of {someone('c')}")
    assert await chance(someone("c"), 1) == 0
    assert await chance(someone("b"), 1) == pytest.approx(1 / 3)
    assert await chance(someone("b"), 3) == 0
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="NOT_ENOUGH_VALIDATORS"):
        await arena.draw(validators=3)
