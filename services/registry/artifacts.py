"""Datasets and models on their way in and out, in chunks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol, TypeVar

from services.registry.artifact_rights import Upload, expected_use, readable, size_mismatch
from services.registry.records import Artifact
from services.registry.transaction import Reading, Store, Writing
from services.runtime.errors import Aborted, DataLoss, InvalidArgument, OutOfRange

T = TypeVar("T")

DOWNLOAD_CHUNK_BYTES = 512 * 1024


class Partial(Protocol):
    """One upload on its way; its methods block."""

    size: int

    def append(self, chunk: bytes) -> None:
        """The next bytes."""
        ...

    def finish(self) -> bool:
        """Put the whole file in its place, durably. False where the digest is another: then nothing is kept."""
        ...

    def close(self) -> None:
        """Keep what there is for the next try."""
        ...


class ArtifactFiles(Protocol):
    """The bytes of artifacts; all methods block, and raise OSError."""

    def path(self, sha256: str) -> Path:
        """The file of a complete artifact."""
        ...

    def size(self, sha256: str) -> int:
        """Bytes of a complete artifact."""
        ...

    def read(self, sha256: str, offset: int, length: int) -> bytes:
        """Bytes of a complete artifact from `offset` on; fewer at its end."""
        ...

    def partial_size(self, owner: str, sha256: str) -> int:
        """Bytes of one participant's upload so far."""
        ...

    def open_partial(self, owner: str, sha256: str, *, anew: bool) -> Partial:
        """One participant's upload, to go on with or to begin anew."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far an upload is."""

    offset: int
    complete: bool


class Artifacts:
    """Takes and gives the bytes of datasets and models."""

    def __init__(self, store: Store, files: ArtifactFiles, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._files = files
        self._clock = clock
        self._uploading: set[tuple[str, str]] = set()

    async def upload(self, caller: str, upload: Upload, chunks: AsyncIterator[bytes]) -> Artifact:
        """Take the bytes from `upload.offset` on; what came before a break is kept for the next try.

        Raises FailedPrecondition(UPLOAD_NOT_EXPECTED), ResourceExhausted(TOO_LARGE), OutOfRange(WRONG_OFFSET),
        InvalidArgument(SIZE_MISMATCH, DIGEST_MISMATCH), Aborted(UPLOAD_RUNNING), PermissionDenied, NotFound.
        """
        key = (caller, upload.sha256)
        now = self._clock()

        def check(tx: Reading) -> Artifact | None:
            expected_use(tx, caller, upload, now)
            return _own(tx, caller, upload.sha256)

        known = await self._store.read(check)
        if known is not None and upload.offset == known.size_bytes == upload.size_bytes:
            # Here already by another use of the caller: claimed, not sent again.
            return await self._store.write(lambda tx: _complete(tx, caller, upload))
        if key in self._uploading:
            raise Aborted("UPLOAD_RUNNING", "the caller uploads this artifact in another call")
        self._uploading.add(key)
        try:
            await self._receive(caller, upload, chunks)
        finally:
            self._uploading.discard(key)
        return await self._store.write(lambda tx: _complete(tx, caller, upload))

    async def progress(self, caller: str, sha256: str) -> Progress:
        """How far the caller's upload of one artifact is."""
        known = await self._store.read(lambda tx: _own(tx, caller, sha256))
        if known is not None:
            return Progress(known.size_bytes, complete=True)
        return Progress(await asyncio.to_thread(self._files.partial_size, caller, sha256), complete=False)

    async def get(self, caller: str, sha256: str) -> Artifact:
        """What is known of one artifact. Raises NotFound, PermissionDenied."""
        now = self._clock()
        return await self._store.read(lambda tx: readable(tx, caller, sha256, now))

    async def download(self, caller: str, sha256: str, *, offset: int) -> AsyncIterator[bytes]:
        """The bytes from `offset` on in chunks. Raises NotFound, PermissionDenied, OutOfRange, DataLoss."""
        artifact = await self.get(caller, sha256)
        if offset > artifact.size_bytes:
            size = artifact.size_bytes
            raise OutOfRange("WRONG_OFFSET", f"offset {offset} is beyond the {size} bytes", offset=str(size))
        while offset < artifact.size_bytes:
            length = min(DOWNLOAD_CHUNK_BYTES, artifact.size_bytes - offset)
            chunk = await asyncio.to_thread(self._read, sha256, offset, length)
            offset += len(chunk)
            yield chunk

    def _read(self, sha256: str, offset: int, length: int) -> bytes:
        try:
            chunk = self._files.read(sha256, offset, length)
        except FileNotFoundError:
            chunk = b""
        if len(chunk) != length:
            raise DataLoss("ARTIFACT_LOST", f"the bytes of artifacts/{sha256} are gone")
        return chunk

    async def _receive(self, caller: str, upload: Upload, chunks: AsyncIterator[bytes]) -> None:
        have = await asyncio.to_thread(self._files.partial_size, caller, upload.sha256)
        if upload.offset not in (0, have):
            raise OutOfRange("WRONG_OFFSET", f"the upload goes on at {have}", offset=str(have))
        partial = await _whole(lambda: self._files.open_partial(caller, upload.sha256, anew=upload.offset == 0))
        finished = False
        try:
            async for chunk in chunks:
                if partial.size + len(chunk) > upload.size_bytes:
                    raise size_mismatch(f"more than the {upload.size_bytes} bytes announced were sent")
                await _whole(lambda chunk=chunk: partial.append(chunk))  # type: ignore[misc]
            if partial.size < upload.size_bytes:
                raise size_mismatch(f"ends after {partial.size} of {upload.size_bytes} bytes; resume from there")
            finished = True
            if not await _whole(partial.finish):
                raise InvalidArgument.field(
                    "chunk", "the bytes are not those of the digest; begin anew", reason="DIGEST_MISMATCH"
                )
        finally:
            if not finished:
                await _whole(partial.close)


async def _whole(work: Callable[[], T]) -> T:
    """Run `work` in a thread to its end, also when the caller is cancelled meanwhile: no two threads on one file."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        raise


def _own(tx: Reading, caller: str, sha256: str) -> Artifact | None:
    """The complete artifact, where the caller itself has handed it in."""
    mine = any(use.owner == caller for use in tx.artifact_uses(sha256))
    return tx.artifact(sha256) if mine else None


def _complete(tx: Writing, caller: str, upload: Upload) -> Artifact:
    tx.put_artifact_use(expected_use(tx, caller, upload, tx.now))
    known = tx.artifact(upload.sha256)
    if known is not None:
        return known
    artifact = Artifact(upload.sha256, upload.size_bytes, tx.now)
    tx.put_artifact(artifact)
    return artifact
