"""What the domain asks of the place where the bytes of artifacts lie, be it a directory or a bucket."""

import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

_UNNAMED = "unnamed-"


def stand_in() -> str:
    """Stands for the digest of one upload until that is known. Never the same, so nothing is found by it later."""
    return f"{_UNNAMED}{secrets.token_hex(16)}"


class Partial(Protocol):
    """One upload on its way; its methods block, and raise OSError. Used by one thread at a time."""

    @property
    def size(self) -> int:
        """Bytes so far."""
        ...

    def append(self, chunks: Sequence[bytes | memoryview]) -> None:
        """The next bytes, out of this process at once: they survive its death."""
        ...

    def finish(self) -> bool:
        """Put the whole file in its place, durably. False where the digest is another: then nothing is kept.

        Until `settle` the upload stays known as complete, so that a process that dies before the artifact is on record
        costs its owner no further byte.
        """
        ...

    def settle(self) -> None:
        """The artifact is on record: forget the upload."""
        ...

    def close(self) -> None:
        """Keep what there is for the next try."""
        ...


class UnnamedPartial(Partial, Protocol):
    """An upload whose digest is not known yet: nothing is kept of it when it is closed before it has a name."""

    def name(self, sha256: str) -> None:
        """Go on as the upload of this digest, in place of what was kept of that one."""
        ...


class StoredFile(Protocol):
    """A complete artifact, open for reading; its methods block, and raise OSError."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset` on; fewer at the end."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@dataclass(frozen=True)
class OpenUpload:
    """What is kept of an upload that has not become an artifact. `change_time` is when its last bytes came."""

    owner: str
    sha256: str
    """Or what stands for it."""
    size_bytes: int
    change_time: datetime

    @property
    def is_named(self) -> bool:
        """Whether its owner may go on with it. Otherwise it runs now, or is a dead process's."""
        return not self.sha256.startswith(_UNNAMED)


@dataclass(frozen=True)
class Stored:
    """A complete file, whether or not it is on record."""

    sha256: str
    change_time: datetime


class ArtifactFiles(Protocol):
    """The bytes of artifacts and of uploads; all methods block, and raise OSError, FileNotFoundError among them."""

    def open(self, sha256: str) -> StoredFile:
        """A complete artifact."""
        ...

    def local(self, sha256: str) -> AbstractContextManager[Path]:
        """A complete artifact as a file to be mapped into memory, while the context lasts."""
        ...

    def stored(self, prefix: str) -> Sequence[Stored]:
        """Complete files whose digests begin with these two hex digits."""
        ...

    def remove(self, sha256: str) -> None:
        """Remove a complete file, if it is there."""
        ...

    def partial_size(self, owner: str, sha256: str) -> int:
        """Bytes of one participant's upload so far."""
        ...

    def open_partial(self, owner: str, sha256: str, *, anew: bool) -> Partial:
        """One participant's upload, to go on with or to begin anew."""
        ...

    def open_unnamed(self, owner: str, stand_in: str) -> UnnamedPartial:
        """A new upload of one participant, whose digest is not known yet."""
        ...

    def open_uploads(self, owner: str | None = None) -> Sequence[OpenUpload]:
        """What is kept of one participant's uploads, or of everybody's."""
        ...

    def remove_partial(self, owner: str, sha256: str) -> None:
        """Forget an upload, if there is one."""
        ...
