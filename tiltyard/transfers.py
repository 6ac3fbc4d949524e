"""Moves artifacts up and down in chunks, resumes what broke, and trusts no byte before its SHA-256 has been checked."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc

from tiltyard.chunks import ArtifactStub, Chunk
from tiltyard.client import PATIENCE_S, ClientError, is_transient, persist
from tiltyard.growingfile import GrowingFile
from tiltyard.registry.v1 import artifact_pb2
from tiltyard.writebehind import WriteBehind

CHUNK_BYTES = 1024 * 1024
_READ_CHUNKS = 4
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0

Progress = Callable[[int, int], None]
"""Called with the bytes moved so far and the bytes in all."""


class DigestMismatch(Exception):
    """The bytes that arrived are not those that the artifact's name promises; they have been deleted."""


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file, 32 bytes. Reads it in pieces, so that its size does not matter."""
    digest = hashlib.sha256()
    piece = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.digest()


def artifact_name(digest: bytes) -> str:
    """artifacts/{sha256 hex}."""
    return f"artifacts/{digest.hex()}"


async def upload(
    artifacts: ArtifactStub,
    path: Path,
    *,
    task: str | None = None,
    submission: str | None = None,
    digest: bytes | None = None,
    progress: Progress | None = None,
    patience_s: float = PATIENCE_S,
) -> str:
    """Uploads a file for a task (D_eval, holdout) or a submission (its model), and returns the artifact's name.

    At most one of `task` and `submission` is a resource name; without either it is a base model for a task to name. A
    broken stream goes on where the server says that it is, as long as no more than `patience_s` pass without a further
    byte; a complete artifact is not sent again. `digest` is the file's SHA-256 where it is known already.
    Raises grpc.aio.AioRpcError for what the server refuses.
    """
    if task is not None and submission is not None:
        raise ValueError("a file is for a task or for a submission")
    artifact = artifact_name(await asyncio.to_thread(file_digest, path) if digest is None else digest)
    size_bytes = await asyncio.to_thread(_size, path)
    patience = _Patience(patience_s)
    asked = artifact_pb2.GetUploadRequest(artifact=artifact)
    while True:
        at = await persist(lambda: artifacts.GetUpload(asked), patience_s=patience_s)
        # A complete artifact still has to be claimed for this purpose: a header with no bytes left to send.
        header = artifact_pb2.UploadHeader(
            artifact=artifact, size_bytes=size_bytes, offset=size_bytes if at.complete else at.offset
        )
        if task is not None:
            header.task = task
        elif submission is not None:
            header.submission = submission
        else:
            header.base_model = True
        patience.moved_to(header.offset)
        try:
            await artifacts.upload_chunks(_messages(path, header, progress))
        except grpc.aio.AioRpcError as error:
            if not _may_go_on(error) or patience.is_over():
                raise
        else:
            if progress:
                progress(size_bytes, size_bytes)
            return artifact
        await patience.pause()


def _may_go_on(error: grpc.aio.AioRpcError) -> bool:
    # Another stream of ours has not ended yet, or was still ending when the server said where it is.
    ours = ("UPLOAD_RUNNING", "WRONG_OFFSET")
    return is_transient(error) or ClientError.of(error).reason in ours


def _size(path: Path) -> int:
    return path.stat().st_size


async def _messages(
    path: Path, header: artifact_pb2.UploadHeader, progress: Progress | None
) -> AsyncIterator[artifact_pb2.UploadArtifactRequest | Chunk]:
    yield artifact_pb2.UploadArtifactRequest(header=header)
    position = header.offset
    with path.open("rb", buffering=0) as file:
        file.seek(position)

        def read() -> list[bytes]:
            return [chunk for _ in range(_READ_CHUNKS) if (chunk := file.read(CHUNK_BYTES))]

        ahead = asyncio.ensure_future(asyncio.to_thread(read))
        try:
            while chunks := await asyncio.shield(ahead):
                # Read while these are on their way; a thread for each of them would cost as much as the chunk.
                ahead = asyncio.ensure_future(asyncio.to_thread(read))
                for chunk in chunks:
                    yield Chunk(chunk)
                    position += len(chunk)
                    if progress:
                        progress(position, header.size_bytes)
        finally:
            # Before the file is closed under it.
            await asyncio.wait((ahead,))


async def download(
    artifacts: ArtifactStub,
    artifact: str,
    destination: Path,
    *,
    size_bytes: int | None = None,
    progress: Progress | None = None,
    patience_s: float = PATIENCE_S,
) -> None:
    """Downloads an artifact to `destination`, which appears whole or not at all.

    The bytes so far lie in `{destination}.part`, also after a crash, and the next call goes on from there. Raises
    DigestMismatch when the bytes are not those of the name (they are deleted), grpc.aio.AioRpcError for what the server
    refuses or when no byte comes for `patience_s`.
    """
    wanted = bytes.fromhex(artifact.removeprefix("artifacts/"))
    if size_bytes is None:
        request = artifact_pb2.GetArtifactRequest(name=artifact)
        known = await persist(lambda: artifacts.GetArtifact(request), patience_s=patience_s)
        size_bytes = known.artifact.size_bytes
    part = destination.with_name(destination.name + ".part")
    file = await asyncio.to_thread(_open_part, part, size_bytes)
    try:
        await _fetch_all(artifacts, artifact, file, size_bytes, progress, _Patience(patience_s))
        if file.digest() != wanted:
            raise DigestMismatch(f"the bytes received are not those of {artifact}")
        await asyncio.to_thread(_move_into_place, file, part, destination)
    except DigestMismatch:
        await asyncio.to_thread(part.unlink)
        raise
    finally:
        file.close()


def _open_part(part: Path, size_bytes: int) -> GrowingFile:
    part.parent.mkdir(parents=True, exist_ok=True)
    if part.exists() and part.stat().st_size > size_bytes:
        # More than there can be: the part of another artifact.
        part.unlink()
    return GrowingFile(part)


async def _fetch_all(
    artifacts: ArtifactStub,
    artifact: str,
    file: GrowingFile,
    size_bytes: int,
    progress: Progress | None,
    patience: "_Patience",
) -> None:
    while file.size < size_bytes:
        patience.moved_to(file.size)
        try:
            await _fetch(artifacts, artifact, file, size_bytes, progress)
        except grpc.aio.AioRpcError as error:
            if not is_transient(error) or patience.is_over():
                raise
        else:
            if file.size < size_bytes and patience.is_over():
                raise DigestMismatch(f"{artifact} ends after {file.size} of {size_bytes} bytes")
        if file.size < size_bytes:
            await patience.pause()


async def _fetch(
    artifacts: ArtifactStub,
    artifact: str,
    file: GrowingFile,
    size_bytes: int,
    progress: Progress | None,
) -> None:
    offset = file.size
    call = artifacts.download_chunks(artifact_pb2.DownloadArtifactRequest(name=artifact, offset=offset))
    behind = WriteBehind(file.append)
    try:
        async for message in call:
            chunk = message.chunk
            offset += len(chunk)
            if offset > size_bytes:
                call.cancel()
                raise DigestMismatch(f"{artifact} is longer than its {size_bytes} bytes")
            await behind.put(chunk)
            if progress:
                progress(offset, size_bytes)
    finally:
        # Also what came before a break.
        await behind.flush()


def _move_into_place(file: GrowingFile, part: Path, destination: Path) -> None:
    file.sync()
    part.replace(destination)


class _Patience:
    """How long to go on without getting further, and how long to pause in between."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._position = -1
        self._wait_s = _FIRST_WAIT_S
        self._give_up = time.monotonic() + patience_s

    def moved_to(self, position: int) -> None:
        if position > self._position:
            self._position = position
            self._wait_s = _FIRST_WAIT_S
            self._give_up = time.monotonic() + self._patience_s

    def is_over(self) -> bool:
        return time.monotonic() + self._wait_s > self._give_up

    async def pause(self) -> None:
        await asyncio.sleep(self._wait_s)
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
