"""Crowds at one registry process: 500 clients that hardly read, and 1,000 that only watch, cost the others little."""

import asyncio
import os
import time
from collections.abc import Awaitable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import grpc
import psutil
import pytest

from services.runtime.connections import raise_file_limit
from tests.support.registry_server import artifact_name, config_of, uploading
from tests.support.service_process import ServiceProcess
from tiltyard.client import Client
from tiltyard.identity import Key, issue_token
from tiltyard.registry.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    leaderboard_pb2,
    participant_pb2,
    task_pb2,
)
from tiltyard.selector.v1 import stake_pb2
from tiltyard.type.v1 import task_pb2 as task_types

ORIGIN = "tiltyard.local"
MIB = 1024 * 1024
READERS = 500
WATCHERS = 1000
CONTENT = os.urandom(8 * MIB)
# A reader that does not read holds what fits between it and the file: a chunk in Python, one in gRPC's hands.
MOST_BYTES_A_READER = 3 * MIB // 2
MOST_BYTES_A_WATCHER = 100_000
# Of one core, while nothing changes for so long.
MOST_CPU_OF_WATCHERS = 0.15
IDLE_S = 3.0
STAKE = 1_000_000_000
UNHURRIED = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True)
class Arena:
    """A registry on SQLite and its selector, whose operator holds `key`."""

    key: Key
    selector: ServiceProcess
    registry: ServiceProcess

    def client(self, key: Key | None = None) -> Client:
        """Somebody's, on a connection of its own."""
        return Client(
            key or Key.generate(), origin=ORIGIN, registry=self.registry.address, selector=self.selector.address
        )

    @property
    def memory_bytes(self) -> int:
        """What the registry has resident."""
        resident: int = psutil.Process(self.registry.pid).memory_info().rss
        return resident

    @property
    def cpu_s(self) -> float:
        """What the registry has computed so far."""
        times = psutil.Process(self.registry.pid).cpu_times()
        return float(times.user + times.system)

    async def cpu_share(self) -> float:
        """How much of one core the registry takes while nobody asks for anything."""
        before, started = self.cpu_s, time.perf_counter()
        await asyncio.sleep(IDLE_S)
        return (self.cpu_s - before) / (time.perf_counter() - started)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    # Each connection is an open file here, too.
    raise_file_limit()
    folder, key = tmp_path_factory.mktemp("crowds"), Key.generate()
    key.save(folder / "key.pem")
    selector = ServiceProcess(folder / "selector", "selector", services=key.id, operators=key.id)
    settings = {"key_file": str(folder / "key.pem"), "selector": selector.address}
    arena = Arena(key, selector, ServiceProcess(folder / "registry", "registry", **settings))
    with ExitStack() as kills:
        for each in (arena.selector, arena.registry):
            kills.callback(each.kill)
            each.start()
        for each in (arena.selector, arena.registry):
            with grpc.insecure_channel(each.address) as channel:
                grpc.channel_ready_future(channel).result(timeout=60)
        yield arena


def register(client: Client, name: str) -> Awaitable[Any]:
    request = participant_pb2.RegisterParticipantRequest(display_name=name)
    return client.participants.RegisterParticipant(request, timeout=30)


async def deposit(arena: Arena, client: Client) -> None:
    request = stake_pb2.DepositRequest(
        participant=client.participant,
        amount_micros=STAKE,
        reference=client.participant,
        funding_account="somebody's",
    )
    async with arena.client(arena.key) as operator:
        await operator.stakes.Deposit(request)


async def test_five_hundred_slow_readers_are_served_beside_everybody_else(arena: Arena) -> None:
    header = artifact_pb2.UploadHeader(artifact=artifact_name(CONTENT), size_bytes=len(CONTENT), base_model=True)
    owner = arena.client()
    await register(owner, "owner")
    await deposit(arena, owner)
    await owner.artifacts.UploadArtifact(uploading(header, CONTENT))
    before = arena.memory_bytes
    metadata = (("authorization", f"Bearer {issue_token(owner.key, audience=f'{ORIGIN}/registry')}"),)
    request = artifact_pb2.DownloadArtifactRequest(name=artifact_name(CONTENT))
    # Nothing is fetched ahead of its reader: what is not read yet is the registry's to hold.
    channels = [grpc.aio.insecure_channel(arena.registry.address, options=UNHURRIED) for _ in range(READERS)]
    stubs: list[Any] = [artifact_pb2_grpc.ArtifactServiceStub(channel) for channel in channels]
    calls: list[Any] = [stub.DownloadArtifact(request, metadata=metadata) for stub in stubs]
    # Each takes the first chunk, and then its time.
    first = await asyncio.gather(*(call.read() for call in calls))
    assert all(message.chunk and CONTENT.startswith(message.chunk) for message in first)
    others = [arena.client() for _ in range(READERS)]
    # 500 more write, all at once: nobody hears of a database that is locked, or of anything else.
    await asyncio.gather(*(register(client, f"number {number}") for number, client in enumerate(others)))
    spans = []
    for number in range(50):
        started = time.perf_counter()
        await register(others[0], f"again {number}")
        spans.append(time.perf_counter() - started)
    assert median(spans) < 2
    assert arena.memory_bytes - before < 64 * MIB + READERS * MOST_BYTES_A_READER
    # Those that read on after all get the rest of it.
    for call, message in list(zip(calls, first, strict=True))[:5]:
        rest = [message.chunk]
        while (more := await call.read()) is not grpc.aio.EOF:
            rest.append(more.chunk)
        assert b"".join(rest) == CONTENT
    assert not any(call.done() for call in calls[5:])
    for call in calls:
        call.cancel()
    await asyncio.gather(*(each.close() for each in (owner, *others, *channels)))


async def test_a_thousand_idle_watchers_cost_little_and_hear_of_a_change(arena: Arena) -> None:
    clients = [arena.client() for _ in range(WATCHERS)]
    creator = clients[0]
    await register(creator, "creator")
    await deposit(arena, creator)
    await creator.tasks.CreateTask(task_pb2.CreateTaskRequest(task_id="t", config=config_of(b"never uploaded")))
    before, alone = arena.memory_bytes, await arena.cpu_share()
    task, ranking = task_pb2.WatchTaskRequest(name="tasks/t"), leaderboard_pb2.WatchLeaderboardRequest(task="tasks/t")
    tasks: list[Any] = [client.tasks.WatchTask(task) for client in clients[::2]]
    rankings: list[Any] = [client.leaderboard.WatchLeaderboard(ranking) for client in clients[1::2]]
    first = await asyncio.gather(*(call.read() for call in tasks))
    await asyncio.gather(*(call.read() for call in rankings))
    assert len({message.cursor for message in first}) == 1
    assert await arena.cpu_share() - alone < MOST_CPU_OF_WATCHERS
    assert arena.memory_bytes - before < WATCHERS * MOST_BYTES_A_WATCHER
    amended = task_pb2.Task(name="tasks/t", config=task_types.TaskConfig(display_name="Another name"))
    request = task_pb2.UpdateTaskRequest(task=amended)
    request.update_mask.FromJsonString("config.displayName")
    await creator.tasks.UpdateTask(request)
    async with asyncio.timeout(20):
        second = await asyncio.gather(*(call.read() for call in tasks))
    assert {message.task.config.display_name for message in second} == {"Another name"}
    assert not any(call.done() for call in rankings)
    for call in (*tasks, *rankings):
        call.cancel()
    await asyncio.gather(*(client.close() for client in clients))
