"""The selector killed in the middle of many draws: none is lost, doubled or changed."""

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tests.support.service_process import ServiceProcess
from tiltyard.calls.channel import open_channel
from tiltyard.identity import Key, TokenSource
from tiltyard.receipts import verify_receipt
from tiltyard.selector.v1 import draw_pb2, draw_pb2_grpc, pool_pb2, pool_pb2_grpc, stake_pb2, stake_pb2_grpc
from tiltyard.type.v1 import draw_pb2 as draw_types
from tiltyard.type.v1 import participation_pb2, task_pb2
from tiltyard.type.v1 import stake_pb2 as stake_types

PICKS = 3
VALIDATORS = 12
PATIENCE_S = 60
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def someone(number: int) -> str:
    return "participants/" + hashlib.sha256(str(number).encode()).hexdigest()[:40]


def unsigned(receipt: draw_types.DrawReceipt) -> draw_types.DrawReceipt:
    """What a receipt says; the signature may be made again, with other receipts."""
    said = draw_types.DrawReceipt()
    said.CopyFrom(receipt)
    said.ClearField("signed")
    return said


def request(number: int) -> draw_pb2.DrawValidatorsRequest:
    return draw_pb2.DrawValidatorsRequest(
        submission=f"tasks/t/submissions/{number}",
        round=1,
        anchor=hashlib.sha256(str(number).encode()).digest(),
        reveal_salt=bytes(32),
        validators=PICKS,
        submitter=someone(0),
    )


async def persist(call: Any, message: Any) -> Any:
    """Asks until there is an answer: what was lost by a kill is asked again."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await call(message, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            # A selector that takes long to come back is waited for in vain by a call, and asked again by the next.
            if error.code() not in _LOST or time.monotonic() > end:
                raise


async def fill(stakes: Any, pools: Any) -> bytes:
    opening = pool_pb2.OpenPoolRequest(
        task="tasks/t",
        policy=task_pb2.SelectionPolicy(rate=task_pb2.ValidatorRate(limit=1_000_000)),
        open_time=Timestamp(seconds=int(time.time())),
        creator=someone(0),
    )
    key: bytes = (await persist(pools.OpenPool, opening)).selector_key
    for number in range(1, VALIDATORS + 1):
        deposit = stake_pb2.DepositRequest(
            participant=someone(number),
            amount_micros=100_000_000 * number,
            reference=str(number),
            funding_account=str(number),
        )
        await persist(stakes.Deposit, deposit)
        candidate = pool_pb2.AddCandidateRequest(
            task="tasks/t", participant=someone(number), role=participation_pb2.ROLE_VALIDATOR
        )
        await persist(pools.AddCandidate, candidate)
    return key


async def ledger(stakes: Any) -> list[stake_types.LedgerEvent]:
    events: list[stake_types.LedgerEvent] = []
    while True:
        page = await persist(
            stakes.ListLedgerEvents,
            stake_pb2.ListLedgerEventsRequest(start_sequence=len(events) + 1, page_size=1000),
        )
        if not page.events:
            return events
        events += page.events


@pytest.mark.parametrize(
    ("number_of_draws", "kills"),
    [(1000, 3), pytest.param(20_000, 40, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])],
)
async def test_no_draw_is_lost_doubled_or_changed_by_kills(tmp_path: Path, number_of_draws: int, kills: int) -> None:
    keys = {role: Key.generate() for role in ("operator", "service")}
    selector = ServiceProcess(tmp_path, "selector", operators=keys["operator"].id, services=keys["service"].id)
    selector.start()
    audience = "tiltyard.local/selector"
    try:
        async with (
            open_channel(selector.address, tokens=TokenSource(keys["operator"], audience)) as operator,
            open_channel(selector.address, tokens=TokenSource(keys["service"], audience)) as service,
        ):
            stakes: Any = stake_pb2_grpc.StakeServiceStub(operator)
            draws: Any = draw_pb2_grpc.DrawServiceStub(service)
            key = await fill(stakes, pool_pb2_grpc.PoolServiceStub(service))
            first: dict[int, draw_types.DrawReceipt] = {}
            waiting = iter(range(1, number_of_draws + 1))

            moments = {number_of_draws * kill // (kills + 1) for kill in range(1, kills + 1)}

            async def worker() -> None:
                for number in waiting:
                    first[number] = (await persist(draws.DrawValidators, request(number))).receipt
                    if len(first) in moments:
                        selector.kill()  # fifteen other draws are under way
                        selector.start()

            await asyncio.gather(*(worker() for _ in range(16)))
            assert len(first) == number_of_draws
            # Not changed: asked again, each draw is what was answered first, and what GetDraw reads.
            for number, receipt in first.items():
                again = (await persist(draws.DrawValidators, request(number))).receipt
                assert unsigned(again) == unsigned(receipt)
                if number % 50 == 0:
                    read = (await persist(draws.GetDraw, draw_pb2.GetDrawRequest(name=receipt.draw))).receipt
                    assert unsigned(read) == unsigned(receipt)
                    for each in (receipt, again, read):
                        verify_receipt(each, selector_key=key)
            # Not lost and not doubled: each draw has charged each of its picks once, and there are no other charges.
            events = await ledger(stakes)
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            charges = sorted(
                (event.draw, event.participant)
                for event in events
                if event.kind == stake_types.LEDGER_EVENT_KIND_QUOTA_CHARGED
            )
            assert charges == sorted(
                (receipt.draw, pick.participant) for receipt in first.values() for pick in receipt.picks
            )
            assert len(charges) == PICKS * number_of_draws
    finally:
        selector.kill()
