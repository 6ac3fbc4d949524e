"""One active process for one database: others wait, and the first of them takes over when it goes.

The lock goes with its holder, so a process that was killed blocks nobody: on SQLite a file's lock, on PostgreSQL an
advisory lock of a session. Beside it every transaction is serializable, so that one who has lost the lock without
knowing it can still not break the log.
"""

import asyncio
import fcntl
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

import structlog
from sqlalchemy import make_url, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from services.runtime.engines import postgres_engine

_EVERY_S = 0.5

_log = structlog.get_logger("tiltyard.standby")


class _Lock(Protocol):
    def take(self) -> bool:
        """Whether this process has it now."""
        ...

    def held(self) -> bool:
        """Whether it still has it."""
        ...

    def release(self) -> None:
        """Lets it go."""
        ...


class _FileLock:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("w")

    def take(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def held(self) -> bool:
        return True

    def release(self) -> None:
        self._file.close()


class _AdvisoryLock:
    def __init__(self, url: str, name: str) -> None:
        # Of the server alone, not of the process: the same for all who name the same thing.
        self._key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        self._engine = postgres_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._connection: Connection | None = None

    def take(self) -> bool:
        try:
            if self._connection is None:
                self._connection = self._engine.connect()
            question = text("SELECT pg_try_advisory_lock(:key)")
            return bool(self._connection.execute(question, {"key": self._key}).scalar_one())
        except DBAPIError as error:
            _log.warning("the database does not answer", error=str(error.orig))
            self.release()
            return False

    def held(self) -> bool:
        try:
            return self._connection is not None and self._connection.execute(text("SELECT 1")).scalar_one() == 1
        except DBAPIError:
            return False

    def release(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None


class ActiveRole:
    """An asynchronous context: entered once this process is the active one of `name` on the database at `url`."""

    def __init__(self, url: str, name: str, *, on_loss: Callable[[], None] | None = None) -> None:
        self._name = name
        self._on_loss = on_loss or _end_process
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            self._lock: _Lock = _FileLock(Path(f"{parsed.database}.active"))
        else:
            self._lock = _AdvisoryLock(url, f"tiltyard/{name}")
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        waiting = False
        while not await asyncio.to_thread(self._lock.take):
            if not waiting:
                _log.info("standing by: another process is active", name=self._name)
                waiting = True
            await asyncio.sleep(_EVERY_S)
        if waiting:
            _log.info("taking over", name=self._name)
        self._watch = asyncio.create_task(self._mind())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait((self._watch,))
        await asyncio.to_thread(self._lock.release)

    async def _mind(self) -> None:
        """Whoever has lost the role ends: another may be active by now."""
        while await asyncio.to_thread(self._lock.held):  # noqa: ASYNC110 - nobody tells of a connection that is lost
            await asyncio.sleep(_EVERY_S)
        _log.error("the active role is lost, this process ends", name=self._name)
        self._on_loss()


def _end_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
