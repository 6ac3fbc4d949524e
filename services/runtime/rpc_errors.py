"""The one table between the domain's errors and gRPC's status codes, in both directions."""

import contextlib
import secrets
from dataclasses import dataclass

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from services.runtime import errors
from services.runtime.errors import ArenaError, DiskFull, FieldViolation, InvalidArgument, ResourceExhausted

DOMAIN = "tiltyard"
STATUS_CODES: dict[type[ArenaError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DataLoss: grpc.StatusCode.DATA_LOSS,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
}

_DETAILS_KEY = "grpc-status-details-bin"
# Trailers above 8 KiB are dropped by clients, and the status with them.
_MAX_VIOLATIONS = 20
_MAX_TEXT_CHARS = 200
_MAX_MESSAGE_CHARS = 800

_log = structlog.get_logger("tiltyard.errors")


@dataclass(frozen=True)
class RpcStatus:
    """What goes over the wire: a code, a text, and the serialised google.rpc.Status beside them."""

    code: grpc.StatusCode
    message: str
    details: bytes

    @property
    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """The trailers that carry the details."""
        return ((_DETAILS_KEY, self.details),)


def _shortened(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def _status_code(error: ArenaError) -> grpc.StatusCode:
    for kind in type(error).__mro__:
        if kind in STATUS_CODES:
            return STATUS_CODES[kind]
    return grpc.StatusCode.INTERNAL


def _packed(code: grpc.StatusCode, message: str, details: list[Message]) -> RpcStatus:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return RpcStatus(code, message, status.SerializeToString())


def to_rpc_status(error: Exception) -> RpcStatus:
    """The status of any exception: an ArenaError by the table, all else INTERNAL with a logged id and no detail."""
    if not isinstance(error, ArenaError):
        return _internal(error)
    message = _shortened(error.message, _MAX_MESSAGE_CHARS)
    metadata = {key: _shortened(value, _MAX_TEXT_CHARS) for key, value in error.metadata.items()}
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    if isinstance(error, InvalidArgument):
        violations = [
            error_details_pb2.BadRequest.FieldViolation(
                field=_shortened(violation.field, _MAX_TEXT_CHARS),
                description=_shortened(violation.description, _MAX_TEXT_CHARS),
            )
            for violation in error.violations[:_MAX_VIOLATIONS]
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if isinstance(error, ResourceExhausted) and error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return _packed(_status_code(error), message, details)


def _internal(error: Exception) -> RpcStatus:
    error_id = secrets.token_hex(8)
    _log.error("internal error", error_id=error_id, exc_info=error)
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"error_id": error_id})
    return _packed(grpc.StatusCode.INTERNAL, f"internal error {error_id}", [info])


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break  # a peer's broken details leave the code and the text
    return status_pb2.Status()


def from_rpc_error(error: grpc.aio.AioRpcError) -> ArenaError:
    """The ArenaError that a peer answered with: class by the table reversed, reason, metadata and details kept.

    Codes that no ArenaError stands for (DEADLINE_EXCEEDED, CANCELLED, INTERNAL, UNKNOWN) become Unavailable: what they
    say about the peer is that the same call may succeed later.
    """
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry_info = error_details_pb2.RetryInfo()
    has_retry = False
    with contextlib.suppress(DecodeError):  # up to the first that can't be read
        for detail in _rich_status(error).details:
            detail.Unpack(info)
            detail.Unpack(bad_request)
            has_retry = detail.Unpack(retry_info) or has_retry
    code = error.code()
    reason = info.reason or code.name
    message = error.details() or code.name
    kind = next((kind for kind, known in STATUS_CODES.items() if known is code), errors.Unavailable)
    result: ArenaError
    if kind is InvalidArgument:
        violations = [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
        result = InvalidArgument(violations, reason=reason, message=message)
    elif kind is ResourceExhausted and reason == DiskFull.REASON:
        result = DiskFull(message, resource="")
    elif kind is ResourceExhausted:
        wait_s = retry_info.retry_delay.ToNanoseconds() / 1e9 if has_retry else None
        result = ResourceExhausted(reason, message, retry_after_s=wait_s)
    else:
        result = kind(reason, message)
    result.metadata = dict(info.metadata)
    return result
