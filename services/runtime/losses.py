"""What a caller is told when the database is lost: that it cannot be used at present, and no more."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError

from services.runtime.errors import Unavailable

_log = structlog.get_logger("tiltyard.database")

# What the database, not the work, is to blame for. After a lost connection SQLAlchemy asks for a rollback at every use.
LOSSES = (OperationalError, InterfaceError, PendingRollbackError)


def told(failure: Exception, consequence: str) -> Exception:
    """`failure`, or in place of a loss of the database what a caller is told of it."""
    if not isinstance(failure, LOSSES):
        return failure
    _log.error("the database failed", exc_info=failure)
    unavailable = Unavailable("DATABASE_UNAVAILABLE", f"the database cannot be used at present, {consequence}")
    unavailable.__cause__ = failure
    return unavailable


@contextmanager
def loss_told(consequence: str) -> Iterator[None]:
    """Tells whoever meets a loss of the database within of it, and of its consequence."""
    try:
        yield
    except LOSSES as loss:
        raise told(loss, consequence) from loss
