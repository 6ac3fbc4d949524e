"""Which uploads run now, and how much each participant may hand in."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from services.registry.artifacts.files import ArtifactFiles
from services.registry.artifacts.keeping import is_pending
from services.registry.artifacts.rights import Upload
from services.registry.artifacts.storedwork import stored
from services.registry.transaction import Reading, Store
from services.runtime.errors import Aborted, ResourceExhausted

_GIB = 1 << 30


@dataclass(frozen=True)
class Quotas:
    """What one participant may hand in; the operator's settings of the same names."""

    max_open_uploads: int = 16
    """Uploads begun and not ended, running or broken off."""
    max_pending_bytes: int = 64 * _GIB
    """Bytes of open uploads, of models not revealed and of base models that no task names."""
    max_pending_artifacts: int = 1000
    """How many of these there may be: each is a file, however small."""
    max_participant_bytes: int = 1024 * _GIB
    """Bytes of all that is kept for the participant, open uploads included."""


class Running:
    """One upload among all that run, which are by owner and digest."""

    def __init__(self, running: dict[tuple[str, str], int], owner: str, sha256: str, size_bytes: int) -> None:
        self._running = running
        self._key = (owner, sha256)
        if self._key in running:
            raise Aborted("UPLOAD_RUNNING", "the caller uploads this artifact in another call")
        running[self._key] = size_bytes

    def name(self, sha256: str) -> None:
        """Go on as the upload of this digest. Raises Aborted(UPLOAD_RUNNING)."""
        (owner, _), size_bytes = self._key, self._running[self._key]
        named = Running(self._running, owner, sha256, size_bytes)
        self.end()
        self._key = named._key

    def end(self) -> None:
        """It runs no more."""
        del self._running[self._key]


class Uploads:
    """Admits uploads. One registry serves at a time, so what runs is known in this process."""

    def __init__(self, store: Store, files: ArtifactFiles, quotas: Quotas) -> None:
        self._store = store
        self._files = files
        self._quotas = quotas
        self._running: dict[tuple[str, str], int] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._placing: Counter[str] = Counter()
        """How many hold or await each lock."""

    @asynccontextmanager
    async def admitted(self, owner: str, upload: Upload) -> AsyncIterator[Running]:
        """Take in the bytes of one upload inside. Raises Aborted(UPLOAD_RUNNING), ResourceExhausted(UPLOAD_QUOTA)."""
        with self.only(owner, upload.sha256, size_bytes=upload.size_bytes) as running:
            await self._check(owner)
            yield running

    @contextmanager
    def only(self, owner: str, sha256: str, *, size_bytes: int = 0) -> Iterator[Running]:
        """Be the only one at this upload inside. Raises Aborted(UPLOAD_RUNNING)."""
        running = Running(self._running, owner, sha256, size_bytes)
        try:
            yield running
        finally:
            running.end()

    @asynccontextmanager
    async def placing(self, sha256: str) -> AsyncIterator[None]:
        """Put a file in its place, or remove it, together with its record: one at a time for each digest."""
        lock = self._locks.setdefault(sha256, asyncio.Lock())
        self._placing[sha256] += 1
        try:
            async with lock:
                yield
        finally:
            self._placing[sha256] -= 1
            if not self._placing[sha256]:
                del self._placing[sha256], self._locks[sha256]

    async def _check(self, owner: str) -> None:
        # By digest, so that what ends while this is asked for counts once, as does what gets its name. This upload is
        # among those that run, as are all that have no name yet.
        opened = await stored(lambda: self._files.open_uploads(owner))
        kept = {each.sha256: each.size_bytes for each in opened if each.is_named}
        running = {sha256: size for (whose, sha256), size in self._running.items() if whose == owner}

        def ask(tx: Reading) -> tuple[dict[str, int], set[str]]:
            uses = tx.artifacts_of(owner)
            needed = {use.sha256 for use, _ in uses if not is_pending(tx, use)}
            artifacts = {use.sha256: size for use, size in uses}
            return artifacts, artifacts.keys() - needed

        artifacts, pending = await self._store.read(ask)
        sizes = {**artifacts, **kept, **running}
        still_open = {*kept, *running}
        quotas = self._quotas
        _demand("max_open_uploads", len(still_open), quotas.max_open_uploads, "uploads begun and not ended")
        unused = pending | still_open
        _demand("max_pending_artifacts", len(unused), quotas.max_pending_artifacts, "artifacts that nothing rests on")
        unused_bytes = sum(sizes[sha256] for sha256 in unused)
        _demand("max_pending_bytes", unused_bytes, quotas.max_pending_bytes, "bytes that nothing rests on")
        _demand("max_participant_bytes", sum(sizes.values()), quotas.max_participant_bytes, "bytes in all")


def _demand(quota: str, used: int, limit: int, what: str) -> None:
    if used > limit:
        raise ResourceExhausted(
            "UPLOAD_QUOTA",
            f"with this upload the participant has {used} {what}, {quota} allows {limit}",
            quota=quota,
            limit=str(limit),
            used=str(used),
        )
