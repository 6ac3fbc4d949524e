"""One call as its caller or its server sees it: a span, and its duration among those of its method.

After OpenTelemetry's conventions for RPC spans and metrics (https://opentelemetry.io/docs/specs/semconv/rpc/).
"""

from collections.abc import Coroutine, Sequence
from time import monotonic_ns
from typing import Any, NamedTuple, Self, TypeVar

import grpc

from tiltyard.telemetry import metrics, tracing
from tiltyard.telemetry.metrics import Buckets
from tiltyard.telemetry.tracing import Attributes, Kind, Span

T = TypeVar("T")
HEADER = "traceparent"

_OK = grpc.StatusCode.OK

_ANSWERED = metrics.Histogram(
    "rpc.server.call.duration", unit="s", description="Duration of calls answered.", bounds=metrics.CALL_SECONDS
)
_MADE = metrics.Histogram(
    "rpc.client.call.duration", unit="s", description="Duration of calls made.", bounds=metrics.CALL_SECONDS
)
# A server's span is in error where the server is to blame, by the conventions for gRPC.
_SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


def observing() -> bool:
    """Whether calls are worth a span or a number in this process."""
    return tracing.recorder is not None or metrics.collecting


class Ending(NamedTuple):
    """What span and metric say of the calls of one method that ended alike."""

    attributes: Attributes
    error: str
    durations: Buckets


class Calls:
    """The calls of one method: those answered here, or those made to the address `peer`.

    Whoever takes part in many of them keeps this: all that they share is put together once. `method` is
    `package.Service/Method`.
    """

    __slots__ = ("_peer", "endings", "kind", "method")

    def __init__(self, kind: Kind, method: str, *, peer: str = "") -> None:
        self.kind = kind
        self.method = method
        self._peer = peer
        self.endings: dict[str, Ending] = {}

    def first_ended(self, code: str) -> Ending:
        """What is said of those that ended with this status code, kept in `endings` from now on."""
        answered = self.kind is Kind.SERVER
        error = code if (code in _SERVER_ERRORS if answered else code != "OK") else ""
        attributes: dict[str, str | int] = {
            "rpc.system.name": "grpc",
            "rpc.method": self.method,
            "rpc.response.status_code": code,
        }
        if error:
            attributes["error.type"] = error
        if self._peer:
            host, _, port = self._peer.rpartition(":")
            attributes["server.address"] = host or self._peer
            if port.isdigit():
                attributes["server.port"] = int(port)
        told = tuple(attributes.items())
        ending = Ending(told, error, (_ANSWERED if answered else _MADE).under(told))
        self.endings[code] = ending
        return ending


class ObservedCall(Span):
    """One call from its first moment to `answered`: `begin` it, or let `answering` or `CallsMade` do so."""

    __slots__ = ("calls", "started_ns")

    calls: Calls
    started_ns: int

    @classmethod
    def begin(cls, calls: Calls, parent: Span | None) -> Self:
        """One of `calls`, as part of the span `parent`."""
        call = cls(calls.method, calls.kind, parent, ())
        call.calls, call.started_ns = calls, monotonic_ns()
        return call

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """What tells the one who is called of the trace."""
        if self.sampled and self.trace_id:
            return ((HEADER, f"00-{self.trace_id}-{self.span_id}-01"),)
        return ((HEADER, self.traceparent),) if self.trace_id else ()

    def answered(self, code: grpc.StatusCode) -> None:
        """It was answered with this status code."""
        # An enumeration's `name` is a function of Python's.
        name = "OK" if code is _OK else code.name
        ending = self.calls.endings.get(name) or self.calls.first_ended(name)
        took_ns = monotonic_ns() - self.started_ns
        # As in `end`, which would cost every call another function and another look at the clock.
        if self.sampled and not self.end_ns:
            self.attributes = ending.attributes
            self.error = ending.error
            self.end_ns = self.start_ns + took_ns
            if tracing.recorder is not None:
                tracing.recorder.record(self)
        if metrics.collecting:
            ending.durations.record(took_ns / 1e9)

    def failed(self, error: BaseException) -> None:
        """It was ended by an error of this side before there was an answer."""
        self.answered(error.code() if isinstance(error, grpc.aio.AioRpcError) else grpc.StatusCode.CANCELLED)


def answering(calls: Calls, headers: Sequence[tuple[str, str | bytes]]) -> ObservedCall | None:
    """A call that has arrived, whose span is the current one of its task; None where nobody looks.

    `headers` may name the trace of its caller.
    """
    if tracing.recorder is None and not metrics.collecting:
        return None
    parent = None
    for name, value in headers:
        if name == HEADER:
            parent = value if isinstance(value, str) else None
            break
    call = ObservedCall(calls.method, calls.kind, parent, ())
    call.calls, call.started_ns = calls, monotonic_ns()
    if tracing.recorder is not None:
        # Each call has its own task and so its own context: nothing to reset.
        tracing.enter(call)
    return call


class CallsMade:
    """The calls made to the address `peer`, by their method."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._calls: dict[str | bytes, Calls] = {}

    def begin(self, method: str | bytes) -> ObservedCall | None:
        """A call to `/package.Service/Method`, as part of the span at hand; None where nobody looks."""
        if tracing.recorder is None and not metrics.collecting:
            return None
        calls = self._calls.get(method) or self.of(method)
        call = ObservedCall(calls.method, calls.kind, tracing.current(), ())
        call.calls, call.started_ns = calls, monotonic_ns()
        return call

    def of(self, method: str | bytes) -> Calls:
        """Those of `/package.Service/Method`."""
        calls = self._calls.get(method)
        if calls is None:
            name = method.decode() if isinstance(method, bytes) else method
            calls = self._calls[method] = Calls(Kind.CLIENT, name.lstrip("/"), peer=self._peer)
        return calls


def at_once(told: Coroutine[Any, Any, T]) -> T | None:
    """What grpc.aio offers as a coroutine of a call that is over, when it has nothing to wait for any more."""
    try:
        told.send(None)
    except StopIteration as answered:
        answer: T = answered.value
        return answer
    told.close()
    return None


class _ObservingUnary(grpc.UnaryUnaryClientInterceptor):
    def __init__(self, parent: Span | None, peer: str) -> None:
        self._parent = parent
        self._made = CallsMade(peer)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        observed = ObservedCall.begin(self._made.of(client_call_details.method), self._parent)
        metadata = (*(client_call_details.metadata or ()), *observed.headers)
        call = continuation(client_call_details._replace(metadata=metadata), request)
        call.add_done_callback(lambda ended: observed.answered(ended.code()))
        return call


def observed_channel(channel: grpc.Channel, *, peer: str) -> grpc.Channel:
    """A channel for threads whose unary calls are told as parts of the span at hand; `channel` where nobody looks.

    Threads have contexts of their own: the span is the one that surrounds this call. `peer` is empty where there are
    more peers than a metric should name.
    """
    if not observing():
        return channel
    return grpc.intercept_channel(channel, _ObservingUnary(tracing.current(), peer))
