"""One call as its caller or its server sees it: a span, and its duration among those of its method.

After OpenTelemetry's conventions for RPC spans and metrics (https://opentelemetry.io/docs/specs/semconv/rpc/).
"""

import functools
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import grpc

from tiltyard.telemetry import metrics, tracing
from tiltyard.telemetry.tracing import Attributes, Kind, Span, TraceContext

T = TypeVar("T")
HEADER = "traceparent"

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
    return tracing.recording() or metrics.collecting()


@functools.lru_cache(maxsize=4096)
def _attributes(kind: Kind, method: str, code: str, peer: str) -> tuple[Attributes, str]:
    """What span and metric say of a call, and its error."""
    error = code if (code in _SERVER_ERRORS if kind is Kind.SERVER else code != "OK") else ""
    attributes: dict[str, str | int] = {
        "rpc.system.name": "grpc",
        "rpc.method": method,
        "rpc.response.status_code": code,
    }
    if error:
        attributes["error.type"] = error
    if peer:
        host, _, port = peer.rpartition(":")
        attributes["server.address"] = host or peer
        if port.isdigit():
            attributes["server.port"] = int(port)
    return tuple(attributes.items()), error


class ObservedCall(Span):
    """One call from its first moment to `answered`. `name` is `package.Service/Method`, `peer` the address called."""

    __slots__ = ("_started", "peer")

    def __init__(self, kind: Kind, name: str, parent: TraceContext | None, *, peer: str = "") -> None:
        super().__init__(name, kind, parent, ())
        self.peer = peer
        self._started = time.perf_counter()

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """What tells the one who is called of the trace."""
        context = self.context
        return () if context is None else ((HEADER, context.traceparent),)

    def answered(self, code: str) -> None:
        """It was answered with this status code, by its name."""
        self.attributes, self.error = _attributes(self.kind, self.name, code, self.peer)
        self.end()
        if metrics.collecting():
            durations = _ANSWERED if self.kind is Kind.SERVER else _MADE
            durations.record_under(self.attributes, time.perf_counter() - self._started)

    def failed(self, error: BaseException) -> None:
        """It was ended by an error of this side before there was an answer."""
        code = error.code() if isinstance(error, grpc.aio.AioRpcError) else grpc.StatusCode.CANCELLED
        self.answered(code.name)


def answering(method: str, headers: Sequence[tuple[str, str | bytes]]) -> ObservedCall:
    """A call that has arrived; `headers` may name the trace of its caller."""
    parent = None
    for name, value in headers:
        if name == HEADER:
            parent = tracing.parse(value) if isinstance(value, str) else None
            break
    return ObservedCall(Kind.SERVER, method[1:], parent)


def making(method: str | bytes, peer: str) -> ObservedCall | None:
    """A call that goes out to the address `peer`, as part of the span at hand; None where nobody looks."""
    if not observing():
        return None
    name = method.decode() if isinstance(method, bytes) else method
    return ObservedCall(Kind.CLIENT, name.lstrip("/"), tracing.current(), peer=peer)


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
    def __init__(self, parent: TraceContext | None, peer: str) -> None:
        self._parent = parent
        self._peer = peer

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        observed = ObservedCall(Kind.CLIENT, client_call_details.method.lstrip("/"), self._parent, peer=self._peer)
        metadata = (*(client_call_details.metadata or ()), *observed.headers)
        call = continuation(client_call_details._replace(metadata=metadata), request)
        call.add_done_callback(lambda ended: observed.answered(ended.code().name))
        return call


def observed_channel(channel: grpc.Channel, *, peer: str) -> grpc.Channel:
    """A channel for threads whose unary calls are told as parts of the span at hand; `channel` where nobody looks.

    Threads have contexts of their own: the span is the one that surrounds this call. `peer` is empty where there are
    more peers than a metric should name.
    """
    if not observing():
        return channel
    return grpc.intercept_channel(channel, _ObservingUnary(tracing.current(), peer))
