"""Opens the bytes of an artifact that is on record, and tells one that is removed just then from one that is lost."""

from collections.abc import Callable

from services.registry.artifacts.files import ArtifactFiles, StoredFile
from services.registry.artifacts.storedwork import stored
from services.registry.records import Artifact
from services.registry.transaction import Reading, Store
from services.runtime.errors import DataLoss


async def open_recorded(store: Store, files: ArtifactFiles, find: Callable[[Reading], Artifact]) -> StoredFile:
    """The bytes of the artifact that `find` answers with, for the caller to close.

    Raises what `find` raises, DataLoss(ARTIFACT_LOST), Unavailable(STORAGE_FAILED).
    """
    artifact = await store.read(find)
    file = await stored(lambda: _open(files, artifact.sha256))
    if file is None:
        # Removed since it was found: then it is found no more, or was handed in again.
        artifact = await store.read(find)
        file = await stored(lambda: _open(files, artifact.sha256))
    if file is not None and file.size == artifact.size_bytes:
        return file
    if file is not None:
        await stored(file.close)
    raise DataLoss("ARTIFACT_LOST", f"the bytes of artifacts/{artifact.sha256} are gone")


def _open(files: ArtifactFiles, sha256: str) -> StoredFile | None:
    try:
        return files.open(sha256)
    except FileNotFoundError:
        return None
