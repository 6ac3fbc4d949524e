"""What the runtime costs a call: an authenticated echo and a recorded write, each against a bare grpc.aio server.

Each server is a process of its own; this process asks both, in turns, with 16 calls in flight. The bare servers get no
token: what is compared is all that a service pays for identity, errors, logs, drain and remembered requests.
"""

import asyncio
import secrets
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue
from sqlmodel import Field, Session, SQLModel

from services.runtime.auth import Authenticator
from services.runtime.database import Database
from services.runtime.idempotency import idempotent
from services.runtime.server import ArenaServer, Mount
from services.runtime.telemetry import configure_logging
from tiltyard.identity import Key, issue_token
from tiltyard.selector.v1 import stake_pb2, stake_pb2_grpc

_AUDIENCE = "benchmark.local/selector"
_IN_FLIGHT = 16
_ROUNDS = 21  # short and many: the median of their ratios stands a machine that does other things meanwhile
_ROUND_S = 0.7
_ECHO = "/benchmark.v1.Echo/Echo"
_PAYLOAD = "x" * 100
_MIGRATION = '''
"""The benchmark's tables."""
import sqlalchemy as sa
from alembic import op
from services.runtime.database import create_remembered_requests

revision, down_revision, branch_labels, depends_on = "1", None, None, None

def upgrade():
    create_remembered_requests(op)
    op.create_table("deposits", sa.Column("number", sa.Integer, primary_key=True), sa.Column("micros", sa.Integer))
'''


class _Deposit(SQLModel, table=True):
    __tablename__ = "deposits"

    number: int | None = Field(default=None, primary_key=True)
    micros: int


async def _echo(request: StringValue, _context: object) -> StringValue:
    return request


def _add_echo(server: grpc.aio.Server) -> None:
    echo = grpc.unary_unary_rpc_method_handler(_echo, StringValue.FromString, StringValue.SerializeToString)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("benchmark.v1.Echo", {"Echo": echo})])


def _answer(micros: int) -> stake_pb2.DepositResponse:
    return stake_pb2.DepositResponse(stake=stake_pb2.Stake(name="stakes/x", available_micros=micros))


class _RecordingStakes(stake_pb2_grpc.StakeServiceServicer):
    def __init__(self, database: Database) -> None:
        self._database = database

    @idempotent(_answer)
    async def Deposit(self, request: stake_pb2.DepositRequest, _context: object) -> int:
        def work(session: Session) -> int:
            session.add(_Deposit(micros=request.amount_micros))
            return request.amount_micros

        return await self._database.write(work)


class _BareStakes(stake_pb2_grpc.StakeServiceServicer):
    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=FULL",
            "CREATE TABLE deposits (number INTEGER PRIMARY KEY, micros INTEGER)",
        ):
            self._connection.execute(statement)

    async def Deposit(self, request: stake_pb2.DepositRequest, _context: object) -> stake_pb2.DepositResponse:
        # Outside of a transaction each statement is one, and durable when it returns.
        self._connection.execute("INSERT INTO deposits (micros) VALUES (?)", (request.amount_micros,))
        return _answer(request.amount_micros)


async def _serve_bare(folder: Path) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    _add_echo(server)
    stake_pb2_grpc.add_StakeServiceServicer_to_server(_BareStakes(folder / "bare.db"), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


async def _serve_ours(folder: Path) -> None:
    versions = folder / "migrations" / "versions"
    versions.mkdir(parents=True)
    (versions / "first.py").write_text(_MIGRATION)
    database = Database.open(f"sqlite:///{folder / 'ours.db'}", migrations=folder / "migrations")
    mounts = [
        Mount("benchmark.v1.Echo", _add_echo),
        Mount(
            "tiltyard.selector.v1.StakeService",
            lambda server: stake_pb2_grpc.add_StakeServiceServicer_to_server(_RecordingStakes(database), server),
        ),
    ]
    authenticator = Authenticator([_AUDIENCE])
    async with ArenaServer("127.0.0.1:0", mounts, authenticator=authenticator, remembered=database) as server:
        print(server.address, flush=True)
        await asyncio.Event().wait()


@contextmanager
def _serving(kind: str, folder: Path) -> Iterator[str]:
    """The address of a server process of `kind` (`ours` or `bare`) that lives as long as this context."""
    command = [sys.executable, "-m", __name__, kind, str(folder)]
    with (folder / f"{kind}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the {kind} server did not start: {(folder / f'{kind}.log').read_text()}")
        yield address
    finally:
        process.kill()
        process.communicate()


async def _calls_per_s(call: Callable[[], Awaitable[object]]) -> float:
    """Calls answered in one round, a second, with 16 in flight."""
    started = time.perf_counter()
    end = started + _ROUND_S

    async def repeat() -> int:
        answered = 0
        while time.perf_counter() < end:
            await call()
            answered += 1
        return answered

    answered = sum(await asyncio.gather(*(repeat() for _ in range(_IN_FLIGHT))))
    return answered / (time.perf_counter() - started)


def _echo_call(channel: grpc.aio.Channel, token: str | None) -> Callable[[], Awaitable[object]]:
    method = channel.unary_unary(_ECHO, StringValue.SerializeToString, StringValue.FromString)
    request = StringValue(value=_PAYLOAD)
    metadata = _metadata(token)
    return lambda: method(request, metadata=metadata, timeout=20)


def _write_call(channel: grpc.aio.Channel, token: str | None) -> Callable[[], Awaitable[object]]:
    stub: Any = stake_pb2_grpc.StakeServiceStub(channel)
    metadata = _metadata(token)

    def call() -> Awaitable[object]:
        request = stake_pb2.DepositRequest(amount_micros=1, request_id=secrets.token_hex(16))
        answer: Awaitable[object] = stub.Deposit(request, metadata=metadata, timeout=20)
        return answer

    return call


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


async def _compare(name: str, against: str, addresses: dict[str, str], made: Callable[..., Any]) -> dict[str, Any]:
    token = issue_token(Key.generate(), audience=_AUDIENCE)
    async with (
        grpc.aio.insecure_channel(addresses["ours"]) as ours,
        grpc.aio.insecure_channel(addresses["bare"]) as bare,
    ):
        calls = (made(ours, token), made(bare, None))
        for call in calls:
            await call()
        pairs = [(await _calls_per_s(calls[0]), await _calls_per_s(calls[1])) for _ in range(_ROUNDS)]
    return {
        "name": name,
        "ours": median(ours_per_s for ours_per_s, _ in pairs),
        "unit": "calls/s",
        "against": against,
        "theirs": median(bare_per_s for _, bare_per_s in pairs),
        "ratio": median(ours_per_s / bare_per_s for ours_per_s, bare_per_s in pairs),
        "goal": 0.5,
    }


async def _measure(addresses: dict[str, str]) -> list[dict[str, Any]]:
    return [
        await _compare("unary call, token checked", "bare grpc.aio echo", addresses, _echo_call),
        await _compare(
            "durable write, request id remembered", "bare grpc.aio, one SQLite commit each", addresses, _write_call
        ),
    ]


def run() -> list[dict[str, Any]]:
    """Median ratios of alternating rounds; `met` says whether a goal was reached."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        folder = Path(name)
        addresses = {kind: servers.enter_context(_serving(kind, folder)) for kind in ("ours", "bare")}
        results = asyncio.run(_measure(addresses))
    return [{**result, "met": result["ratio"] >= result["goal"]} for result in results]


if __name__ == "__main__":
    configure_logging("benchmark", "info", "json")
    asyncio.run({"ours": _serve_ours, "bare": _serve_bare}[sys.argv[1]](Path(sys.argv[2])))
