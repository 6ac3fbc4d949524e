"""The domain's errors: one small hierarchy that says what went wrong without knowing a transport."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldViolation:
    """One bad field of a request: its path (`spec.mlp.hidden[0]`) and what is wrong with it, for the caller to read."""

    field: str
    description: str


class ArenaError(Exception):
    """What a caller may be told about a failure.

    `reason` is a constant in UPPER_SNAKE that programs may branch on, `message` is for people, and `metadata` holds the
    values that the message speaks of. None of them may carry a secret.
    """

    def __init__(self, reason: str, message: str, /, **metadata: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.metadata: Mapping[str, str] = metadata


class InvalidArgument(ArenaError):
    """The request is wrong by itself, whatever the state: every bad field is named."""

    def __init__(
        self, violations: Sequence[FieldViolation], *, reason: str = "INVALID_FIELD", message: str | None = None
    ) -> None:
        super().__init__(reason, message or "; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = tuple(violations)

    @classmethod
    def field(cls, field: str, description: str, reason: str = "INVALID_FIELD") -> "InvalidArgument":
        """One bad field."""
        return cls([FieldViolation(field, description)], reason=reason)


class OutOfRange(ArenaError):
    """The request points past the end of something: an offset, an index, a log size."""


class NotFound(ArenaError):
    """The named resource does not exist."""


class AlreadyExists(ArenaError):
    """The resource to create exists already, with other content."""


class FailedPrecondition(ArenaError):
    """The state does not allow this now; the caller must change something before it tries again."""


class Aborted(ArenaError):
    """Another change came first; the caller may read again and retry."""


class PermissionDenied(ArenaError):
    """The caller is known and may not do this."""


class Unauthenticated(ArenaError):
    """The caller has not shown who it is."""


class ResourceExhausted(ArenaError):
    """A quota is used up. `retry_after_s` is the exact wait in seconds where it is known."""

    def __init__(self, reason: str, message: str, /, *, retry_after_s: float | None = None, **metadata: str) -> None:
        super().__init__(reason, message, **metadata)
        self.retry_after_s = retry_after_s


class Unavailable(ArenaError):
    """Something this answer needs cannot be reached now; the same call may succeed later."""


class DiskFull(ResourceExhausted, Unavailable):
    """A disk of this service has no room for what was to be written, so nothing was: the same call may succeed later.

    A caller is told RESOURCE_EXHAUSTED and not to hurry; to those here who wait for what is away it is away.
    `resource` is what could not be written.
    """

    REASON = "DISK_FULL"
    RETRY_AFTER_S = 10.0

    def __init__(self, message: str, /, *, resource: str) -> None:
        super().__init__(self.REASON, message, retry_after_s=self.RETRY_AFTER_S, resource=resource)


class DataLoss(ArenaError):
    """Stored bytes are gone or no longer what they were."""


class Unimplemented(ArenaError):
    """The contract knows this, this server does not yet."""
