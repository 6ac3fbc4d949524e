"""Pools over a real selector: who is eligible, who becomes a candidate, and whose groups are one."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.support.selector_arena import MINIMUM, TASK, SelectorArena, bare, refused, someone, timestamp
from tiltyard import bls
from tiltyard.selector.v1 import draw_pb2, pool_pb2, stake_pb2
from tiltyard.type.v1 import participation_pb2 as participation
from tiltyard.type.v1 import task_pb2 as task_types


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[SelectorArena]:
    started = SelectorArena(tmp_path)
    await started.start()
    yield started
    await started.stop()


def _check(role: "participation.Role.ValueType", **facts: list[str]) -> pool_pb2.CheckEligibilityRequest:
    return pool_pb2.CheckEligibilityRequest(
        participant=someone("bob"), task=TASK, role=role, facts=pool_pb2.EligibilityFacts(**facts)
    )


async def test_validators_and_training_nodes_qualify_by_stake_alone(arena: SelectorArena) -> None:
    check = arena.service.eligibility.CheckEligibility
    endorsed = [someone("endorser")]
    for role, threshold in (
        (participation.ROLE_VALIDATOR, MINIMUM),
        (participation.ROLE_TRAINING_NODE, MINIMUM // 10),
    ):
        answer = await check(_check(role, endorsers=endorsed))
        assert not answer.verdict.eligible
        assert str(threshold) in answer.verdict.explanation
        assert [fact.threshold_micros for fact in answer.verdict.evidence] == [threshold]
        assert answer.policy.validator_min_stake_micros == MINIMUM
    await arena.deposit(someone("bob"), MINIMUM)
    for role in (participation.ROLE_VALIDATOR, participation.ROLE_TRAINING_NODE):
        verdict = (await check(_check(role))).verdict
        assert verdict.eligible
        assert verdict.explanation == ""
        assert verdict.evidence[0].amount_micros == MINIMUM


@pytest.mark.parametrize(
    ("facts", "micros", "kind"),
    [
        ({}, 5 * MINIMUM, participation.EVIDENCE_KIND_STAKE),
        ({"track_record": ["tasks/a/submissions/1"]}, 0, participation.EVIDENCE_KIND_TRACK_RECORD),
        ({"endorsers": [someone("endorser")]}, 0, participation.EVIDENCE_KIND_REPUTATION),
        ({}, 5 * MINIMUM - 1, None),
    ],
)
async def test_a_task_creator_qualifies_by_any_one_fact(
    arena: SelectorArena, facts: dict[str, list[str]], micros: int, kind: int | None
) -> None:
    if micros:
        await arena.deposit(someone("bob"), micros)
    before = (await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())).next_sequence
    answer = await arena.service.eligibility.CheckEligibility(_check(participation.ROLE_TASK_CREATOR, **facts))
    assert answer.verdict.eligible == (kind is not None)
    assert [fact.kind for fact in answer.verdict.evidence if fact.sufficient] == ([] if kind is None else [kind])
    assert len(answer.verdict.evidence) == 3
    after = (await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())).next_sequence
    assert after == before


async def test_past_work_counts_in_tasks_of_other_owner_groups_alone(arena: SelectorArena) -> None:
    """The registry cannot know that a task's creator is paid for from the applicant's funding account."""
    await arena.open_pool()
    await arena.deposit(someone("creator"), 1, account="one bank")
    work = {"track_record": ["tasks/digits/submissions/1", "tasks/digits/submissions/2/evaluations/1-x"]}
    check = arena.service.eligibility.CheckEligibility
    before = (await check(_check(participation.ROLE_TASK_CREATOR, **work))).verdict
    assert before.eligible
    assert list(before.evidence[1].references) == work["track_record"]
    await arena.deposit(someone("bob"), 1, account="one bank")
    after = (await check(_check(participation.ROLE_TASK_CREATOR, **work))).verdict
    assert not after.eligible
    assert list(after.evidence[1].references) == []
    assert "another owner group's task" in after.explanation


async def test_a_pool_opens_once_and_fills_in_the_arenas_defaults(arena: SelectorArena) -> None:
    first = await arena.open_pool()
    assert first == await arena.open_pool()
    assert len(first.selector_key) == bls.PUBLIC_KEY_BYTES
    key = await arena.alice.draws.GetSelectorKey(draw_pb2.GetSelectorKeyRequest())
    assert key.public_key == first.selector_key
    policy = first.policy
    assert (policy.curve, policy.alpha_millis) == (task_types.CURVE_POWER, 500)
    assert policy.validator_min_stake_micros == MINIMUM
    assert policy.rate.reference_stake_micros == 10 * MINIMUM
    async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="POOL_EXISTS"):
        await arena.open_pool(alpha_millis=250)


@pytest.mark.parametrize(
    ("policy", "bad"),
    [
        ({"curve": 9}, "policy.curve"),
        ({"alpha_millis": 1000}, "policy.alpha_millis"),
        ({"alpha_millis": -1}, "policy.alpha_millis"),
        ({"curve": task_types.CURVE_LOG, "alpha_millis": 1}, "policy.alpha_millis"),
        ({"validator_min_stake_micros": -1}, "policy.validator_min_stake_micros"),
        ({"training_node_min_stake_micros": -1}, "policy.training_node_min_stake_micros"),
        ({"limit": -1}, "policy.rate.limit"),
    ],
)
async def test_a_bad_policy_is_refused_by_its_field(arena: SelectorArena, policy: dict[str, Any], bad: str) -> None:
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field=bad):
        await arena.open_pool(**policy)


@pytest.mark.parametrize(
    "window",
    [Duration(), Duration(seconds=1, nanos=-(10**9)), Duration(seconds=1, nanos=10**9), Duration(seconds=2**40)],
)
async def test_a_rate_window_is_a_second_or_longer(arena: SelectorArena, window: Duration) -> None:
    policy = task_types.SelectionPolicy(rate=task_types.ValidatorRate(window=window))
    request = pool_pb2.OpenPoolRequest(
        task=TASK, policy=policy, open_time=timestamp(arena.clock()), creator=someone("creator")
    )
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="policy.rate.window"):
        await arena.service.pools.OpenPool(request)


async def test_a_pool_needs_its_opening_time(arena: SelectorArena) -> None:
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="open_time"):
        await arena.service.pools.OpenPool(pool_pb2.OpenPoolRequest(task=TASK, creator=someone("creator")))


async def test_entering_a_pool_locks_the_stake_and_leaving_gives_it_back(arena: SelectorArena) -> None:
    await arena.open_pool()
    first = await arena.add_validator(arena.alice.name, 4)
    assert (first.locked_micros, first.weight, first.owner_group) == (4 * MINIMUM, 2 * 2**32, arena.alice.key.id)
    add = pool_pb2.AddCandidateRequest(task=TASK, participant=arena.alice.name, role=participation.ROLE_VALIDATOR)
    assert await arena.service.pools.AddCandidate(add) == first
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="STAKE_NOT_AVAILABLE"):
        await arena.alice.stakes.RequestWithdrawal(stake_pb2.RequestWithdrawalRequest(amount_micros=1))
    for role in (participation.ROLE_TRAINING_NODE, participation.ROLE_TASK_CREATOR):
        async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="ROLE_TAKEN"):
            await arena.service.pools.AddCandidate(
                pool_pb2.AddCandidateRequest(task=TASK, participant=arena.alice.name, role=role)
            )
    remove = pool_pb2.RemoveCandidateRequest(task=TASK, participant=arena.alice.name)
    assert (await arena.service.pools.RemoveCandidate(remove)).unlocked_micros == 4 * MINIMUM
    assert (await arena.service.pools.RemoveCandidate(remove)).unlocked_micros == 0
    stake = (await arena.alice.stakes.GetStake(stake_pb2.GetStakeRequest(name=f"stakes/{arena.alice.key.id}"))).stake
    assert (stake.available_micros, stake.locked_micros) == (4 * MINIMUM, 0)
    # It may come back in its role, with all that is available by then.
    assert (await arena.add_validator(arena.alice.name, 5)).locked_micros == 9 * MINIMUM


async def test_the_task_creator_takes_no_second_role(arena: SelectorArena) -> None:
    await arena.open_pool()
    await arena.deposit(someone("creator"), MINIMUM)
    async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="ROLE_TAKEN"):
        await arena.add_validator(someone("creator"))


async def test_a_refused_candidate_changes_nothing(arena: SelectorArena) -> None:
    await arena.open_pool()
    await arena.deposit(someone("poor"), MINIMUM - 1)
    before = await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())
    answer = await arena.service.pools.AddCandidate(
        pool_pb2.AddCandidateRequest(
            task=TASK, participant=someone("poor"), role=participation.ROLE_VALIDATOR, owner=someone("owner")
        )
    )
    assert not answer.verdict.eligible
    assert (answer.locked_micros, answer.weight, answer.owner_group) == (0, 0, bare(someone("poor")))
    assert before == await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())


async def test_a_training_node_locks_the_minimum_and_weighs_nothing(arena: SelectorArena) -> None:
    await arena.open_pool()
    await arena.deposit(someone("node"), MINIMUM)
    answer = await arena.service.pools.AddCandidate(
        pool_pb2.AddCandidateRequest(task=TASK, participant=someone("node"), role=participation.ROLE_TRAINING_NODE)
    )
    assert (answer.locked_micros, answer.weight) == (MINIMUM // 10, 0)


async def test_a_closed_pool_gives_all_stakes_back_and_ends_its_draws(arena: SelectorArena) -> None:
    await arena.open_pool()
    for name in "abcd":
        await arena.add_validator(someone(name))
    receipt = await arena.draw()
    close = pool_pb2.ClosePoolRequest(task=TASK)
    await arena.service.pools.ClosePool(close)
    await arena.service.pools.ClosePool(close)
    stakes = (await arena.alice.stakes.ListStakes(stake_pb2.ListStakesRequest())).stakes
    assert [(stake.available_micros, stake.locked_micros) for stake in stakes] == [(MINIMUM, 0)] * 4
    assert await arena.draw() == receipt
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="POOL_CLOSED"):
        await arena.draw(2)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="POOL_CLOSED"):
        await arena.service.draws.ExtendDraw(draw_pb2.ExtendDrawRequest(draw=receipt.draw, picks=4))
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="POOL_CLOSED"):
        await arena.add_validator(someone("late"))
    odds = draw_pb2.EstimateOddsRequest(task=TASK, validators=1, participant=someone("a"))
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="POOL_CLOSED"):
        await arena.alice.draws.EstimateOdds(odds)


async def test_an_unknown_pool_is_not_found(arena: SelectorArena) -> None:
    for call in (
        lambda: arena.draw(),
        lambda: arena.add_validator(someone("a")),
        lambda: arena.service.pools.ClosePool(pool_pb2.ClosePoolRequest(task=TASK)),
        lambda: arena.service.pools.RemoveCandidate(
            pool_pb2.RemoveCandidateRequest(task=TASK, participant=someone("a"))
        ),
        lambda: arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1)),
    ):
        async with refused(grpc.StatusCode.NOT_FOUND, reason="POOL_NOT_FOUND"):
            await call()
