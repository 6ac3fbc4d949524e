"""Connections opened and left, and uploads that trickle, against a real registry's server: the others are served."""

import asyncio
import contextlib
import os
import resource
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator

import grpc
import psutil
import pytest

from services.runtime.connections import ConnectionLimits, raise_file_limit
from services.runtime.server import ArenaServer
from tests.support.registry_server import RegistryServer, artifact_name, config_of, dataset_bytes
from tiltyard.calls.errors import ClientError
from tiltyard.client import Client, persist
from tiltyard.identity import Key
from tiltyard.registry.v1 import artifact_pb2, participant_pb2

QUICK = 500
# A connection that has said nothing yet, or no more than hello, costs a server a few buffers.
MOST_BYTES_EACH = 200_000


@contextlib.asynccontextmanager
async def left_open(port: int, count: int) -> AsyncIterator[None]:
    """Connections of a process of its own, so that files of this one are the server's alone."""
    command = [sys.executable, "-m", "tests.support.left_open", str(port), str(count)]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"%d\n" % count
        yield
    finally:
        process.kill()
        await process.wait()


async def flood(arena: RegistryServer, count: int) -> None:
    """Opens and leaves `count` connections; a participant at another address is served before, during and after."""
    registry = arena.registry
    limits = ConnectionLimits(total=2 * count, per_address=count // 5, handshake_s=2)
    server = ArenaServer(
        "127.0.0.1:0",
        registry.mounts,
        authenticator=registry.authenticator,
        policy=registry.policy,
        connections=limits,
    )
    process = psutil.Process()
    async with server, Client(Key.generate(), origin="arena.test", registry=server.address) as client:
        request = participant_pb2.ListParticipantsRequest()
        await client.participants.ListParticipants(request)
        before, files = process.memory_info().rss, process.num_fds()
        async with left_open(server.port, count), asyncio.timeout(60):
            # All of them are open there; the server has let go of all but a few.
            while process.num_fds() > files + limits.per_address + 20:
                await client.participants.ListParticipants(request)
                await asyncio.sleep(0.05)
            # Who comes now is served as well as who was there.
            async with Client(Key.generate(), origin="arena.test", registry=server.address) as newcomer:
                await newcomer.participants.ListParticipants(request, timeout=60)
            assert process.memory_info().rss - before < 50e6 + count * MOST_BYTES_EACH
        await persist(lambda: client.participants.ListParticipants(request))


@pytest.fixture
def many_files() -> Iterator[int]:
    """As many open files as the system allows, which is how many."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_file_limit()
    yield resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_connections_opened_and_left_cost_the_others_nothing(arena: RegistryServer, many_files: int) -> None:
    assert many_files > 2 * QUICK
    await flood(arena, QUICK)


@pytest.mark.soak
async def test_ten_thousand_connections_opened_and_left(arena: RegistryServer, many_files: int) -> None:
    # Until the server lets go of them.
    if many_files < 12_000:
        pytest.skip(f"this process may open {many_files} files only")
    await flood(arena, 10_000)


async def test_an_upload_that_trickles_is_ended_and_can_be_resumed(arena: RegistryServer) -> None:
    creator = await arena.participant("creator")
    dataset = dataset_bytes(arena.folder)
    await arena.create_task(creator, dataset, config=config_of(dataset))
    registry = arena.registry
    server = ArenaServer(
        "127.0.0.1:0",
        registry.mounts,
        authenticator=registry.authenticator,
        policy=registry.policy,
        remembered=registry.database,
        stream_idle_s=0.5,
    )
    async with server, Client(creator.key, origin=creator.origin, registry=server.address) as client:
        artifact = artifact_name(dataset)
        header = artifact_pb2.UploadHeader(artifact=artifact, size_bytes=len(dataset), task="tasks/t")
        call = client.artifacts.UploadArtifact()
        await call.write(artifact_pb2.UploadArtifactRequest(header=header))
        await call.write(artifact_pb2.UploadArtifactRequest(chunk=dataset[:100]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, 20)
        assert ClientError.of(caught.value).reason == "STREAM_IDLE"
        # Nobody holds the upload any more, and another stream goes on where it is.
        at = await client.artifacts.GetUpload(artifact_pb2.GetUploadRequest(artifact=artifact))
        assert at.offset in (0, 100)
        header.offset = at.offset
        call = client.artifacts.UploadArtifact()
        await call.write(artifact_pb2.UploadArtifactRequest(header=header))
        await call.write(artifact_pb2.UploadArtifactRequest(chunk=dataset[at.offset :]))
        await call.done_writing()
        assert (await call).artifact.name == artifact


async def test_a_message_over_the_limit_is_refused_and_the_rest_served(arena: RegistryServer) -> None:
    client = await arena.participant("large")
    request = participant_pb2.RegisterParticipantRequest(display_name="x" * (4 * 1024 * 1024 + 1))
    async with grpc.aio.insecure_channel(
        arena.server.address, options=[("grpc.max_send_message_length", -1)]
    ) as channel:
        call = channel.unary_unary("/tiltyard.registry.v1.ParticipantService/RegisterParticipant")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request.SerializeToString(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await client.participants.ListParticipants(participant_pb2.ListParticipantsRequest())


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="open files can't be listed here")
async def test_the_limit_of_open_files_is_raised_to_what_the_system_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1024 or before[1] == 1024
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
