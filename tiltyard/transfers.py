"""Moves artifacts up and down in chunks, resumes what broke, and trusts no byte before its SHA-256 has been checked."""

import asyncio
import contextlib
import errno
import fcntl
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import IO

import grpc

from tiltyard.calls.errors import pause_before_retry_s
from tiltyard.calls.resuming import not_silent
from tiltyard.chunks import ArtifactStub, Chunk
from tiltyard.client import PATIENCE_S, ClientError, is_transient, persist
from tiltyard.filedigest import file_digest, hashing
from tiltyard.growingfile import GrowingFile
from tiltyard.registry.v1 import artifact_pb2
from tiltyard.writebehind import WriteBehind

CHUNK_BYTES = 1024 * 1024
PART_SUFFIX = ".part"
"""Of the file that holds the bytes so far of a download."""
_READ_CHUNKS = 4
# The digest of less is there sooner than an answer to whether the file is.
_HASHED_FIRST_BYTES = 16 * 1024 * 1024
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
# What lies between may keep a stream open whose server has hung. Over a slow line a chunk takes its time.
_LONGEST_SILENCE_S = 120.0

Progress = Callable[[int, int], None]
"""Called with the bytes moved so far and the bytes in all."""


class DigestMismatch(Exception):
    """The bytes that arrived are not those that the artifact's name promises; they have been deleted."""


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
    byte; a complete artifact is not sent again. `digest` is the file's SHA-256 where it is known already; that of a
    large file is computed while its first bytes are on their way.
    Raises grpc.aio.AioRpcError for what the server refuses, and what reading the file or `progress` raises.
    """
    if task is not None and submission is not None:
        raise ValueError("a file is for a task or for a submission")
    size_bytes = await asyncio.to_thread(_size, path)
    header = artifact_pb2.UploadHeader(size_bytes=size_bytes)
    if task is not None:
        header.task = task
    elif submission is not None:
        header.submission = submission
    else:
        header.base_model = True
    if digest is None and size_bytes < _HASHED_FIRST_BYTES:
        digest = await asyncio.to_thread(file_digest, path)
    if digest is None:
        async with hashing(path) as to_come:
            arrived = await _arrived_unnamed(artifacts, path, header, to_come, progress)
            digest = await asyncio.shield(to_come)
        if arrived:
            return artifact_name(digest)
    header.artifact = artifact_name(digest)
    patience = _Patience(patience_s)
    broken: grpc.aio.AioRpcError | None = None
    asked = artifact_pb2.GetUploadRequest(artifact=header.artifact)
    while True:
        at = await persist(lambda: artifacts.GetUpload(asked), patience_s=patience_s)
        # A complete artifact still has to be claimed for this purpose: a header with no bytes left to send.
        header.offset = size_bytes if at.complete else at.offset
        patience.moved_to(header.offset)
        # Asked only now: the stream that broke may have brought something for hours.
        if broken is not None and patience.is_over():
            raise broken
        try:
            await _send(artifacts, _messages(path, header, None, progress))
        except grpc.aio.AioRpcError as error:
            least_s = pause_before_retry_s(error) or 0.0
            if not _may_go_on(error) or least_s > patience_s:
                raise
            broken = error
        else:
            if progress:
                progress(size_bytes, size_bytes)
            return header.artifact
        await patience.pause(least_s)


async def _arrived_unnamed(
    artifacts: ArtifactStub,
    path: Path,
    header: artifact_pb2.UploadHeader,
    digest: asyncio.Future[bytes],
    progress: Progress | None,
) -> bool:
    """Whether all arrived in one stream that began before the digest was known. Otherwise it has to be known first."""
    try:
        await _send(artifacts, _messages(path, header, digest, progress))
    except grpc.aio.AioRpcError as error:
        # What is there already needs no room.
        if not _may_go_on(error) and ClientError.of(error).reason != "UPLOAD_QUOTA":
            raise
        return False
    return True


def _may_go_on(error: grpc.aio.AioRpcError) -> bool:
    # Another stream of ours has not ended yet, or was still ending when the server said where it is.
    ours = ("UPLOAD_RUNNING", "WRONG_OFFSET")
    return is_transient(error) or ClientError.of(error).reason in ours


def _size(path: Path) -> int:
    # What cannot be read is told before anything is sent.
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


async def _send(
    artifacts: ArtifactStub, messages: AsyncGenerator[artifact_pb2.UploadArtifactRequest | Chunk, None]
) -> None:
    """One stream. What ends the messages, as a file that can't be read on, is raised as it is.

    grpc.aio by itself cancels the call, and with it whoever waits for it.
    """
    failed: list[Exception] = []

    async def told() -> AsyncGenerator[artifact_pb2.UploadArtifactRequest | Chunk, None]:
        try:
            async with contextlib.aclosing(messages):
                async for message in messages:
                    yield message
        except Exception as error:
            failed.append(error)
            raise

    try:
        await artifacts.upload_chunks(told())
    except (asyncio.CancelledError, grpc.aio.AioRpcError):
        if failed:
            raise failed[0] from None
        raise


async def _messages(
    path: Path,
    header: artifact_pb2.UploadHeader,
    digest: asyncio.Future[bytes] | None,
    progress: Progress | None,
) -> AsyncGenerator[artifact_pb2.UploadArtifactRequest | Chunk, None]:
    """The header and all after it, the name among the chunks as soon as its `digest` is there."""
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
                if digest is not None and digest.done():
                    yield artifact_pb2.UploadArtifactRequest(artifact=artifact_name(digest.result()))
                    digest = None
        finally:
            # Before the file is closed under it.
            await asyncio.wait((ahead,))
    if digest is not None:
        # Waited for once more, should the stream break meanwhile.
        yield artifact_pb2.UploadArtifactRequest(artifact=artifact_name(await asyncio.shield(digest)))


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

    The bytes so far lie in `{destination}.part`, also after a crash, and the next call goes on from there; where they
    turn out to be of something else it begins anew. Raises DigestMismatch when the bytes are not those of the name
    (they are deleted), grpc.aio.AioRpcError for what the server refuses or when no byte comes for `patience_s`; that an
    open stream brings nothing is noticed after two minutes. Raises BlockingIOError while another download to the same
    destination runs.
    """
    if size_bytes is None:
        request = artifact_pb2.GetArtifactRequest(name=artifact)
        known = await persist(lambda: artifacts.GetArtifact(request), patience_s=patience_s)
        size_bytes = known.artifact.size_bytes
    part = destination.with_name(destination.name + PART_SUFFIX)
    while True:
        with _alone(part):
            file = await asyncio.to_thread(_open_part, part, size_bytes)
            begun = file.size
            try:
                await _fetch_all(artifacts, artifact, file, size_bytes, progress, _Patience(patience_s))
                if artifact_name(file.digest()) == artifact:
                    await asyncio.to_thread(_move_into_place, file, part, destination)
                    return
                if not begun:
                    raise DigestMismatch(f"the bytes received are not those of {artifact}")
                # What lay there was of another artifact, or did not survive a loss of power: once more, without it.
                await asyncio.to_thread(part.unlink)
            except DigestMismatch:
                await asyncio.to_thread(part.unlink)
                raise
            finally:
                file.close()


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Holds the file of the bytes so far, made when it isn't there. Raises BlockingIOError while another does.

    Two who append to one file would both find the digest of what they have written right, and leave a wrong file. The
    kernel lets go of it however the process ends.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with part.open("ab") as held:
            _lock(held, part)
            if _is_at(held, part):
                yield
                return
        # Who held it has moved it into place, or deleted it, before it was ours.


def _lock(file: IO[bytes], part: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another download to the same place is running", str(part)) from None
    except OSError as error:
        # Some file systems of clusters have no locks.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _open_part(part: Path, size_bytes: int) -> GrowingFile:
    if part.stat().st_size > size_bytes:
        # More than there can be: the part of another artifact.
        os.truncate(part, 0)
    return GrowingFile(part)


async def _fetch_all(
    artifacts: ArtifactStub,
    artifact: str,
    file: GrowingFile,
    size_bytes: int,
    progress: Progress | None,
    patience: "_Patience",
) -> None:
    patience.moved_to(file.size)
    while file.size < size_bytes:
        broken: grpc.aio.AioRpcError | None = None
        least_s = 0.0
        try:
            await _fetch(artifacts, artifact, file, size_bytes, progress)
        except grpc.aio.AioRpcError as error:
            pause_s = pause_before_retry_s(error)
            if pause_s is None:
                raise
            broken, least_s = error, pause_s
        patience.moved_to(file.size)
        if file.size < size_bytes:
            if patience.is_over(least_s):
                raise broken or DigestMismatch(f"{artifact} ends after {file.size} of {size_bytes} bytes")
            await patience.pause(least_s)


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
        async for message in not_silent(call, silence_s=_LONGEST_SILENCE_S):
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

    def is_over(self, least_s: float = 0.0) -> bool:
        return time.monotonic() + max(self._wait_s, least_s) > self._give_up

    async def pause(self, least_s: float) -> None:
        await asyncio.sleep(max(self._wait_s, least_s))
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
