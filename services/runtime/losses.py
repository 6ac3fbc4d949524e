"""What a caller is told when the database is lost: that its disk is full, or that it is away, and no more."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError

from services.runtime.errors import DiskFull, Unavailable

_log = structlog.get_logger("tiltyard.database")

# What the database, not the work, is to blame for. After a lost connection SQLAlchemy asks for a rollback at every use.
LOSSES = (OperationalError, InterfaceError, PendingRollbackError)
_DISK_FULL_STATE = "53100"


def told(failure: Exception, consequence: str) -> Exception:
    """`failure`, or in place of a loss of the database what a caller is told of it."""
    if not isinstance(failure, LOSSES):
        return failure
    _log.error("the database failed", exc_info=failure)
    unavailable = (
        DiskFull(f"the disk of the service's database is full, {consequence}", resource="database")
        if _is_full_disk(failure)
        else Unavailable("DATABASE_UNAVAILABLE", f"the database cannot be used at present, {consequence}")
    )
    unavailable.__cause__ = failure
    return unavailable


@contextmanager
def loss_told(consequence: str) -> Iterator[None]:
    """Tells whoever meets a loss of the database within of it, and of its consequence."""
    try:
        yield
    except LOSSES as loss:
        raise told(loss, consequence) from loss


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether there was no room to write; what failed after that, as the way back from it does, included."""
    while error is not None:
        cause = error.orig if isinstance(error, DBAPIError) else None
        full = getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        if full or getattr(cause, "sqlstate", None) == _DISK_FULL_STATE:
            return True
        error = error.__cause__ or error.__context__
    return False
