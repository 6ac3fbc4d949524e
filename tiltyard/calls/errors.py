"""What a call answers instead of a result, taken apart for programs and put in one line for people."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

# What a server that restarts answers with, or leaves unanswered.
_TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})
# Too many calls a second, or no room until somebody makes some; other quotas fill up in hours.
_SOON_OVER = frozenset({"CALL_RATE", "DISK_FULL"})


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request that was refused, by its path, and why."""

    field: str
    description: str


class ClientError(Exception):
    """What a server answered instead of a result, taken apart.

    `code` is the status code, `reason` the machine-readable reason (`NOT_ELIGIBLE`; empty when none was given),
    `retry_after_s` the wait in seconds that the server named, or None.
    """

    def __init__(
        self,
        *,
        code: grpc.StatusCode,
        message: str,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = metadata or {}
        self.violations = violations
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> "ClientError":
        """The error of a call with its google.rpc details (ErrorInfo, BadRequest, RetryInfo) read.

        Details that are no message, as a peer may send them, are none.
        """
        reason, metadata, retry_after_s = "", dict[str, str](), None
        violations: list[FieldViolation] = []
        for detail in _details(error):
            if isinstance(detail, error_details_pb2.ErrorInfo):
                reason, metadata = detail.reason, dict(detail.metadata)
            elif isinstance(detail, error_details_pb2.BadRequest):
                violations += [FieldViolation(each.field, each.description) for each in detail.field_violations]
            elif isinstance(detail, error_details_pb2.RetryInfo):
                retry_after_s = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
        return cls(
            code=error.code(),
            message=error.details() or "",
            reason=reason,
            metadata=metadata,
            violations=tuple(violations),
            retry_after_s=retry_after_s,
        )


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """Within it a call that fails raises ClientError instead of grpc.aio.AioRpcError."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise ClientError.of(error) from error


_KNOWN = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)


def _details(error: grpc.aio.AioRpcError) -> Iterator[Message]:
    """The details that are known here, up to the first that can't be read."""
    status = status_pb2.Status()
    with contextlib.suppress(DecodeError):
        for name, value in error.trailing_metadata() or ():
            if name == "grpc-status-details-bin" and isinstance(value, bytes):
                status.ParseFromString(value)
        for detail in status.details:
            for kind in _KNOWN:
                message = kind()
                if detail.Unpack(message):
                    yield message


def explain(error: BaseException) -> str:
    """One clear line for people on what went wrong."""
    if isinstance(error, grpc.aio.AioRpcError):
        error = ClientError.of(error)
    if not isinstance(error, ClientError):
        return str(error).replace("\n", " ") or type(error).__name__
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        return f"the service cannot be reached: {_one_line(error.message)}"
    if error.code is grpc.StatusCode.UNIMPLEMENTED:
        return "this service does not offer that yet (UNIMPLEMENTED), or the address is that of another service"
    if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "the service did not answer in time (DEADLINE_EXCEEDED)"
    line = f"{error.code.name}{f' ({error.reason})' if error.reason else ''}: {_one_line(error.message)}"
    fields = "; ".join(f"{each.field}: {each.description}" for each in error.violations)
    if fields and fields not in line:
        line += f" [{fields}]"
    if error.retry_after_s is not None:
        line += f" (try again in {error.retry_after_s:g} s)"
    return line


def _one_line(text: str) -> str:
    return " ".join(text.split())


def is_transient(error: grpc.aio.AioRpcError) -> bool:
    """Whether the same call may well succeed a little later, as after a restart of the server."""
    return pause_before_retry_s(error) is not None


def pause_before_retry_s(error: grpc.aio.AioRpcError) -> float | None:
    """The least seconds to wait before the same call is made again; None where waiting does not help."""
    if error.code() not in _TRANSIENT and error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        return None
    refused = ClientError.of(error)
    if error.code() in _TRANSIENT or refused.reason in _SOON_OVER:
        return refused.retry_after_s or 0.0
    return None
