"""ArtifactService over the domain's artifacts."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from services.registry.artifacts.artifacts import Artifacts
from services.registry.convert import artifacts as convert
from services.runtime.auth import current_caller
from services.runtime.names import parse_artifact
from tiltyard.chunks import Chunk
from tiltyard.registry.v1 import artifact_pb2, artifact_pb2_grpc
from tiltyard.telemetry import metrics

_RECEIVED = metrics.Counter("tiltyard.artifact.received", unit="By", description="Sizes of artifacts that are whole.")
_SENT = metrics.Counter("tiltyard.artifact.sent", unit="By", description="Bytes of artifacts sent to readers.")


class ArtifactServicer(artifact_pb2_grpc.ArtifactServiceServicer):
    """Datasets and models in chunks."""

    def __init__(self, artifacts: Artifacts, *, max_bytes: int) -> None:
        self._artifacts = artifacts
        self._max_bytes = max_bytes

    async def UploadArtifact(
        self, request_iterator: AsyncIterator[artifact_pb2.UploadArtifactRequest | Chunk], context: Any
    ) -> artifact_pb2.UploadArtifactResponse:
        messages = aiter(request_iterator)
        upload = await convert.upload_of(messages, max_bytes=self._max_bytes)
        content = convert.content_of(messages, is_named=bool(upload.sha256))
        artifact = await self._artifacts.upload(current_caller().id, upload, content)
        _RECEIVED.add(artifact.size_bytes)
        return artifact_pb2.UploadArtifactResponse(artifact=convert.artifact_message(artifact))

    async def GetUpload(self, request: artifact_pb2.GetUploadRequest, context: Any) -> artifact_pb2.GetUploadResponse:
        sha256 = parse_artifact(request.artifact, "artifact")
        return convert.progress_message(await self._artifacts.progress(current_caller().id, sha256))

    async def DownloadArtifact(self, request: artifact_pb2.DownloadArtifactRequest, context: Any) -> AsyncIterator[Any]:
        offset = convert.offset_of(request)
        caller = current_caller().id
        download = self._artifacts.download(caller, parse_artifact(request.name), offset=offset)
        # Closed with the call, whoever ends it.
        async with aclosing(download) as chunks:
            async for chunk in chunks:
                _SENT.add(len(chunk))
                message = Chunk(chunk)
                # A slow reader needs one copy here, not two.
                del chunk
                yield message

    async def GetArtifact(
        self, request: artifact_pb2.GetArtifactRequest, context: Any
    ) -> artifact_pb2.GetArtifactResponse:
        artifact = await self._artifacts.get(current_caller().id, parse_artifact(request.name))
        return artifact_pb2.GetArtifactResponse(artifact=convert.artifact_message(artifact))
