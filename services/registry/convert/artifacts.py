"""Artifacts, and the stream of an upload, in the contract's words."""

from collections.abc import AsyncIterator

from services.registry.artifacts.artifacts import Progress
from services.registry.artifacts.rights import Upload
from services.registry.convert.times import timestamp
from services.registry.records import Artifact
from services.runtime import names
from services.runtime.errors import InvalidArgument
from services.runtime.fields import FieldChecks
from tiltyard.chunks import Chunk
from tiltyard.registry.v1 import artifact_pb2

MAX_CHUNK_BYTES = 1 << 20


async def upload_of(messages: AsyncIterator[artifact_pb2.UploadArtifactRequest | Chunk], *, max_bytes: int) -> Upload:
    """The header, which is the first message; the chunks are still to come."""
    first = await anext(messages, None)
    if first is None or isinstance(first, Chunk) or first.WhichOneof("content") != "header":
        raise InvalidArgument.field("header", "must be the first message")
    header = first.header
    sha256 = names.parse_artifact(header.artifact, "header.artifact") if header.artifact else ""
    checks = FieldChecks()
    checks.range("header.size_bytes", header.size_bytes, minimum=1, maximum=max_bytes, unit="bytes")
    checks.range("header.offset", header.offset, minimum=0, maximum=max(0, header.size_bytes), unit="bytes")
    checks.require("header.offset", sha256 or not header.offset, "must be 0 where the name comes later")
    purpose = header.WhichOneof("purpose")
    named = purpose is not None and (purpose != "base_model" or header.base_model)
    checks.require("header.purpose", named, "must name a task or a submission, or say that this is a base model")
    checks.finish()
    return Upload(
        sha256=sha256,
        size_bytes=header.size_bytes,
        offset=header.offset,
        task=names.parse_task(header.task, "header.task") if purpose == "task" else None,
        submission=(
            names.parse_submission(header.submission, "header.submission") if purpose == "submission" else None
        ),
    )


async def content_of(
    messages: AsyncIterator[artifact_pb2.UploadArtifactRequest | Chunk], *, is_named: bool
) -> AsyncIterator[bytes | memoryview | str]:
    """The chunks after the header; among them the digest in hex, where the header `is_named` not."""
    async for message in messages:
        if isinstance(message, artifact_pb2.UploadArtifactRequest) and message.WhichOneof("content") == "artifact":
            if is_named:
                raise InvalidArgument.field("artifact", "has been named before")
            is_named = True
            yield names.parse_artifact(message.artifact, "artifact")
            continue
        if message.WhichOneof("content") != "chunk" or not message.chunk:
            raise InvalidArgument.field("chunk", "must hold 1 byte to 1 MiB")
        if len(message.chunk) > MAX_CHUNK_BYTES:
            description = f"has {len(message.chunk)} bytes, at most {MAX_CHUNK_BYTES} are allowed"
            raise InvalidArgument.field("chunk", description, reason="CHUNK_TOO_LARGE")
        yield message.chunk


def offset_of(request: artifact_pb2.DownloadArtifactRequest) -> int:
    """The first byte wanted."""
    if request.offset < 0:
        raise InvalidArgument.field("offset", f"is {request.offset}, must not be negative")
    return request.offset


def artifact_message(artifact: Artifact) -> artifact_pb2.Artifact:
    """An artifact as it is."""
    return artifact_pb2.Artifact(
        name=names.format_artifact(artifact.sha256),
        size_bytes=artifact.size_bytes,
        create_time=timestamp(artifact.create_time),
    )


def progress_message(progress: Progress) -> artifact_pb2.GetUploadResponse:
    """The answer of GetUpload."""
    return artifact_pb2.GetUploadResponse(offset=progress.offset, complete=progress.complete)
