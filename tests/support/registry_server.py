"""A whole registry behind a real server, with the selector in memory and a clock that is set."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from services.registry.bootstrap import Registry, build
from services.registry.settings import RegistrySettings
from services.runtime.server import ArenaServer
from tests.support.registry_fakes import FakeSelection, SettableClock
from tiltyard.calls.errors import ClientError
from tiltyard.client import Client
from tiltyard.datasets import write_dataset
from tiltyard.identity import Key
from tiltyard.registry.v1 import artifact_pb2, membership_pb2, participant_pb2, task_pb2
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2, model_pb2, participation_pb2
from tiltyard.type.v1 import log_pb2 as type_log_pb2
from tiltyard.type.v1 import task_pb2 as type_task_pb2

ORIGIN = "arena.test"
ROWS = 20
CHUNK = 200


def dataset_bytes(folder: Path, *, seed: int = 0, rows: int = ROWS) -> bytes:
    """A good evaluation dataset of 4 features and 3 classes."""
    numbers = np.random.default_rng(seed)
    path = folder / f"dataset-{seed}.safetensors"
    write_dataset(path, numbers.random((rows, 4)).astype(np.float32), numbers.integers(0, 3, rows))
    return path.read_bytes()


def artifact_name(content: bytes) -> str:
    """The name of the artifact with this content."""
    return f"artifacts/{hashlib.sha256(content).hexdigest()}"


def digest_of(content: bytes) -> type_task_pb2.DatasetDigest:
    """What a task's configuration says of a dataset."""
    return type_task_pb2.DatasetDigest(sha256=hashlib.sha256(content).digest(), size_bytes=len(content))


def config_of(dataset: bytes) -> type_task_pb2.TaskConfig:
    """The least that a creator has to say."""
    return type_task_pb2.TaskConfig(
        display_name="Three classes",
        models=[model_pb2.ModelSpec(input_shape=[4], outputs=3, mlp=model_pb2.Mlp(hidden=[8, 8, 8]))],
        evaluation_dataset=digest_of(dataset),
    )


async def uploading(
    header: artifact_pb2.UploadHeader, content: bytes, *, chunk: int = CHUNK
) -> AsyncIterator[artifact_pb2.UploadArtifactRequest]:
    """The messages of an upload from the header's offset on."""
    yield artifact_pb2.UploadArtifactRequest(header=header)
    for at in range(header.offset, len(content), chunk):
        yield artifact_pb2.UploadArtifactRequest(chunk=content[at : at + chunk])


def join_request(
    key: Key, role: participation_pb2.Role.ValueType, *, task: str = "t", request_id: str = "", origin: str = ORIGIN
) -> membership_pb2.JoinTaskRequest:
    """A signed request to join."""
    statement = envelope_pb2.JoinStatement(
        origin=origin, task=f"tasks/{task}", participant=f"participants/{key.id}", role=role
    )
    return membership_pb2.JoinTaskRequest(statement=sign_statement(key, statement), request_id=request_id)


@contextlib.contextmanager
def refused(code: grpc.StatusCode, reason: str | None = None, *, field: str | None = None) -> Iterator[None]:
    """The call inside is answered with this code, reason, and (among others) this bad field."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        yield
    error = ClientError.of(raised.value)
    assert error.code is code, error
    if reason is not None:
        assert error.reason == reason, error
    if field is not None:
        assert field in [violation.field for violation in error.violations], error.violations


class RegistryServer:
    """One registry process on a state folder; `restart` ends it and starts the next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.operator = Key.generate()
        self.trusted = Key.generate()
        self.clock = SettableClock()
        self.selection = FakeSelection(self.clock)
        self.settings: dict[str, Any] = {}
        """What else the operator sets, from the next start on."""
        self.registry: Registry
        self._clients: dict[str, Client] = {}
        self._running = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Serve, with the referee at work."""
        settings = RegistrySettings(
            origin=ORIGIN,
            state_dir=self.folder / "state",
            operators=frozenset({self.operator.id}),
            trusted_endorsers=frozenset({self.trusted.id}),
            **{"max_artifact_bytes": 1 << 20, **self.settings},
        )
        self.registry = await build(settings, clock=self.clock, selection=self.selection)
        await self.registry.begin()
        self._running = contextlib.AsyncExitStack()
        self._running.push_async_callback(self.registry.close)
        self.server = await self._running.enter_async_context(
            ArenaServer(
                "127.0.0.1:0",
                self.registry.mounts,
                authenticator=self.registry.authenticator,
                policy=self.registry.policy,
                remembered=self.registry.database,
            )
        )
        referee = asyncio.create_task(self.registry.referee.run())
        self._running.push_async_callback(_ended, referee)

    async def stop(self) -> None:
        """End clients and server."""
        for client in self._clients.values():
            await client.close()
        self._clients.clear()
        await self._running.aclose()

    async def restart(self) -> None:
        """A new process on the same state."""
        await self.stop()
        await self.start()

    async def client(self, key: Key) -> Client:
        """A client that signs with `key`."""
        if key.id not in self._clients:
            self._clients[key.id] = Client(key, origin=ORIGIN, registry=self.server.address)
        return self._clients[key.id]

    async def participant(self, name: str = "somebody", key: Key | None = None) -> Client:
        """A registered participant's client."""
        client = await self.client(key or Key.generate())
        await client.participants.RegisterParticipant(participant_pb2.RegisterParticipantRequest(display_name=name))
        return client

    async def advance(self, *, seconds: float) -> None:
        """Let time pass, and the referee act on it."""
        self.clock.advance(seconds=seconds)
        await self.registry.referee.turn()

    async def create_task(
        self, creator: Client, dataset: bytes, *, task: str = "t", config: type_task_pb2.TaskConfig | None = None
    ) -> task_pb2.Task:
        """A task that is PREPARING."""
        request = task_pb2.CreateTaskRequest(task_id=task, config=config or config_of(dataset))
        return (await creator.tasks.CreateTask(request)).task

    async def upload(
        self, client: Client, content: bytes, *, task: str | None = None, submission: str | None = None
    ) -> str:
        """Hand an artifact in for a task or a submission."""
        header = artifact_pb2.UploadHeader(
            artifact=artifact_name(content), size_bytes=len(content), task=task, submission=submission
        )
        return (await client.artifacts.UploadArtifact(uploading(header, content))).artifact.name

    async def open_task(
        self, creator: Client, dataset: bytes, *, task: str = "t", config: type_task_pb2.TaskConfig | None = None
    ) -> task_pb2.Task:
        """A task that is OPEN."""
        await self.create_task(creator, dataset, task=task, config=config)
        await self.upload(creator, dataset, task=f"tasks/{task}")
        return await self.watch_until(creator, type_task_pb2.TASK_STATE_OPEN, task=task)

    async def watch_until(
        self, client: Client, state: type_task_pb2.TaskState.ValueType, *, task: str = "t"
    ) -> task_pb2.Task:
        """The task once it is in this state."""
        async with asyncio.timeout(20):
            call = client.tasks.WatchTask(task_pb2.WatchTaskRequest(name=f"tasks/{task}"))
            async for message in call:
                if message.task.state == state:
                    call.cancel()
                    return message.task
        raise AssertionError("the task has ended in another state")

    async def join(
        self, client: Client, role: participation_pb2.Role.ValueType, *, task: str = "t", request_id: str = ""
    ) -> membership_pb2.JoinTaskResponse:
        """Join with a signed statement."""
        return await client.memberships.JoinTask(join_request(client.key, role, task=task, request_id=request_id))

    async def entries(self) -> list[type_log_pb2.LogEntry]:
        """All leaves of the log."""
        leaves = await self.registry.log.entries(start=0, limit=100_000)
        return [type_log_pb2.LogEntry.FromString(leaf.entry) for leaf in leaves]

    async def kinds(self) -> list[str]:
        """The kind of each leaf, ledger events left out since they come by themselves."""
        kinds = [entry.WhichOneof("entry") or "" for entry in await self.entries()]
        return [kind for kind in kinds if kind != "ledger_event"]


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
