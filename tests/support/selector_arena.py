"""A selector behind a real server with a clock that stands still, and those who call it."""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_status.rpc_status import from_call

from services.runtime.channels import open_peer
from services.runtime.server import ArenaServer
from services.selector.bootstrap import build
from services.selector.settings import SelectorSettings
from tiltyard import bls
from tiltyard.identity import Key
from tiltyard.receipts import receipt_from_json, receipt_to_json, verify_receipt
from tiltyard.selector.v1 import draw_pb2, draw_pb2_grpc, pool_pb2, pool_pb2_grpc, stake_pb2, stake_pb2_grpc
from tiltyard.type.v1 import draw_pb2 as draw_types
from tiltyard.type.v1 import participation_pb2 as participation
from tiltyard.type.v1 import task_pb2 as task_types

AUDIENCE = "tiltyard.local/selector"
TASK = "tasks/digits"
MINIMUM = 1_000_000


@dataclass
class Clock:
    """Stands still until told to go on."""

    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __call__(self) -> datetime:
        return self.now


class Peer:
    """One key's stubs."""

    def __init__(self, key: Key, channel: grpc.aio.Channel) -> None:
        self.key = key
        self.channel = channel
        self.name = f"participants/{key.id}"
        self.stakes = stake_pb2_grpc.StakeServiceStub(channel)
        self.eligibility = pool_pb2_grpc.EligibilityServiceStub(channel)
        self.pools = pool_pb2_grpc.PoolServiceStub(channel)
        self.draws = draw_pb2_grpc.DrawServiceStub(channel)


class SelectorArena:
    """A selector in this process, with its callers."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        # With the same key and anchors the draws of a test are the same in every run.
        (folder / "bls.key").write_text("07" * bls.SEED_BYTES)
        (folder / "bls.key").chmod(0o600)
        self.clock = Clock()
        self.keys = {name: Key.generate() for name in ("operator", "service", "alice")}
        self._settings: Callable[[], SelectorSettings] = lambda: SelectorSettings(
            state_dir=folder,
            listen="127.0.0.1:0",
            operators=frozenset({self.keys["operator"].id}),
            services=frozenset({self.keys["service"].id}),
            unbonding_time_s=3600,
            validator_min_stake_micros=MINIMUM,
            training_node_min_stake_micros=MINIMUM // 10,
            task_creator_min_stake_micros=5 * MINIMUM,
            **settings,
        )
        self._channels: list[grpc.aio.Channel] = []
        self._deposits = 0

    async def start(self) -> None:
        settings = self._settings()
        self.selector = await build(settings, clock=self.clock)
        self.server = ArenaServer(
            settings.listen,
            self.selector.mounts,
            authenticator=self.selector.authenticator,
            policy=self.selector.policy,
            remembered=self.selector.database,
        )
        await self.server.start()
        await self.server.set_serving(True)
        self.operator, self.service, self.alice = (
            self.peer(self.keys[name]) for name in ("operator", "service", "alice")
        )

    async def stop(self) -> None:
        for channel in self._channels:
            await channel.close()
        await self.server.stop(grace_s=0)
        await self.selector.close()

    def peer(self, key: Key) -> Peer:
        channel = open_peer(self.server.address, key=key, audience=AUDIENCE)
        self._channels.append(channel)
        return Peer(key, channel)

    async def deposit(self, participant: str, micros: int, account: str = "") -> stake_pb2.Stake:
        self._deposits += 1
        request = stake_pb2.DepositRequest(
            participant=participant,
            amount_micros=micros,
            reference=f"payment {self._deposits}",
            funding_account=account or f"account of {participant}",
        )
        return (await self.operator.stakes.Deposit(request)).stake

    async def open_pool(self, task: str = TASK, *, limit: int = 100, **policy: Any) -> pool_pb2.OpenPoolResponse:
        rate = task_types.ValidatorRate(limit=limit, window=Duration(seconds=3600))
        return await self.service.pools.OpenPool(
            pool_pb2.OpenPoolRequest(
                task=task,
                policy=task_types.SelectionPolicy(rate=rate, **policy),
                open_time=timestamp(self.clock()),
                creator=someone("creator"),
            )
        )

    async def add_validator(
        self, participant: str, minimums: int = 1, *, task: str = TASK, account: str = "", owner: str = ""
    ) -> pool_pb2.AddCandidateResponse:
        await self.deposit(participant, minimums * MINIMUM, account)
        return await self.service.pools.AddCandidate(
            pool_pb2.AddCandidateRequest(
                task=task, participant=participant, role=participation.ROLE_VALIDATOR, owner=owner
            )
        )

    async def draw(self, number: int = 1, **changes: Any) -> draw_types.DrawReceipt:
        return (await self.service.draws.DrawValidators(draw_request(number, **changes))).receipt


def draw_request(number: int = 1, **changes: Any) -> draw_pb2.DrawValidatorsRequest:
    fields = {
        "submission": f"{TASK}/submissions/{number}",
        "round": 1,
        "anchor": hashlib.sha256(f"leaf {number}".encode()).digest(),
        "reveal_salt": b"s" * 32,
        "validators": 3,
        "submitter": someone("submitter"),
    }
    return draw_pb2.DrawValidatorsRequest(**(fields | changes))


def someone(name: str) -> str:
    return "participants/" + hashlib.sha256(name.encode()).hexdigest()[:40]


def timestamp(time: datetime) -> Timestamp:
    converted = Timestamp()
    converted.FromDatetime(time)
    return converted


def bare(name: str) -> str:
    return name.removeprefix("participants/")


@asynccontextmanager
async def refused(code: grpc.StatusCode, *, reason: str = "", field: str = "") -> AsyncIterator[dict[str, str]]:
    """The call in the block fails with this status; yields the metadata of its ErrorInfo."""
    metadata: dict[str, str] = {}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield metadata
    error = caught.value
    assert error.code() is code, error.details()
    status = from_call(error)  # type: ignore[arg-type]
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details if status else []:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        if detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
        if detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            metadata["retry after"] = retry.retry_delay.ToJsonString()
    metadata.update(info.metadata)
    if reason:
        assert info.reason == reason
    if field:
        assert [violation.field for violation in bad.field_violations] == [field]


def check_receipt(receipt: draw_types.DrawReceipt, key: bytes) -> None:
    """What an outsider checks."""
    assert verify_receipt(receipt_from_json(receipt_to_json(receipt)), selector_key=key)
