"""Datasets and models on their way in and out, in chunks."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import datetime

from services.registry.artifacts.files import ArtifactFiles, Partial, stand_in
from services.registry.artifacts.opening import open_recorded
from services.registry.artifacts.readahead import ReadAhead
from services.registry.artifacts.rights import Upload, check_unnamed, expected_use, readable, size_mismatch
from services.registry.artifacts.storedwork import storage_failed, stored
from services.registry.artifacts.uploads import Uploads
from services.registry.base_models import BaseModels
from services.registry.records import Artifact
from services.registry.transaction import Reading, Store, Writing
from services.runtime.errors import InvalidArgument, OutOfRange
from tiltyard.writebehind import WriteBehind

Content = AsyncIterator[bytes | memoryview | str]
"""The bytes of an upload in order, and where it came without a digest, that among them, in hex."""

_LARGE_CHUNK_BYTES = 1024 * 1024
_SMALL_CHUNK_BYTES = 256 * 1024
# A reader that takes its time holds a few copies of its next chunk: a crowd of them gets small ones.
_FEW_DOWNLOADS = 32
# What is read ahead for each of so many may be held by slow ones.
_VERY_FEW_DOWNLOADS = 8


@dataclass(frozen=True)
class Progress:
    """How far an upload is."""

    offset: int
    complete: bool


class Artifacts:
    """Takes and gives the bytes of datasets and models."""

    def __init__(
        self,
        store: Store,
        files: ArtifactFiles,
        uploads: Uploads,
        base_models: BaseModels,
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._files = files
        self._uploads = uploads
        self._base_models = base_models
        self._clock = clock
        self._downloads = 0

    async def upload(self, caller: str, upload: Upload, content: Content) -> Artifact:
        """Take the bytes from `upload.offset` on; what came before a break is kept for the next try.

        Where the upload has no digest, that is among the bytes, and nothing is kept when they break off before it.

        Raises FailedPrecondition(UPLOAD_NOT_EXPECTED, NOT_ELIGIBLE), ResourceExhausted(TOO_LARGE, UPLOAD_QUOTA),
        OutOfRange(WRONG_OFFSET), InvalidArgument(SIZE_MISMATCH, DIGEST_MISMATCH), Aborted(UPLOAD_RUNNING),
        Unavailable(STORAGE_FAILED), PermissionDenied, NotFound.
        """
        if not upload.sha256:
            return await self._upload_unnamed(caller, upload, content)
        now = self._clock()

        def check(tx: Reading) -> Artifact | None:
            expected_use(tx, caller, upload, now)
            return _own(tx, caller, upload.sha256)

        known = await self._store.read(check)
        if known is not None and upload.offset == known.size_bytes == upload.size_bytes:
            # Here already by another use of the caller: claimed, not sent again.
            return await self._store.write(lambda tx: _claim(tx, caller, upload))
        if upload.is_base_model:
            await self._base_models.check_creator(caller)
        async with self._uploads.admitted(caller, upload):
            partial = await self._open(caller, upload)
            try:
                if partial.size != upload.offset:
                    raise _wrong_offset(partial.size)
                return await self._take(caller, upload, partial, content)
            finally:
                await stored(partial.close)

    async def _upload_unnamed(self, caller: str, upload: Upload, content: Content) -> Artifact:
        await self._store.read(lambda tx: check_unnamed(tx, caller, upload))
        if upload.is_base_model:
            await self._base_models.check_creator(caller)
        unnamed = stand_in()
        async with self._uploads.admitted(caller, replace(upload, sha256=unnamed)) as running:
            partial = await stored(lambda: self._files.open_unnamed(caller, unnamed))
            try:
                sha256 = await _receive(partial, upload, content)
                if not sha256:
                    raise InvalidArgument.field("artifact", "must come before the end where the header has none")
                named, now = replace(upload, sha256=sha256), self._clock()
                await self._store.read(lambda tx: expected_use(tx, caller, named, now))
                running.name(sha256)
                have = await self.progress(caller, sha256)
                if have.offset > partial.size:
                    raise _wrong_offset(have.offset)
                await stored(lambda: partial.name(sha256))
                return await self._take(caller, named, partial, content)
            finally:
                await stored(partial.close)

    async def _take(self, caller: str, upload: Upload, partial: Partial, content: Content) -> Artifact:
        await _receive(partial, upload, content)
        if partial.size < upload.size_bytes:
            raise size_mismatch(f"ends after {partial.size} of {upload.size_bytes} bytes; resume from there")
        async with self._uploads.placing(upload.sha256):
            if not await stored(partial.finish):
                raise InvalidArgument.field(
                    "chunk", "the bytes are not those of the digest; begin anew", reason="DIGEST_MISMATCH"
                )
            artifact = await self._store.write(lambda tx: _complete(tx, caller, upload))
        await stored(partial.settle)
        return artifact

    async def progress(self, caller: str, sha256: str) -> Progress:
        """How far the caller's upload of one artifact is."""
        known = await self._store.read(lambda tx: _own(tx, caller, sha256))
        if known is not None:
            return Progress(known.size_bytes, complete=True)
        return Progress(await stored(lambda: self._files.partial_size(caller, sha256)), complete=False)

    async def get(self, caller: str, sha256: str) -> Artifact:
        """What is known of one artifact. Raises NotFound, PermissionDenied."""
        now = self._clock()
        return await self._store.read(lambda tx: readable(tx, caller, sha256, now))

    async def download(self, caller: str, sha256: str, *, offset: int) -> AsyncGenerator[bytes, None]:
        """The bytes from `offset` on in chunks.

        Raises NotFound, PermissionDenied, OutOfRange(WRONG_OFFSET), DataLoss, Unavailable(STORAGE_FAILED).
        """
        now = self._clock()

        def find(tx: Reading) -> Artifact:
            artifact = readable(tx, caller, sha256, now)
            size = artifact.size_bytes
            if offset > size:
                raise OutOfRange("WRONG_OFFSET", f"offset {offset} is beyond the {size} bytes", offset=str(size))
            return artifact

        file = await open_recorded(self._store, self._files, find)
        self._downloads += 1
        reading = ReadAhead(file, offset)
        try:
            while reading.left:
                chunk_bytes = _LARGE_CHUNK_BYTES if self._downloads <= _FEW_DOWNLOADS else _SMALL_CHUNK_BYTES
                # In no name of this frame, which stays as long as the reader takes.
                yield await reading.take(chunk_bytes, ahead=self._downloads <= _VERY_FEW_DOWNLOADS)
        finally:
            self._downloads -= 1
            await reading.close()

    async def _open(self, caller: str, upload: Upload) -> Partial:
        have = await stored(lambda: self._files.partial_size(caller, upload.sha256))
        if upload.offset not in (0, have):
            raise _wrong_offset(have)
        return await stored(lambda: self._files.open_partial(caller, upload.sha256, anew=upload.offset == 0))


async def _receive(partial: Partial, upload: Upload, content: Content) -> str:
    """Append what comes before a digest, which is the answer, or before the end: then it is empty."""
    try:
        behind = WriteBehind(partial.append)
        received = partial.size
        try:
            async for part in content:
                if isinstance(part, str):
                    return part
                received += len(part)
                if received > upload.size_bytes:
                    raise size_mismatch(f"more than the {upload.size_bytes} bytes announced were sent")
                await behind.put(part)
        finally:
            # Also what came before a break.
            await behind.flush()
    except OSError as error:
        raise storage_failed(error) from error
    return ""


def _wrong_offset(right: int) -> OutOfRange:
    return OutOfRange("WRONG_OFFSET", f"the upload goes on at {right}", offset=str(right))


def _own(tx: Reading, caller: str, sha256: str) -> Artifact | None:
    """The complete artifact, where the caller itself has handed it in."""
    mine = any(use.owner == caller for use in tx.artifact_uses(sha256))
    return tx.artifact(sha256) if mine else None


def _claim(tx: Writing, caller: str, upload: Upload) -> Artifact:
    known = _own(tx, caller, upload.sha256)
    if known is None:
        # Removed since it was asked for.
        raise _wrong_offset(0)
    tx.put_artifact_use(expected_use(tx, caller, upload, tx.now))
    return known


def _complete(tx: Writing, caller: str, upload: Upload) -> Artifact:
    tx.put_artifact_use(expected_use(tx, caller, upload, tx.now))
    known = tx.artifact(upload.sha256)
    if known is not None:
        return known
    artifact = Artifact(upload.sha256, upload.size_bytes, tx.now)
    tx.put_artifact(artifact)
    return artifact
