"""Where artifacts lie, by the operator's setting: a directory, or an S3-compatible bucket."""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from services.registry.artifacts.directory import DirectoryFiles

if TYPE_CHECKING:
    from services.registry.artifacts.files import ArtifactFiles

BUCKET_SCHEME = "s3"


def bucket_of(place: str) -> str | None:
    """The bucket that a setting names as `s3://BUCKET/PREFIX`; None for a folder. Raises ValueError for another URL."""
    url = urlsplit(place)
    if not url.scheme or "://" not in place:
        return None
    if url.scheme != BUCKET_SCHEME or not url.hostname or url.query or url.fragment:
        raise ValueError("must be a folder or s3://BUCKET/PREFIX")
    return url.hostname


def open_artifacts(place: str, *, state_dir: Path, keep_free_bytes: int = 0) -> "ArtifactFiles":
    """The artifacts of a registry. Uploads into a bucket are received in the state folder.

    Uploads end before less than `keep_free_bytes` of the disk that they are received on would be free.
    """
    if bucket_of(place) is None:
        return DirectoryFiles(Path(place) if place else state_dir, keep_free_bytes=keep_free_bytes)
    # With the extra `s3` alone.
    from services.registry.artifacts.bucket import BucketFiles

    return BucketFiles(place, state_dir, keep_free_bytes=keep_free_bytes)
