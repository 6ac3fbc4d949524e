"""One call as its caller or its server sees it: a span, and its duration among those of its method.

After OpenTelemetry's conventions for RPC spans and metrics (https://opentelemetry.io/docs/specs/semconv/rpc/).
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import grpc

from tiltyard import metrics, tracing
from tiltyard.tracing import Attributes, Kind, Span, TraceContext

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


def answering(method: str, headers: Sequence[tuple[str, str | bytes]]) -> ObservedCall:
    """A call that has arrived; `headers` may name the trace of its caller."""
    parent = None
    for name, value in headers:
        if name == HEADER:
            parent = tracing.parse(value) if isinstance(value, str) else None
            break
    return ObservedCall(Kind.SERVER, method[1:], parent)


def _code_of(call: Any) -> str:
    """The status of a call that is over. grpc.aio offers it as a coroutine, which has nothing to wait for by then."""
    asked = call.code()
    try:
        asked.send(None)
    except StopIteration as answered:
        code: grpc.StatusCode = answered.value
        return code.name
    asked.close()
    return grpc.StatusCode.UNKNOWN.name


class _Observing:
    def __init__(self, address: str) -> None:
        self._address = address

    async def _call(self, continuation: Any, details: Any, request: Any) -> Any:
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        observed = ObservedCall(Kind.CLIENT, method.lstrip("/"), tracing.current(), peer=self._address)
        if observed.headers:
            details = details._replace(metadata=grpc.aio.Metadata(*(details.metadata or ()), *observed.headers))
        try:
            call = await continuation(details, request)
        except BaseException:
            observed.answered(grpc.StatusCode.CANCELLED.name)
            raise
        call.add_done_callback(lambda ended: observed.answered(_code_of(ended)))
        return call


# gRPC files an interceptor under the first shape it finds: each shape needs a class of its own.
class _UnaryUnary(_Observing, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._call(continuation, client_call_details, request)


class _UnaryStream(_Observing, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._call(continuation, client_call_details, request)


class _StreamUnary(_Observing, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._call(continuation, client_call_details, request_iterator)


class _StreamStream(_Observing, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._call(continuation, client_call_details, request_iterator)


def observing_interceptors(address: str) -> Sequence[grpc.aio.ClientInterceptor]:
    """Interceptors for a channel to `address`: none where nobody would look, so that a call costs nothing then."""
    if not observing():
        return []
    return [_UnaryUnary(address), _UnaryStream(address), _StreamUnary(address), _StreamStream(address)]
