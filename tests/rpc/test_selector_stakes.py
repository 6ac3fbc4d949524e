"""Stakes over a real selector: deposits, bonds, slashes and their ledger, and which roles may call what."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.runtime.channels import open_peer
from services.selector.stakes import MAX_UNBONDINGS
from tests.support.selector_arena import (
    MINIMUM,
    TASK,
    Peer,
    SelectorArena,
    bare,
    refused,
    someone,
)
from tiltyard.selector.v1 import draw_pb2, pool_pb2, stake_pb2, stake_pb2_grpc
from tiltyard.sortition import SQUARE_ROOT, weight
from tiltyard.type.v1 import stake_pb2 as stake_types


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[SelectorArena]:
    started = SelectorArena(tmp_path)
    await started.start()
    yield started
    await started.stop()


async def test_a_deposit_becomes_available_and_is_counted_once_for_each_reference(arena: SelectorArena) -> None:
    request = stake_pb2.DepositRequest(
        participant=arena.alice.name, amount_micros=5, reference="r", funding_account="bank"
    )
    first = await arena.operator.stakes.Deposit(request)
    again = await arena.operator.stakes.Deposit(request)
    assert first.stake.available_micros == again.stake.available_micros == 5
    assert first.stake.name == f"stakes/{arena.alice.key.id}"
    for change in ({"amount_micros": 6}, {"participant": someone("bob")}, {"funding_account": "other"}):
        changed = stake_pb2.DepositRequest()
        changed.CopyFrom(request)
        changed.MergeFrom(stake_pb2.DepositRequest(**change))
        async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="REFERENCE_REUSED"):
            await arena.operator.stakes.Deposit(changed)
    events = (await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())).events
    assert [(event.kind, event.amount_micros) for event in events] == [(stake_types.LEDGER_EVENT_KIND_DEPOSITED, 5)]
    assert (events[0].reference, events[0].funding_account) == ("r", "bank")


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({"amount_micros": 0}, "amount_micros"),
        ({"amount_micros": -1}, "amount_micros"),
        ({"amount_micros": -(2**63)}, "amount_micros"),
        ({"participant": ""}, "participant"),
        ({"participant": "participants/XYZ"}, "participant"),
        ({"reference": ""}, "reference"),
        ({"reference": "r" * 201}, "reference"),
        ({"funding_account": ""}, "funding_account"),
        ({"funding_account": "a\nb"}, "funding_account"),
        ({"funding_account": "bank "}, "funding_account"),
        ({"funding_account": "Zoe\u0308"}, "funding_account"),
        ({"reference": "\u00a0r"}, "reference"),
        ({"request_id": "r" * 65}, "request_id"),
    ],
)
async def test_a_bad_deposit_is_refused_by_its_field(arena: SelectorArena, change: dict[str, Any], bad: str) -> None:
    fields = {"participant": someone("bob"), "amount_micros": 1, "reference": "r", "funding_account": "a"} | change
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field=bad):
        await arena.operator.stakes.Deposit(stake_pb2.DepositRequest(**fields))
    stake = (await arena.alice.stakes.GetStake(stake_pb2.GetStakeRequest(name=f"stakes/{bare(someone('bob'))}"))).stake
    assert stake.available_micros == 0


async def test_all_deposits_together_stay_below_two_to_the_63(arena: SelectorArena) -> None:
    await arena.deposit(someone("rich"), 2**63 - 2)
    async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="LEDGER_FULL") as metadata:
        await arena.deposit(someone("richer"), 2)
    assert metadata["free_micros"] == "1"
    assert (await arena.deposit(someone("richer"), 1)).available_micros == 1


async def test_a_withdrawal_waits(arena: SelectorArena) -> None:
    await arena.deposit(arena.alice.name, 10)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="NOTHING_UNBONDING"):
        await arena.alice.stakes.Withdraw(stake_pb2.WithdrawRequest())
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="STAKE_NOT_AVAILABLE") as metadata:
        await arena.alice.stakes.RequestWithdrawal(stake_pb2.RequestWithdrawalRequest(amount_micros=11))
    assert metadata["available_micros"] == "10"
    requested = await arena.alice.stakes.RequestWithdrawal(stake_pb2.RequestWithdrawalRequest(amount_micros=4))
    assert (requested.stake.available_micros, requested.stake.unbonding_micros) == (6, 4)
    assert requested.wait.seconds == 3600
    release_time = requested.stake.unbondings[0].release_time.ToDatetime(tzinfo=UTC)
    assert release_time == arena.clock() + timedelta(hours=1)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="STILL_UNBONDING") as metadata:
        await arena.alice.stakes.Withdraw(stake_pb2.WithdrawRequest())
    assert datetime.fromisoformat(metadata["release_time"]) == release_time
    arena.clock.now = release_time
    withdrawn = await arena.alice.stakes.Withdraw(stake_pb2.WithdrawRequest())
    assert (withdrawn.withdrawn_micros, withdrawn.stake.unbonding_micros) == (4, 0)
    assert withdrawn.stake.available_micros == 6


async def test_no_more_amounts_wait_than_fit_in_an_answer(arena: SelectorArena) -> None:
    await arena.deposit(arena.alice.name, MAX_UNBONDINGS + 1)
    one = stake_pb2.RequestWithdrawalRequest(amount_micros=1)
    for _ in range(MAX_UNBONDINGS):
        requested = await arena.alice.stakes.RequestWithdrawal(one)
    assert len(requested.stake.unbondings) == MAX_UNBONDINGS
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="TOO_MANY_UNBONDING") as metadata:
        await arena.alice.stakes.RequestWithdrawal(one)
    arena.clock.now = datetime.fromisoformat(metadata["release_time"])
    assert (await arena.alice.stakes.Withdraw(stake_pb2.WithdrawRequest())).withdrawn_micros == MAX_UNBONDINGS
    assert (await arena.alice.stakes.RequestWithdrawal(one)).stake.unbonding_micros == 1


@pytest.mark.parametrize("amount", [0, -5])
async def test_nothing_and_less_cannot_be_asked_back(arena: SelectorArena, amount: int) -> None:
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="amount_micros"):
        await arena.alice.stakes.RequestWithdrawal(stake_pb2.RequestWithdrawalRequest(amount_micros=amount))


async def test_a_request_id_answers_once_and_refuses_another_body(arena: SelectorArena) -> None:
    await arena.deposit(arena.alice.name, 10)
    request = stake_pb2.RequestWithdrawalRequest(amount_micros=3, request_id="once")
    first, second = await asyncio.gather(*(arena.alice.stakes.RequestWithdrawal(request) for _ in range(2)))
    assert first == second
    assert first.stake.unbonding_micros == 3
    async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="REQUEST_ID_REUSED"):
        await arena.alice.stakes.RequestWithdrawal(
            stake_pb2.RequestWithdrawalRequest(amount_micros=4, request_id="once")
        )


async def test_slashing_takes_available_then_locked_then_unbonding_stake_and_never_more(arena: SelectorArena) -> None:
    await arena.open_pool()
    validator = arena.alice.name
    await arena.add_validator(validator, 4)
    await arena.deposit(validator, 50)
    await arena.alice.stakes.RequestWithdrawal(stake_pb2.RequestWithdrawalRequest(amount_micros=20))

    async def slash(fault: int, evidence: str) -> stake_pb2.SlashResponse:
        return await arena.service.stakes.Slash(
            stake_pb2.SlashRequest(participant=validator, fault=fault, evidence=evidence)
        )

    outside = stake_types.STAKE_FAULT_REPORT_OUTSIDE_TOLERANCE
    first = await slash(outside, "tasks/digits/submissions/1/evaluations/1-x")
    cost = -(-(4 * MINIMUM + 50) * 50 // 1000)
    assert first.slashed_micros == cost
    stake = first.stake
    locked = 4 * MINIMUM - (cost - 30)
    assert (stake.available_micros, stake.locked_micros, stake.unbonding_micros) == (0, locked, 20)
    assert await slash(outside, "tasks/digits/submissions/1/evaluations/1-x") == first
    async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="EVIDENCE_REUSED"):
        await slash(stake_types.STAKE_FAULT_CONTRADICTION, "tasks/digits/submissions/1/evaluations/1-x")
    odds = await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1))
    assert odds.weight == weight(locked, minimum_micros=MINIMUM, curve=SQUARE_ROOT)
    assert (odds.best_split, odds.split_gain) == (3, pytest.approx(3**0.5))
    second = await slash(stake_types.STAKE_FAULT_CONTRADICTION, "fault 2")
    assert second.slashed_micros == locked + 20
    stake = second.stake
    assert (stake.available_micros, stake.locked_micros, stake.unbonding_micros) == (0, 0, 0)
    assert stake.slashed_micros == 4 * MINIMUM + 50
    async with refused(grpc.StatusCode.NOT_FOUND, reason="NOT_A_VALIDATOR"):
        await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1))
    assert (await slash(outside, "fault 3")).slashed_micros == 0
    events = (await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())).events
    slashed = [event for event in events if event.kind == stake_types.LEDGER_EVENT_KIND_SLASHED]
    assert [(event.fault, event.reference, event.amount_micros) for event in slashed] == [
        (outside, "tasks/digits/submissions/1/evaluations/1-x", cost),
        (stake_types.STAKE_FAULT_CONTRADICTION, "fault 2", locked + 20),
    ]


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({"fault": 0}, "fault"),
        ({"fault": 99}, "fault"),
        ({"evidence": ""}, "evidence"),
        ({"participant": "x"}, "participant"),
    ],
)
async def test_a_bad_slash_is_refused_by_its_field(arena: SelectorArena, change: dict[str, Any], bad: str) -> None:
    fields = {"participant": someone("bob"), "fault": stake_types.STAKE_FAULT_CONTRADICTION, "evidence": "e"} | change
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field=bad):
        await arena.service.stakes.Slash(stake_pb2.SlashRequest(**fields))


async def test_stakes_are_listed_page_by_page(arena: SelectorArena) -> None:
    owners = sorted(someone(str(number)) for number in range(5))
    for owner in owners:
        await arena.deposit(owner, 1)
    listed, token = [], ""
    for size in (2, 2, 1):
        page = await arena.alice.stakes.ListStakes(stake_pb2.ListStakesRequest(page_size=2, page_token=token))
        assert len(page.stakes) == size
        listed += [stake.name for stake in page.stakes]
        token = page.next_page_token
    assert token == ""
    assert listed == [f"stakes/{bare(owner)}" for owner in owners]
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="page_token"):
        await arena.alice.stakes.ListStakes(stake_pb2.ListStakesRequest(page_token="AAAA" * 10))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="page_size"):
        await arena.alice.stakes.ListStakes(stake_pb2.ListStakesRequest(page_size=-1))


async def test_events_come_in_order_without_gaps_and_none_from_the_future(arena: SelectorArena) -> None:
    request = stake_pb2.ListLedgerEventsRequest
    empty = await arena.alice.stakes.ListLedgerEvents(request())
    assert (len(empty.events), empty.next_sequence) == (0, 1)
    await arena.open_pool()
    for number in range(4):
        await arena.add_validator(someone(str(number)))
    await arena.draw(validators=2)
    seen: list[int] = []
    start = 0
    while True:
        page = await arena.alice.stakes.ListLedgerEvents(request(start_sequence=start, page_size=3))
        if not page.events:
            break
        seen += [event.sequence for event in page.events]
        start = page.next_sequence
    assert seen == list(range(1, len(seen) + 1))
    # One opening, three events for each validator, two charges.
    assert len(seen) == 1 + 4 * 3 + 2
    assert start == len(seen) + 1
    async with refused(grpc.StatusCode.OUT_OF_RANGE, reason="CURSOR_FROM_THE_FUTURE") as metadata:
        await arena.alice.stakes.ListLedgerEvents(request(start_sequence=start + 1))
    assert metadata["next_sequence"] == str(start)
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="start_sequence"):
        await arena.alice.stakes.ListLedgerEvents(request(start_sequence=-1))


def _calls(peer: Peer) -> dict[str, Any]:
    return {
        "Deposit": lambda: peer.stakes.Deposit(stake_pb2.DepositRequest()),
        "Slash": lambda: peer.stakes.Slash(stake_pb2.SlashRequest()),
        "CheckEligibility": lambda: peer.eligibility.CheckEligibility(pool_pb2.CheckEligibilityRequest()),
        "OpenPool": lambda: peer.pools.OpenPool(pool_pb2.OpenPoolRequest()),
        "AddCandidate": lambda: peer.pools.AddCandidate(pool_pb2.AddCandidateRequest()),
        "RemoveCandidate": lambda: peer.pools.RemoveCandidate(pool_pb2.RemoveCandidateRequest()),
        "ClosePool": lambda: peer.pools.ClosePool(pool_pb2.ClosePoolRequest()),
        "MergeOwnerGroups": lambda: peer.pools.MergeOwnerGroups(pool_pb2.MergeOwnerGroupsRequest()),
        "DrawValidators": lambda: peer.draws.DrawValidators(draw_pb2.DrawValidatorsRequest()),
        "ExtendDraw": lambda: peer.draws.ExtendDraw(draw_pb2.ExtendDrawRequest()),
        "SettleAssignment": lambda: peer.draws.SettleAssignment(draw_pb2.SettleAssignmentRequest()),
    }


async def test_what_a_participant_may_not_call(arena: SelectorArena) -> None:
    for name, call in _calls(arena.alice).items():
        async with refused(grpc.StatusCode.PERMISSION_DENIED) as metadata:
            await call()
        assert metadata["method"].endswith(f"/{name}")


async def test_deposits_are_the_operators_and_the_rest_is_for_services(arena: SelectorArena) -> None:
    operator, service = _calls(arena.operator), _calls(arena.service)
    for name in operator:
        allowed, denied = (operator, service) if name == "Deposit" else (service, operator)
        async with refused(grpc.StatusCode.PERMISSION_DENIED):
            await denied[name]()
        async with refused(grpc.StatusCode.INVALID_ARGUMENT):
            await allowed[name]()


async def test_nothing_works_without_a_token_for_the_selector(arena: SelectorArena) -> None:
    async with grpc.aio.insecure_channel(arena.server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stake_pb2_grpc.StakeServiceStub(channel).ListStakes(stake_pb2.ListStakesRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    async with open_peer(arena.server.address, key=arena.alice.key, audience="tiltyard.local/registry") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stake_pb2_grpc.StakeServiceStub(channel).ListStakes(stake_pb2.ListStakesRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
