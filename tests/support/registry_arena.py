"""The judging half of a registry behind a real server, with real tokens, and what its tests ask of it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from services.runtime.auth import AccessPolicy, Authenticator
from services.runtime.channels import open_peer
from services.runtime.errors import ArenaError, InvalidArgument
from services.runtime.rpc_errors import from_rpc_error
from services.runtime.server import ArenaServer, Mount
from tests.support.registry_fakes import FakeSelection, SettableClock
from tests.support.registry_world import ORIGIN, MemoryFiles, World, open_database
from tiltyard.identity import Key
from tiltyard.registry.v1 import assignment_pb2_grpc, evaluation_pb2_grpc, submission_pb2_grpc

AUDIENCE = f"{ORIGIN}/registry"


class Peer:
    """One key's stubs."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.submissions = submission_pb2_grpc.SubmissionServiceStub(channel)
        self.assignments = assignment_pb2_grpc.AssignmentServiceStub(channel)
        self.evaluations = evaluation_pb2_grpc.EvaluationServiceStub(channel)


class Arena:
    """A world that is served."""

    def __init__(self, world: World, server: ArenaServer) -> None:
        self.world = world
        self.server = server
        self._peers: dict[str, tuple[grpc.aio.Channel, Peer]] = {}

    def peer(self, key: Key) -> Peer:
        """Stubs that call as `key`'s holder."""
        if key.id not in self._peers:
            channel = open_peer(self.server.address, key=key, audience=AUDIENCE)
            self._peers[key.id] = channel, Peer(channel)
        return self._peers[key.id][1]

    async def close(self) -> None:
        """Stop serving."""
        for channel, _ in self._peers.values():
            await channel.close()
        await self.server.stop(grace_s=0)


class CalledWorld(World):
    """A world whose participants call a real server; `arena` is set once it is served."""

    arena: Arena

    async def call(self, key: Key, method: Callable[[Any, Any], Awaitable[Any]], request: Message) -> Any:
        """One call as `key`'s holder, over the wire."""
        peer = self.arena.peer(key)
        stubs = (peer.submissions, peer.assignments, peer.evaluations)
        (stub,) = [getattr(each, method.__name__) for each in stubs if hasattr(each, method.__name__)]
        return await stub(request)


@asynccontextmanager
async def served(folder: Path, *, clock: SettableClock | None = None, selection: Any = None) -> AsyncIterator[Arena]:
    """A registry over a fresh database in `folder`, with a selector in memory or the one given."""
    clock = clock or SettableClock()
    database = open_database(folder, clock)
    world = CalledWorld(database, clock, selection or FakeSelection(clock), MemoryFiles())
    mounts = [
        Mount(
            f"tiltyard.registry.v1.{name}Service",
            lambda server, add=add, servicer=servicer: add(servicer, server),  # type: ignore[misc]
        )
        for name, add, servicer in (
            ("Submission", submission_pb2_grpc.add_SubmissionServiceServicer_to_server, world.submission_servicer),
            ("Assignment", assignment_pb2_grpc.add_AssignmentServiceServicer_to_server, world.assignment_servicer),
            ("Evaluation", evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server, world.evaluation_servicer),
        )
    ]
    server = ArenaServer(
        "127.0.0.1:0",
        mounts,
        authenticator=Authenticator([AUDIENCE]),
        policy=AccessPolicy(),
        remembered=database,
    )
    await server.start()
    await server.set_serving(True)
    arena = world.arena = Arena(world, server)
    try:
        yield arena
    finally:
        await arena.close()
        await database.close()


async def refusal(call: Awaitable[Any]) -> ArenaError:
    """The domain's error that a call was answered with."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError(f"was answered: {answer}")


def bad_fields(error: ArenaError) -> list[str]:
    """Which fields an INVALID_ARGUMENT names."""
    assert isinstance(error, InvalidArgument), error
    return [violation.field for violation in error.violations]
