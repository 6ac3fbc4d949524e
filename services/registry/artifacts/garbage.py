"""Removes what nothing refers to: broken uploads, artifacts that nobody needs any more, files that no record names."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from functools import partial

import structlog

from services.registry.artifacts.files import ArtifactFiles, OpenUpload
from services.registry.artifacts.keeping import Keeping, removable_from
from services.registry.artifacts.storedwork import stored
from services.registry.artifacts.uploads import Uploads
from services.registry.transaction import Reading, Store, Writing
from services.runtime.errors import Aborted

# The digests by their first two digits, so that no question to the store or the files is about all of them.
_PARTS = [f"{number:02x}" for number in range(256)]
_REST_S = 3600.0

_log = structlog.get_logger("tiltyard.garbage")


class Garbage:
    """Looks at all artifacts once an hour."""

    def __init__(
        self,
        store: Store,
        files: ArtifactFiles,
        uploads: Uploads,
        clock: Callable[[], datetime],
        keeping: Keeping,
    ) -> None:
        self._store = store
        self._files = files
        self._uploads = uploads
        self._clock = clock
        self._keeping = keeping

    async def run(self) -> None:
        """Hour after hour, without end; a part that fails is logged and comes again with the next round."""
        while True:
            for prefix in ("", *_PARTS):
                try:
                    await (self.remove_part(prefix) if prefix else self.remove_uploads())
                except Exception as error:
                    _log.error("a part of the garbage could not be removed", part=prefix, exc_info=error)
            await asyncio.sleep(_REST_S)

    async def remove_part(self, prefix: str) -> int:
        """Remove what nobody needs of the artifacts whose digests begin with these two hex digits; how many it was."""
        removed = 0
        for sha256 in await self._store.read(partial(self._removable, prefix=prefix)):
            removed += await self._remove_artifact(sha256)
        on_record = frozenset(await self._store.read(lambda tx: tx.artifacts_with(prefix)))
        now = self._clock()
        for file in await asyncio.to_thread(self._files.stored, prefix):
            # Young ones may be on their way onto the record.
            if file.sha256 not in on_record and now - file.change_time > self._keeping.uploads:
                removed += await self._remove_file(file.sha256)
        return removed

    def _removable(self, tx: Reading, *, prefix: str) -> list[str]:
        return [sha256 for sha256 in tx.artifacts_with(prefix) if self._is_removable(tx, sha256)]

    def _is_removable(self, tx: Reading, sha256: str) -> bool:
        time = removable_from(tx, sha256, self._keeping)
        return time is not None and time <= self._clock()

    async def _remove_artifact(self, sha256: str) -> int:
        def forget(tx: Writing) -> bool:
            # Somebody may have come to need it since it was looked at; from here on a claim finds nothing.
            removable = self._is_removable(tx, sha256)
            if removable:
                tx.delete_artifact(sha256)
            return removable

        # The record first: a file without one is removed in a later round, a record without its file would be a lie.
        async with self._uploads.placing(sha256):
            if not await self._store.write(forget):
                return 0
            await stored(lambda: self._files.remove(sha256))
        _log.info("an artifact that nothing needs is removed", artifact=sha256)
        return 1

    async def _remove_file(self, sha256: str) -> int:
        async with self._uploads.placing(sha256):
            if await self._store.read(lambda tx: tx.artifact(sha256)) is not None:
                return 0
            await stored(lambda: self._files.remove(sha256))
        _log.info("a file that no record names is removed", artifact=sha256)
        return 1

    async def remove_uploads(self) -> int:
        """Remove uploads that have not gone on for long. Answers with how many."""
        now = self._clock()
        opened = await asyncio.to_thread(self._files.open_uploads)
        stale = [upload for upload in opened if now - upload.change_time > self._keeping.uploads]
        return sum([await self._remove_upload(upload) for upload in stale])

    async def _remove_upload(self, upload: OpenUpload) -> int:
        try:
            with self._uploads.only(upload.owner, upload.sha256):
                await stored(lambda: self._files.remove_partial(upload.owner, upload.sha256))
        except Aborted:
            # It goes on at this very moment.
            return 0
        return 1
