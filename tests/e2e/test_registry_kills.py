"""The registry killed at random moments under load: what was acknowledged is there, once, in a log that only grew."""

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import grpc
import pytest

from tests.support.postgres_server import PostgresServer
from tests.support.service_process import ServiceProcess
from tiltyard.audit import Record, audit
from tiltyard.audit.download import fetch_record
from tiltyard.client import Client
from tiltyard.identity import Key
from tiltyard.registry.v1 import log_pb2, participant_pb2
from tiltyard.statements import sign_statement
from tiltyard.transparency import Frontier, leaf_hash, parse_checkpoint
from tiltyard.type.v1 import envelope_pb2

T = TypeVar("T")

ORIGIN = "tiltyard.local"
PATIENCE_S = 60
CLIENTS = 6


class Arena:
    """A selector, and registries on one database."""

    def __init__(self, folder: Path, database_url: str) -> None:
        key = Key.generate()
        (folder / "state").mkdir(parents=True)
        key.save(folder / "registry.pem")
        self.selector = ServiceProcess(folder / "selector", "selector", services=key.id, operators=key.id)
        self.registries = [
            ServiceProcess(
                folder / name,
                "registry",
                key_file=str(folder / "registry.pem"),
                selector=self.selector.address,
                # One state: both sign with the same log key.
                state_dir=str(folder / "state"),
                database_url=database_url,
            )
            for name in ("one", "two")
        ]

    def kill(self) -> None:
        for each in (self.selector, *self.registries):
            each.kill()


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    try:
        server = PostgresServer()
    except LookupError as missing:
        pytest.skip(str(missing))
    with server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Calls that a kill has ended are collected now: in the middle of a later `ast.parse` CPython 3.11 trips on it."""
    yield
    gc.collect()


@asynccontextmanager
async def running(folder: Path, database_url: str) -> AsyncIterator[Arena]:
    arena = Arena(folder, database_url)
    try:
        arena.selector.start()
        arena.registries[0].start()
        yield arena
    finally:
        arena.kill()


async def insist(ask: Callable[[], Awaitable[T]]) -> T:
    """Asks until there is an answer, as clients with a request id may."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await ask()
        except grpc.aio.AioRpcError as error:
            gone = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
            if error.code() not in gone or time.monotonic() > end:
                raise
        await asyncio.sleep(0.05)


class Load:
    """Clients that endorse somebody in one field after the other; remembers what was acknowledged and signed."""

    def __init__(self, address: str) -> None:
        self._keys = [Key.generate() for _ in range(CLIENTS)]
        self.clients = [Client(key, origin=ORIGIN, registry=address) for key in self._keys]
        self.acknowledged: set[tuple[str, str]] = set()
        self._counts: Counter[str] = Counter()
        self.checkpoints: list[str] = []
        self.stopping = False
        self._registered = asyncio.Barrier(CLIENTS)
        self.work = asyncio.gather(*(self._work(client) for client in self.clients))

    async def _work(self, client: Client) -> None:
        register = participant_pb2.RegisterParticipantRequest(display_name="busy", request_id="register")
        await insist(lambda: client.participants.RegisterParticipant(register, wait_for_ready=True))
        # Whom one endorses has to be registered.
        await self._registered.wait()
        subject = self.clients[self.clients.index(client) - 1].participant
        number = 0
        while not self.stopping:
            number += 1
            field = f"field-{number}"
            statement = envelope_pb2.EndorsementStatement(
                origin=ORIGIN, endorser=client.participant, subject=subject, field=field
            )
            request = participant_pb2.EndorseParticipantRequest(
                statement=sign_statement(client.key, statement), request_id=field
            )
            await insist(lambda request=request: client.participants.EndorseParticipant(request))  # type: ignore[misc]
            self.acknowledged.add((client.participant, field))
            self._counts[client.participant] += 1
            if number % 5 == 0:
                answer = await insist(lambda: client.log.GetCheckpoint(log_pb2.GetCheckpointRequest()))
                self.checkpoints.append(answer.checkpoint.note)

    async def at_least(self, more: int) -> None:
        """Until so many more have been acknowledged, and each client has had one of its own: a client that has met a
        dead registry several times in a row asks less often, and would else find every short life over."""
        before = len(self.acknowledged)
        waiting = {client.participant: self._counts[client.participant] for client in self.clients}
        end = time.monotonic() + PATIENCE_S
        while len(self.acknowledged) < before + more or any(self._counts[who] <= n for who, n in waiting.items()):
            if self.work.done():
                self.work.result()
            assert time.monotonic() < end, "nothing is acknowledged any more"
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        self.work.cancel()
        await asyncio.wait((self.work,))
        for client in self.clients:
            await client.close()


async def check(load: Load, address: str) -> None:
    async with Client(Key.generate(), origin=ORIGIN, registry=address) as reader:
        record = await insist(lambda: fetch_record(reader))
    found = audit(record)
    assert found.passed, [str(failure) for failure in found.failures]
    logged = [
        (f"participants/{statement_of(entry.endorsement_changed.statement).endorser.rpartition('/')[2]}", field)
        for _, entry in record.of_kind("endorsement_changed")
        for field in [statement_of(entry.endorsement_changed.statement).field]
    ]
    assert len(logged) == len(set(logged)), "a request id took effect twice"
    assert load.acknowledged <= set(logged), "an acknowledged write is gone"
    check_checkpoints(record, load.checkpoints)


def statement_of(envelope: envelope_pb2.Envelope) -> envelope_pb2.EndorsementStatement:
    return envelope_pb2.EndorsementStatement.FromString(envelope.payload)


def check_checkpoints(record: Record, notes: list[str]) -> None:
    """Every tree that was ever signed is a beginning of the last."""
    assert notes
    roots, frontier = {0: Frontier().root()}, Frontier()
    for leaf in record.leaves:
        frontier.append(leaf_hash(leaf))
        roots[frontier.size] = frontier.root()
    for note in notes:
        checkpoint = parse_checkpoint(note.rpartition("\n\n")[0] + "\n")
        assert roots[checkpoint.size] == checkpoint.root


async def under_kills(arena: Arena, kills: int, kill: Callable[[], None], *, seed: int) -> None:
    """Load, and so many kills at random moments of it."""
    chance = random.Random(seed)
    load = Load(arena.registries[0].address)
    try:
        for _ in range(kills):
            await load.at_least(20)
            await asyncio.sleep(chance.random() * 0.2)
            kill()
        await load.at_least(20)
        load.stopping = True
        await load.work
        await check(load, arena.registries[0].address)
    finally:
        await load.close()


def again(process: ServiceProcess) -> Callable[[], None]:
    def kill() -> None:
        process.kill()
        process.start()

    return kill


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
async def test_nothing_is_lost_or_doubled_by_kills_on_sqlite(tmp_path: Path, kills: int) -> None:
    async with running(tmp_path, f"sqlite:///{tmp_path}/state/registry.db") as arena:
        await under_kills(arena, kills, again(arena.registries[0]), seed=1)


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
async def test_nothing_is_lost_or_doubled_by_kills_on_postgresql(
    tmp_path: Path, postgres: PostgresServer, kills: int
) -> None:
    async with running(tmp_path, postgres.database()) as arena:
        await under_kills(arena, kills, again(arena.registries[0]), seed=2)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
async def test_nothing_is_lost_or_doubled_by_kills_of_postgresql_itself(
    tmp_path: Path, postgres: PostgresServer, kills: int
) -> None:
    async with running(tmp_path, postgres.database()) as arena:

        def kill() -> None:
            postgres.kill()
            postgres.start()
            # A registry that has lost its database gives its role up and ends; whoever minds it starts it again.
            again(arena.registries[0])()

        await under_kills(arena, kills, kill, seed=3)


async def test_a_standby_takes_over_within_seconds(tmp_path: Path, postgres: PostgresServer) -> None:
    async with running(tmp_path, postgres.database()) as arena:
        active, standby = arena.registries
        load = Load(active.address)
        await load.at_least(30)
        standby.start()
        waiting = Client(Key.generate(), origin=ORIGIN, registry=standby.address)
        await load.at_least(30)
        with pytest.raises(grpc.aio.AioRpcError):
            await waiting.log.GetCheckpoint(log_pb2.GetCheckpointRequest(), timeout=1)
        active.kill()
        killed = time.monotonic()
        await load.close()
        await insist(lambda: waiting.log.GetCheckpoint(log_pb2.GetCheckpointRequest()))
        assert time.monotonic() - killed < 40
        await waiting.close()
        await check(load, standby.address)
