"""Draws over a real selector: receipts, passed-over places, further picks, quotas, restarts, commands."""

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from typer.testing import CliRunner

from services.runtime.errors import FailedPrecondition
from services.selector import draws
from tests.support.selector_arena import (
    MINIMUM,
    TASK,
    SelectorArena,
    bare,
    check_receipt,
    refused,
    someone,
    timestamp,
)
from tiltyard.cli.commands import app
from tiltyard.selector.v1 import draw_pb2, pool_pb2, stake_pb2
from tiltyard.type.v1 import draw_pb2 as draw_types
from tiltyard.type.v1 import stake_pb2 as stake_types
from tiltyard.type.v1 import task_pb2 as task_types


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[SelectorArena]:
    started = SelectorArena(tmp_path)
    await started.start()
    yield started
    await started.stop()


async def test_a_draw_can_be_checked_by_its_receipt_alone(arena: SelectorArena) -> None:
    key = (await arena.open_pool()).selector_key
    for number in range(12):
        await arena.add_validator(someone(str(number)), 1 + number)
    receipt = await arena.draw(paused=[someone("3")])
    assert len({pick.participant for pick in receipt.picks}) == 3
    assert receipt.assigned == 3
    assert (receipt.task, receipt.pool_size) == (TASK, 12)
    check_receipt(receipt, key)
    assert await arena.draw() == receipt
    assert (await arena.alice.draws.GetDraw(draw_pb2.GetDrawRequest(name=receipt.draw))).receipt == receipt
    for change in ({"anchor": b"a" * 32}, {"reveal_salt": b"t" * 32}, {"validators": 2}):
        async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="DRAW_EXISTS"):
            await arena.draw(**change)
    second_round = await arena.draw(round=2)
    assert second_round.draw != receipt.draw


async def test_reserves_come_from_the_same_order_whatever_happens_to_the_pool(arena: SelectorArena) -> None:
    key = (await arena.open_pool()).selector_key
    for number in range(9):
        await arena.add_validator(someone(str(number)), 1 + number)
    receipt = await arena.draw()
    twin = await arena.draw(2, anchor=receipt.anchor)
    assert [pick.participant for pick in twin.picks] == [pick.participant for pick in receipt.picks]
    extend = arena.service.draws.ExtendDraw
    undisturbed = (await extend(draw_pb2.ExtendDrawRequest(draw=twin.draw, picks=9))).receipt
    check_receipt(undisturbed, key)
    assert len({pick.participant for pick in undisturbed.picks}) == 9
    order = [pick.participant for pick in undisturbed.picks]
    gone, paused = order[4], order[5]
    await arena.service.pools.RemoveCandidate(pool_pb2.RemoveCandidateRequest(task=TASK, participant=gone))
    await arena.add_validator(someone("newcomer"), 1000)
    request = draw_pb2.ExtendDrawRequest(draw=receipt.draw, picks=6, paused=[paused])
    extended = (await extend(request)).receipt
    check_receipt(extended, key)
    assert [pick.participant for pick in extended.picks] == [*order[:4], *order[6:8]]
    reasons = [(passed.place, passed.reason) for passed in extended.passed_over]
    assert reasons == [
        (4, draw_types.PASSED_OVER_REASON_LEFT),
        (5, draw_types.PASSED_OVER_REASON_PAUSED),
    ]
    assert (await extend(request)).receipt == extended
    assert extended.picks[:3] == receipt.picks
    rest = (await extend(draw_pb2.ExtendDrawRequest(draw=receipt.draw, picks=100))).receipt
    assert [pick.participant for pick in rest.picks] == [*order[:4], *order[6:]]
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="ORDER_EXHAUSTED"):
        await extend(draw_pb2.ExtendDrawRequest(draw=receipt.draw, picks=100))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="picks"):
        await extend(draw_pb2.ExtendDrawRequest(draw=receipt.draw, picks=2000))


async def test_too_few_validators_are_refused_with_the_counts(arena: SelectorArena) -> None:
    await arena.open_pool(limit=1)
    await arena.add_validator(someone("submitter"))
    await arena.add_validator(someone("of the creator"), owner=someone("creator"))
    for name in ("a", "b", "c", "d"):
        await arena.add_validator(someone(name))
    await arena.draw(1, validators=1, paused=[someone(name) for name in "bcd"])
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="NOT_ENOUGH_VALIDATORS") as metadata:
        await arena.draw(2, paused=[someone("b"), someone("c")])
    assert {name: value for name, value in metadata.items() if name != "refill_time"} == {
        "eligible": "1",
        "wanted": "3",
        "submitter": "1",
        "task_creator": "1",
        "paused": "2",
        "quota": "1",
    }
    assert datetime.fromisoformat(metadata["refill_time"]) == arena.clock() + timedelta(hours=1)
    # A refused draw has charged nobody.
    assert len((await arena.draw(2, validators=2, paused=[someone("b")])).picks) == 2


async def test_a_pool_is_looked_through_beside_the_writer_before_a_draw_of_few_is_refused(
    arena: SelectorArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, go_on = asyncio.Event(), threading.Event()
    loop, at_version = asyncio.get_running_loop(), draws.at_version

    def slowly(*arguments: Any) -> Any:
        loop.call_soon_threadsafe(looking.set)
        go_on.wait()
        return at_version(*arguments)

    monkeypatch.setattr(draws, "MOST_PLACES_AT_ONCE", 3)
    monkeypatch.setattr(draws, "at_version", slowly)
    await arena.open_pool()
    for name in "abcdefghij":
        await arena.add_validator(someone(name))
    drawing = asyncio.create_task(arena.draw(paused=[someone(name) for name in "abcdefgh"]))
    try:
        async with asyncio.timeout(60):
            await looking.wait()
            await arena.deposit(someone("others"), MINIMUM)
            assert not drawing.done()
    finally:
        go_on.set()
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="NOT_ENOUGH_VALIDATORS") as metadata:
        await drawing
    assert metadata == {"eligible": "2", "wanted": "3", "paused": "8"}


async def test_a_draw_is_the_same_wherever_it_was_looked_through(
    arena: SelectorArena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    other = SelectorArena(tmp_path / "other")
    await other.start()
    try:
        receipts = []
        for each, most_places in ((arena, 3), (other, 1024)):
            monkeypatch.setattr(draws, "MOST_PLACES_AT_ONCE", most_places)
            await each.open_pool()
            for name in "abcdefghij":
                await each.add_validator(someone(name))
            receipt = await each.draw(paused=[someone(name) for name in "abcdefg"])
            # Who signs and when is each one's own.
            receipts.append((receipt.seed, list(receipt.picks), list(receipt.passed_over)))
        assert receipts[0] == receipts[1]
        assert len(receipts[0][1]) == 3
        assert len(receipts[0][2]) > 3
    finally:
        await other.stop()


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({"submission": TASK}, "submission"),
        ({"round": 0}, "round"),
        ({"round": 3}, "round"),
        ({"anchor": b"short"}, "anchor"),
        ({"reveal_salt": b""}, "reveal_salt"),
        ({"validators": 0}, "validators"),
        ({"validators": 100}, "validators"),
        ({"submitter": ""}, "submitter"),
        ({"paused": [someone("a"), "b"]}, "paused[1]"),
    ],
)
async def test_a_bad_draw_is_refused_by_its_field(arena: SelectorArena, change: dict[str, Any], bad: str) -> None:
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field=bad):
        await arena.draw(**change)


async def test_an_unknown_draw_is_not_found(arena: SelectorArena) -> None:
    settle = draw_pb2.SettleAssignmentRequest(
        draw="draws/none", participant=someone("a"), settlement=draw_pb2.SETTLEMENT_CHARGED
    )
    for call in (
        lambda: arena.alice.draws.GetDraw(draw_pb2.GetDrawRequest(name="draws/none")),
        lambda: arena.service.draws.ExtendDraw(draw_pb2.ExtendDrawRequest(draw="draws/none", picks=1)),
        lambda: arena.service.draws.SettleAssignment(settle),
    ):
        async with refused(grpc.StatusCode.NOT_FOUND, reason="DRAW_NOT_FOUND"):
            await call()


async def test_an_owner_group_is_picked_once_and_by_one_of_its_members(arena: SelectorArena) -> None:
    await arena.open_pool()
    for name in "abc":
        await arena.add_validator(someone(name), account="the same bank")
    for name in "de":
        await arena.add_validator(someone(name), owner=someone("landlord"))
    await arena.add_validator(someone("f"))
    bank = min(bare(someone(name)) for name in "abc")
    picked = set()
    for number in range(1, 30):
        receipt = await arena.draw(number)
        groups = [pick.owner_group for pick in receipt.picks]
        assert len(set(groups)) == 3
        pick = receipt.picks[groups.index(bank)]
        assert list(pick.members) == sorted(someone(name) for name in "abc")
        picked.add(pick.participant)
    assert picked == {someone(name) for name in "abc"}


async def test_groups_that_become_one_in_an_open_pool_are_drawn_as_one(arena: SelectorArena) -> None:
    key = (await arena.open_pool()).selector_key
    names = sorted(someone(name) for name in "abcd")
    for name in names:
        await arena.add_validator(name)
    before = await arena.draw(1, validators=1, paused=names[1:])
    assert [pick.participant for pick in before.picks] == [names[0]]
    await arena.deposit(names[3], 1, account=f"account of {names[0]}")
    stake = (await arena.alice.stakes.GetStake(stake_pb2.GetStakeRequest(name=f"stakes/{bare(names[3])}"))).stake
    assert stake.owner_group == bare(names[0])
    receipt = await arena.draw(2)
    check_receipt(receipt, key)
    joined = next(pick for pick in receipt.picks if pick.owner_group == bare(names[0]))
    assert list(joined.members) == [names[0], names[3]]
    assert int.from_bytes(joined.group_weight, "big") == int(2**32 * 2**0.5)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="NOT_ENOUGH_VALIDATORS"):
        await arena.draw(3, validators=4)
    # The older draw goes on over the older pool, in which they were two.
    extended = await arena.service.draws.ExtendDraw(draw_pb2.ExtendDrawRequest(draw=before.draw, picks=4))
    check_receipt(extended.receipt, key)
    places = [*extended.receipt.picks, *extended.receipt.passed_over]
    assert {place.owner_group for place in places} == {bare(name) for name in names}
    assert [passed.reason for passed in extended.receipt.passed_over if passed.owner_group == bare(names[3])] in (
        [draw_types.PASSED_OVER_REASON_ALREADY_PICKED],
        [draw_types.PASSED_OVER_REASON_PAUSED],
    )


async def test_an_owner_that_signs_for_members_makes_them_one_in_pools_they_are_in(arena: SelectorArena) -> None:
    key = (await arena.open_pool()).selector_key
    for name in "abcde":
        await arena.add_validator(someone(name))
    merge = arena.service.pools.MergeOwnerGroups
    merged = ""
    for name in "ab":
        request = pool_pb2.MergeOwnerGroupsRequest(participant=someone(name), owner=someone("landlord"))
        merged = (await merge(request)).owner_group
        assert (await merge(request)).owner_group == merged
    assert merged == min(bare(someone(name)) for name in ("a", "b", "landlord"))
    # An owner of the creator's is no validator of its task, whoever signed for whom.
    await merge(pool_pb2.MergeOwnerGroupsRequest(participant=someone("creator"), owner=someone("c")))
    receipt = await arena.draw()
    check_receipt(receipt, key)
    assert sorted(pick.owner_group for pick in receipt.picks) == sorted(
        [merged, bare(someone("d")), bare(someone("e"))]
    )
    pick = next(pick for pick in receipt.picks if pick.owner_group == merged)
    assert list(pick.members) == sorted([someone("a"), someone("b")])
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="NOT_ENOUGH_VALIDATORS") as metadata:
        await arena.draw(2, validators=4)
    assert (metadata["eligible"], metadata["task_creator"]) == ("3", "1")
    events = (await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())).events
    assert [
        (event.participant, event.reference)
        for event in events
        if event.kind == stake_types.LEDGER_EVENT_KIND_OWNER_GROUPS_MERGED
    ] == [
        (someone("a"), someone("landlord")),
        (someone("b"), someone("landlord")),
        (someone("creator"), someone("c")),
    ]
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="owner"):
        await merge(pool_pb2.MergeOwnerGroupsRequest(participant=someone("a"), owner=someone("a")))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="participant"):
        await merge(pool_pb2.MergeOwnerGroupsRequest(owner=someone("a")))


async def test_a_reference_stake_that_weighs_nothing_gives_every_group_the_whole_limit(arena: SelectorArena) -> None:
    """The creator chooses the least stake, and may choose a reference stake far below it."""
    rate = task_types.ValidatorRate(limit=7, window=Duration(seconds=3600), reference_stake_micros=1)
    policy = task_types.SelectionPolicy(curve=task_types.CURVE_LOG, validator_min_stake_micros=2**40, rate=rate)
    await arena.service.pools.OpenPool(
        pool_pb2.OpenPoolRequest(
            task=TASK, policy=policy, open_time=timestamp(arena.clock()), creator=someone("creator")
        )
    )
    await arena.add_validator(arena.alice.name, 2**40 // MINIMUM + 1)
    assert len((await arena.draw(validators=1)).picks) == 1
    odds = await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1))
    assert (odds.quota_used, odds.quota_limit) == (1, 7)


async def test_a_quota_is_used_up_refunded_and_refilled(arena: SelectorArena) -> None:
    await arena.open_pool(limit=2)
    await arena.add_validator(arena.alice.name, 10)

    async def settle(receipt: draw_types.DrawReceipt, settlement: "draw_pb2.Settlement.ValueType") -> int:
        request = draw_pb2.SettleAssignmentRequest(
            draw=receipt.draw, participant=arena.alice.name, settlement=settlement
        )
        return (await arena.service.draws.SettleAssignment(request)).used

    first, second = [await arena.draw(number, validators=1) for number in (1, 2)]
    odds = await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1))
    assert (odds.quota_used, odds.quota_limit) == (2, 2)
    assert odds.refill_time.ToDatetime(tzinfo=UTC) == arena.clock() + timedelta(hours=1)
    arena.clock.now += timedelta(minutes=10, milliseconds=250)
    async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUOTA_USED_UP") as metadata:
        await arena.draw(3, validators=1)
    assert (metadata["quota"], metadata["eligible"], metadata["retry after"]) == ("1", "0", "2999.750s")
    assert await settle(first, draw_pb2.SETTLEMENT_CHARGED) == 2
    assert await settle(second, draw_pb2.SETTLEMENT_REFUNDED) == 1
    assert await settle(second, draw_pb2.SETTLEMENT_REFUNDED) == 1
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="ALREADY_SETTLED"):
        await settle(second, draw_pb2.SETTLEMENT_CHARGED)
    await arena.draw(3, validators=1)
    async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUOTA_USED_UP"):
        await arena.draw(4, validators=1)
    async with refused(grpc.StatusCode.NOT_FOUND, reason="PICK_NOT_FOUND"):
        await arena.service.draws.SettleAssignment(
            draw_pb2.SettleAssignmentRequest(
                draw=first.draw, participant=someone("x"), settlement=draw_pb2.SETTLEMENT_CHARGED
            )
        )
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="settlement"):
        await settle(first, draw_pb2.SETTLEMENT_UNSPECIFIED)
    arena.clock.now += timedelta(seconds=2999, milliseconds=749)
    async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUOTA_USED_UP") as metadata:
        await arena.draw(4, validators=1)
    assert metadata["retry after"] == "0.001s"
    arena.clock.now += timedelta(milliseconds=1)
    await arena.draw(4, validators=1)


async def test_a_thousand_concurrent_draws_never_overshoot_a_quota_by_one(arena: SelectorArena) -> None:
    await arena.open_pool(limit=150)
    for number in range(6):
        await arena.add_validator(someone(str(number)), 10, account="one bank" if number < 2 else "")

    codes: set[grpc.StatusCode] = set()

    async def attempt(number: int) -> draw_types.DrawReceipt | None:
        try:
            return await arena.draw(number, validators=1)
        except grpc.aio.AioRpcError as error:
            codes.add(error.code())
            return None

    receipts = [receipt for receipt in await asyncio.gather(*map(attempt, range(1, 1001))) if receipt]
    uses: dict[str, int] = {}
    for receipt in receipts:
        group = receipt.picks[0].owner_group
        uses[group] = uses.get(group, 0) + 1
    assert uses == dict.fromkeys(uses, 150)
    assert len(uses) == 5
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}


async def test_a_restart_in_the_middle_of_draws_keeps_them_and_goes_on(tmp_path: Path) -> None:
    arena = SelectorArena(tmp_path)
    await arena.start()
    key = (await arena.open_pool()).selector_key
    for number in range(20):
        await arena.add_validator(someone(str(number)), 1 + number)
    before = [await arena.draw(number) for number in range(1, 11)]
    await arena.stop()
    await arena.start()
    try:
        assert (await arena.open_pool()).selector_key == key
        assert [await arena.draw(number) for number in range(1, 11)] == before
        after = await arena.draw(11)
        check_receipt(after, key)
        assert after.pool_root == before[0].pool_root
        extended = await arena.service.draws.ExtendDraw(draw_pb2.ExtendDrawRequest(draw=before[0].draw, picks=5))
        check_receipt(extended.receipt, key)
        assert extended.receipt.picks[:3] == before[0].picks
        await arena.add_validator(someone("newcomer"), 3)
        check_receipt(await arena.draw(12), key)
    finally:
        await arena.stop()


async def test_a_selector_whose_draw_key_is_gone_makes_no_other_for_the_ledger_that_it_has(tmp_path: Path) -> None:
    arena = SelectorArena(tmp_path)
    key, aside = tmp_path / "bls.key", tmp_path / "aside"
    key.unlink()
    # The first start makes one.
    await arena.start()
    await arena.deposit(someone("validator"), MINIMUM)
    await arena.stop()
    key.rename(aside)
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match=r"no .*bls\.key.* backup") as refusal:
            await arena.start()
        assert refusal.value.reason == "DRAW_KEY_MISSING"
    aside.rename(key)
    await arena.start()
    await arena.stop()


async def test_the_commands_export_check_and_explain_a_draw(arena: SelectorArena, tmp_path: Path) -> None:
    await arena.open_pool()
    await arena.add_validator(arena.alice.name, 4)
    for name in "bcde":
        await arena.add_validator(someone(name))
    receipt = await arena.draw(1, paused=[arena.alice.name], validators=4)
    key = tmp_path / "alice.pem"
    arena.keys["alice"].save(key)
    reached = ["--key", str(key), "--selector", arena.server.address]

    async def command(*arguments: str) -> str:
        # A command runs a loop of its own, so it needs a thread of its own.
        result = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    exported, selector_key = tmp_path / "receipt.json", tmp_path / "selector.pub"
    await command("draw", "export", receipt.draw, str(exported), *reached)
    # The server logs to the same standard output.
    printed = await command("draw", "export", receipt.draw.removeprefix("draws/"), *reached)
    assert printed.endswith(exported.read_text())
    await command("draw", "key", str(selector_key), *reached)
    assert "proved: the 4 picks" in await command("draw", "verify", str(exported), "--key", str(selector_key))
    shown = await command("draw", "show", receipt.draw, *reached)
    assert shown.count("assigned") == 4
    told = await command("odds", "--draw", receipt.draw, *reached)
    if receipt.passed_over:
        assert "passed over: paused" in shown
        assert "all members of its owner group were paused" in told
    else:
        assert "did not come up" in told
    told = await command("odds", "digits", "--validators", "1", *reached)
    assert "0.333333 of being among 1 (exact)" in told
    assert "63 of 63 left in this window" in told
    assert "over 4 funding accounts would weigh 2 times as much" in told
