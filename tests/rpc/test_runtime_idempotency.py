"""`request_id` over a real server and a real database: once, whatever the network repeats."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlmodel import Field, Session, SQLModel, func, select

from services.runtime import idempotency
from services.runtime.auth import Authenticator
from services.runtime.channels import open_peer
from services.runtime.database import Database
from services.runtime.errors import FailedPrecondition
from services.runtime.idempotency import idempotent, pending_request
from services.runtime.server import ArenaServer, Mount
from tiltyard.calls.errors import ClientError
from tiltyard.identity import Key
from tiltyard.selector.v1 import stake_pb2, stake_pb2_grpc

AUDIENCE = "tiltyard.local/selector"
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
_TABLES = '''
"""The tables of this test."""
import sqlalchemy as sa
from alembic import op
from services.runtime.database import create_remembered_requests

revision, down_revision, branch_labels, depends_on = "1", None, None, None

def upgrade():
    create_remembered_requests(op)
    op.create_table("payments", sa.Column("number", sa.Integer, primary_key=True), sa.Column("micros", sa.Integer))
'''


class Payment(SQLModel, table=True):
    __tablename__ = "payments"

    number: int | None = Field(default=None, primary_key=True)
    micros: int


class Accounts:
    """The domain: `calls` counts how often it was reached."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.calls = 0
        self.refuse = False
        self.left_behind: asyncio.Task[int] | None = None
        self.go_on = asyncio.Event()

    def _pay(self, micros: int) -> Any:
        def work(session: Session) -> int:
            session.add(Payment(micros=micros))
            return session.exec(select(func.sum(Payment.micros))).one()

        return work

    async def deposit(self, micros: int) -> int:
        self.calls += 1
        if self.refuse:
            raise FailedPrecondition("NOT_NOW", "not now")
        return await self._database.write(self._pay(micros))

    async def deposit_and_leave_work_behind(self, micros: int) -> int:
        async def later() -> int:
            await self.go_on.wait()
            return await self._database.write(self._pay(1))

        self.left_behind = asyncio.create_task(later())
        return await self.deposit(micros)

    async def total(self) -> int:
        return await self._database.read(lambda session: session.exec(select(func.sum(Payment.micros))).one() or 0)


def _answer(total_micros: int) -> stake_pb2.DepositResponse:
    return stake_pb2.DepositResponse(stake=stake_pb2.Stake(name="stakes/x", available_micros=total_micros))


class Stakes(stake_pb2_grpc.StakeServiceServicer):
    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    @idempotent(_answer)
    async def Deposit(self, request: stake_pb2.DepositRequest, context: Any) -> int:
        if request.reference == "leave work behind":
            return await self._accounts.deposit_and_leave_work_behind(request.amount_micros)
        return await self._accounts.deposit(request.amount_micros)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    versions = tmp_path / "migrations" / "versions"
    versions.mkdir(parents=True)
    (versions / "first.py").write_text(_TABLES)
    opened = Database.open(f"sqlite:///{tmp_path / 'test.db'}", migrations=tmp_path / "migrations")
    yield opened
    await opened.close()


@pytest.fixture
def accounts(database: Database) -> Accounts:
    return Accounts(database)


@pytest.fixture(params=["remembered at the door", "remembered at the write"])
async def server(request: pytest.FixtureRequest, database: Database, accounts: Accounts) -> AsyncIterator[ArenaServer]:
    mount = Mount(
        "tiltyard.selector.v1.StakeService",
        lambda server: stake_pb2_grpc.add_StakeServiceServicer_to_server(Stakes(accounts), server),
    )
    remembered = database if request.param == "remembered at the door" else None
    authenticator = Authenticator([AUDIENCE])
    async with ArenaServer("127.0.0.1:0", [mount], authenticator=authenticator, remembered=remembered) as started:
        yield started


@pytest.fixture
async def channel(server: ArenaServer) -> AsyncIterator[grpc.aio.Channel]:
    async with open_peer(server.address, key=Key.generate(), audience=AUDIENCE) as opened:
        yield opened


async def deposit(channel: grpc.aio.Channel, micros: int, request_id: str, reference: str = "") -> int:
    request = stake_pb2.DepositRequest(amount_micros=micros, request_id=request_id, reference=reference)
    answer = await stake_pb2_grpc.StakeServiceStub(channel).Deposit(request)
    return answer.stake.available_micros


async def test_a_repeated_request_gets_the_first_answer(channel: grpc.aio.Channel, accounts: Accounts) -> None:
    assert await deposit(channel, 10, "a") == 10
    assert await deposit(channel, 5, "b") == 15
    assert await deposit(channel, 10, "a") == 10
    assert await accounts.total() == 15


@pytest.fixture
def few_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one caller two are kept in a day."""
    monkeypatch.setattr(idempotency, "ANSWERS_PER_DAY", 2)


@pytest.mark.parametrize("server", ["remembered at the door"], indirect=True)
async def test_no_more_answers_are_kept_of_one_caller_in_a_day_than_may(
    few_answers: None, server: ArenaServer, channel: grpc.aio.Channel, accounts: Accounts
) -> None:
    assert await deposit(channel, 10, "a") == 10
    accounts.refuse = True
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError):
            await deposit(channel, 10, "not kept")
    accounts.refuse = False
    assert await deposit(channel, 10, "b") == 20
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await deposit(channel, 10, "c")
    assert (refused.value.code(), ClientError.of(refused.value).reason) == (EXHAUSTED, "ANSWERS_PER_DAY")
    # What is kept is answered, and so is everybody else.
    assert await deposit(channel, 10, "b") == 20
    async with open_peer(server.address, key=Key.generate(), audience=AUDIENCE) as other:
        assert await deposit(other, 10, "a") == 30


@pytest.mark.parametrize("server", ["remembered at the door"], indirect=True)
async def test_a_replay_is_answered_though_its_method_fails_before_it_comes_to_a_write(
    channel: grpc.aio.Channel, accounts: Accounts
) -> None:
    assert await deposit(channel, 10, "a") == 10
    accounts.refuse = True
    assert await deposit(channel, 10, "a") == 10
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await deposit(channel, 10, "b")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert await accounts.total() == 10


async def test_without_an_id_each_request_counts(channel: grpc.aio.Channel, accounts: Accounts) -> None:
    assert [await deposit(channel, 10, "") for _ in range(2)] == [10, 20]


async def test_another_body_under_the_id_is_refused(channel: grpc.aio.Channel, accounts: Accounts) -> None:
    await deposit(channel, 10, "a")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await deposit(channel, 11, "a")
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert await accounts.total() == 10


async def test_an_id_belongs_to_its_caller(server: ArenaServer, channel: grpc.aio.Channel) -> None:
    assert await deposit(channel, 10, "a") == 10
    async with open_peer(server.address, key=Key.generate(), audience=AUDIENCE) as another:
        assert await deposit(another, 10, "a") == 20


async def test_duplicates_at_the_same_time_run_once(channel: grpc.aio.Channel, accounts: Accounts) -> None:
    assert set(await asyncio.gather(*(deposit(channel, 10, "a") for _ in range(20)))) == {10}
    assert await accounts.total() == 10


async def test_a_refused_request_may_be_tried_again(channel: grpc.aio.Channel, accounts: Accounts) -> None:
    accounts.refuse = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await deposit(channel, 10, "a")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    accounts.refuse = False
    assert await deposit(channel, 10, "a") == 10


@pytest.mark.parametrize("request_id", ["x" * 65, "line\nbreak", "ümlaut"])
async def test_a_bad_id_is_named(channel: grpc.aio.Channel, accounts: Accounts, request_id: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await deposit(channel, 10, request_id)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "request_id" in (caught.value.details() or "")
    assert accounts.calls == 0


async def test_work_left_behind_does_not_write_under_the_calls_id(
    channel: grpc.aio.Channel, accounts: Accounts
) -> None:
    assert await deposit(channel, 10, "a", "leave work behind") == 10
    assert accounts.left_behind is not None
    accounts.go_on.set()
    assert await accounts.left_behind == 11
    assert await deposit(channel, 10, "a", "leave work behind") == 10
    # Where the method ran again, its work came under an id that has its answer: refused, and that is looked at.
    await asyncio.gather(accounts.left_behind, return_exceptions=True)


async def test_nothing_is_pending_outside_of_a_call() -> None:
    assert pending_request() is None
