"""Artifacts as objects of an S3-compatible bucket; uploads are received on this machine and put there when whole."""

import contextlib
import errno
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from services.registry.artifacts.directory import UploadFolder
from services.registry.artifacts.files import Stored

_BLOCK_BYTES = 8 << 20
_LEAST_BYTES = 1 << 20
# What one put has in memory: parts at once, each of this size.
_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 4


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """What goes wrong in the bucket, as the error that a disk would raise."""
    try:
        yield
    except OSError:
        raise
    except BaseError as error:
        # The first line; the rest is for the library's authors.
        raise OSError(errno.EIO, str(error).partition("\n")[0]) from error


class BucketObject:
    """An object that is read by position, a block ahead: small reads cost one request each MiB, chunks one for four."""

    def __init__(self, store: S3Store, key: str) -> None:
        self._store = store
        self._key = key
        self._block = b""
        self._block_offset = 0
        with _os_errors():
            self.size = obstore.head(store, key)["size"]

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset` on; fewer at the end."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        at = offset - self._block_offset
        if at < 0 or at + length > len(self._block):
            # Four chunks ahead: a crowd of readers, who get small chunks, holds little.
            ahead = min(max(4 * length, _LEAST_BYTES), _BLOCK_BYTES)
            wanted = min(max(length, ahead), self.size - offset)
            with _os_errors():
                self._block = bytes(obstore.get_range(self._store, self._key, start=offset, length=wanted))
            self._block_offset, at = offset, 0
        return self._block[at : at + length]

    def close(self) -> None:
        """Let go of the block."""
        self._block = b""


class BucketFiles(UploadFolder):
    """`{url}/ab/abcdef...`. Credentials, region and endpoint come from AWS_* variables. All methods block.

    An upload lies in `spool` until all its bytes are there and its digest is right, so that a broken one is resumed
    without a request to the bucket; an object appears there whole.
    """

    def __init__(self, url: str, spool: Path, *, keep_free_bytes: int = 0) -> None:
        self._store = S3Store.from_url(url, retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=20)})
        self._spool = spool
        super().__init__(
            spool / "uploads",
            place=self._put,
            placed_size=lambda sha256: self.open(sha256).size,
            keep_free_bytes=keep_free_bytes,
        )

    def open(self, sha256: str) -> BucketObject:
        """A complete artifact."""
        return BucketObject(self._store, _key(sha256))

    @contextlib.contextmanager
    def local(self, sha256: str) -> Iterator[Path]:
        """A copy on this machine."""
        # Without a name: nothing is left over, however the process ends.
        with tempfile.TemporaryFile(dir=self._spool) as file:
            with _os_errors():
                for block in obstore.get(self._store, _key(sha256)).stream(min_chunk_size=_BLOCK_BYTES):
                    file.write(block)
            file.flush()
            yield Path(f"/dev/fd/{file.fileno()}")

    def stored(self, prefix: str) -> Sequence[Stored]:
        """Complete files whose digests begin with these two hex digits."""
        with _os_errors():
            pages = list(obstore.list(self._store, prefix))
        return [Stored(each["path"].rpartition("/")[2], each["last_modified"]) for page in pages for each in page]

    def remove(self, sha256: str) -> None:
        """Remove a complete file, if it is there."""
        with _os_errors(), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, _key(sha256))

    def _put(self, partial: Path, sha256: str) -> None:
        with _os_errors():
            obstore.put(self._store, _key(sha256), partial, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)
        partial.unlink()


def _key(sha256: str) -> str:
    return f"{sha256[:2]}/{sha256}"
