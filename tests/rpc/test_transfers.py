"""Downloads go on where they stopped, and wait for no server that has fallen silent."""

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tiltyard import transfers
from tiltyard.chunks import ArtifactStub
from tiltyard.registry.v1 import artifact_pb2, artifact_pb2_grpc
from tiltyard.transfers import download

CONTENT = bytes(range(256)) * 4


class FallingSilent(artifact_pb2_grpc.ArtifactServiceServicer):
    """Sends a chunk at a time and then nothing, with the stream left open; all the rest after `times` chunks."""

    def __init__(self, times: int) -> None:
        self._times = times
        self.offsets: list[int] = []
        self.left = asyncio.Semaphore(0)

    async def DownloadArtifact(
        self, request: Any, context: Any
    ) -> AsyncIterator[artifact_pb2.DownloadArtifactResponse]:
        self.offsets.append(request.offset)
        if request.offset >= 100 * self._times:
            yield artifact_pb2.DownloadArtifactResponse(chunk=CONTENT[request.offset :])
            return
        yield artifact_pb2.DownloadArtifactResponse(chunk=CONTENT[request.offset : request.offset + 100])
        try:
            await asyncio.Event().wait()
        finally:
            self.left.release()


@asynccontextmanager
async def served(servicer: FallingSilent) -> AsyncIterator[ArtifactStub]:
    server = grpc.aio.server()
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield ArtifactStub(channel)
    finally:
        await server.stop(grace=0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_LONGEST_SILENCE_S", 0.2)


async def test_a_stream_that_falls_silent_is_begun_again_where_it_was(tmp_path: Path) -> None:
    servicer, digest = FallingSilent(2), hashlib.sha256(CONTENT).hexdigest()
    async with served(servicer) as artifacts, asyncio.timeout(20):
        await download(artifacts, f"artifacts/{digest}", tmp_path / "got", size_bytes=len(CONTENT))
        assert (tmp_path / "got").read_bytes() == CONTENT
        # On a busy machine the chunk itself may come too late: the next stream begins where that one did.
        assert [offset for offset, _ in itertools.groupby(servicer.offsets)] == [0, 100, 200]
        # Nobody is left waiting at the other end.
        for _ in range(2):
            await servicer.left.acquire()


async def test_patience_ends_also_where_the_stream_stays_open(tmp_path: Path) -> None:
    servicer, digest = FallingSilent(1_000), hashlib.sha256(CONTENT).hexdigest()
    async with served(servicer) as artifacts, asyncio.timeout(20):
        with pytest.raises(grpc.aio.AioRpcError, match="nothing has come for") as given_up:
            await download(artifacts, f"artifacts/{digest}", tmp_path / "got", size_bytes=1 << 20, patience_s=0.1)
    assert given_up.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not (tmp_path / "got").exists()
