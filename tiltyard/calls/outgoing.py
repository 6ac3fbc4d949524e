"""What every outgoing call passes through, whatever its shape: token, deadline, breaker, request id, telemetry."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any

import grpc

from tiltyard.calls.breaker import CircuitBreaker
from tiltyard.calls.observed import CallsMade, ObservedCall, at_once
from tiltyard.identity import TokenSource

DEADLINE_S = 20.0
STREAM_DEADLINE_S = 3600.0
"""Streams end sooner or later, too: a watch or a transfer that does goes on where it was."""

_DETAILS_KEY = "grpc-status-details-bin"
_WRITE_FAILED = "Internal error from Core"
# A stream that its caller ends, or lets run into its deadline, says nothing of the peer.
_OURS = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


class _Outgoing:
    """Shared by the four interceptors of a channel; without `tokens` calls are not signed.

    Telemetry has no interceptor of its own: each one costs a call a tenth of its time.
    """

    def __init__(self, address: str, tokens: TokenSource | None, deadline_s: float, breaker: CircuitBreaker) -> None:
        self._tokens = tokens
        self._deadline_s = deadline_s
        self._breaker = breaker
        self._made = CallsMade(address)

    def _prepared(self, details: Any, deadline_s: float, observed: ObservedCall | None) -> grpc.aio.ClientCallDetails:
        """The call with token, deadline and trace. Raises AioRpcError instead of calling a peer that is dead."""
        self._breaker.admit()
        metadata = details.metadata
        headers = observed.headers if observed is not None else ()
        if self._tokens is not None:
            headers = (*headers, ("authorization", f"Bearer {self._tokens.token()}"))
        if headers:
            metadata = (*metadata, *headers) if metadata else headers
        timeout = deadline_s if details.timeout is None else details.timeout
        return grpc.aio.ClientCallDetails(
            details.method, timeout, metadata, details.credentials, details.wait_for_ready
        )

    async def _stream(self, continuation: Any, details: Any, requests: Any) -> tuple[Any, "_Stream"]:
        """A call with a stream in it, which goes on after this."""
        observed = self._made.begin(details.method)
        try:
            call = await continuation(self._prepared(details, STREAM_DEADLINE_S, observed), requests)
        except BaseException as error:
            if observed is not None:
                observed.failed(error)
            raise
        stream = _Stream(self._breaker, observed, self._deadline_s)
        call.add_done_callback(stream.over)
        return call, stream

    async def _messages(self, continuation: Any, details: Any, requests: Any) -> Any:
        call, stream = await self._stream(continuation, details, requests)
        return _Messages(call, stream.brought)


class _Stream:
    """What one stream says of the peer, to the breaker and to telemetry.

    A message is an answer when it comes, not when the stream ends. Unanswered is one that finds nobody: it ends without
    a message or a reason, and before a unary call would have. A watch that was silent for longer had a peer.
    """

    __slots__ = ("_breaker", "_deadline_s", "_observed", "_started", "_told")

    def __init__(self, breaker: CircuitBreaker, observed: ObservedCall | None, deadline_s: float) -> None:
        self._breaker = breaker
        self._observed = observed
        self._deadline_s = deadline_s
        self._started = time.monotonic()
        self._told = False

    def brought(self) -> None:
        """A first message has come."""
        self._told = True
        self._breaker.answered()

    def over(self, call: Any) -> None:
        """The stream has ended."""
        code = at_once(call.code()) or grpc.StatusCode.UNKNOWN
        if self._observed is not None:
            self._observed.answered(code)
            self._observed = None  # a failed write may change the status once more
        if self._told or code in _OURS:
            return
        self._told = True
        if code is not grpc.StatusCode.UNAVAILABLE or _DETAILS_KEY in (at_once(call.trailing_metadata()) or ()):
            self._breaker.answered()
        elif time.monotonic() - self._started < self._deadline_s:
            self._breaker.unanswered()


class _Messages:
    """The messages of a stream; tells when the first has come. The others cost nothing more."""

    __slots__ = ("_brought", "_first", "_next")

    def __init__(self, call: Any, brought: Callable[[], None]) -> None:
        self._next = aiter(call).__anext__
        self._brought = brought
        self._first = True

    def __aiter__(self) -> "_Messages":
        return self

    def __anext__(self) -> Awaitable[Any]:
        return self._await_first() if self._first else self._next()

    async def _await_first(self) -> Any:
        message = await self._next()
        self._first = False
        self._brought()
        return message


def _repeatable(request: Any) -> Any:
    """`request`, or a copy with a fresh request id where it has none, as in AIP-4235: the channel may send it twice."""
    if getattr(request, "request_id", None) != "":
        return request
    copy = type(request)()
    copy.CopyFrom(request)
    copy.request_id = new_request_id()
    return copy


def new_request_id() -> str:
    """A fresh idempotency key."""
    return secrets.token_hex(16)


class KeptAnswer:
    """A grpc.aio.StreamUnaryCall that keeps what the server answered while it was still written to.

    grpc.aio itself puts INTERNAL in the answer's place when a write fails after it (grpc/grpc#36066).
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._answer: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._keep)

    def _keep(self, call: Any) -> None:
        # Called again when a failed write changes the status.
        if self._answer is None:
            code, details, leading, trailing, debug = map(
                at_once,
                (
                    call.code(),
                    call.details(),
                    call.initial_metadata(),
                    call.trailing_metadata(),
                    call.debug_error_string(),
                ),
            )
            if code is not None and details != _WRITE_FAILED:
                self._answer = grpc.aio.AioRpcError(code, leading, trailing, details, debug)

    def add_done_callback(self, callback: Callable[["KeptAnswer"], None]) -> None:
        """Calls `callback` once, when there is an answer."""
        told = False

        def tell(_: Any) -> None:
            nonlocal told
            if not told:
                told = True
                callback(self)

        self._call.add_done_callback(tell)

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            return (yield from self._call.__await__())
        except grpc.aio.AioRpcError:
            if self._answer is None:
                raise
            raise self._answer from None

    async def code(self) -> grpc.StatusCode:
        """The status of the call, once it is over."""
        code: grpc.StatusCode = await self._call.code()
        return self._answer.code() if self._answer is not None else code

    async def details(self) -> str | None:
        """What the server said beside the status."""
        details: str | None = await self._call.details()
        return self._answer.details() if self._answer is not None else details

    async def trailing_metadata(self) -> grpc.aio.Metadata | None:
        """The metadata with the answer."""
        metadata: grpc.aio.Metadata | None = await self._call.trailing_metadata()
        return self._answer.trailing_metadata() if self._answer is not None else metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


# gRPC files an interceptor under the first shape it finds: each shape needs a class of its own.
class _UnaryUnary(_Outgoing, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        observed = self._made.begin(client_call_details.method)
        if observed is None:
            return (await self._call(continuation, client_call_details, request, None))[0]
        try:
            call, code = await self._call(continuation, client_call_details, request, observed)
        except BaseException as error:
            observed.failed(error)
            raise
        observed.answered(code)
        return call

    async def _call(
        self, continuation: Any, details: Any, request: Any, observed: ObservedCall | None
    ) -> tuple[Any, grpc.StatusCode]:
        """The call, over, and what it was answered with."""
        call = await continuation(self._prepared(details, self._deadline_s, observed), _repeatable(request))
        try:
            code = await call.code()
            if code is grpc.StatusCode.UNAVAILABLE:
                # A peer that says why is there: it drains, or what it needs itself is away.
                answered = _DETAILS_KEY in (await call.trailing_metadata() or ())
            else:
                # A caller's own deadline may be shorter than any answer takes.
                answered = code is not grpc.StatusCode.DEADLINE_EXCEEDED or details.timeout is not None
        except asyncio.CancelledError:
            call.cancel()
            raise
        if answered:
            self._breaker.answered()
        else:
            self._breaker.unanswered()
        return call, code


class _UnaryStream(_Outgoing, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._messages(continuation, client_call_details, request)


class _StreamUnary(_Outgoing, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        async def keeping(*arguments: Any) -> KeptAnswer:
            return KeptAnswer(await continuation(*arguments))

        return (await self._stream(keeping, client_call_details, request_iterator))[0]


class _StreamStream(_Outgoing, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._messages(continuation, client_call_details, request_iterator)


def outgoing_interceptors(
    address: str, *, tokens: TokenSource | None, deadline_s: float = DEADLINE_S
) -> Sequence[grpc.aio.ClientInterceptor]:
    """Interceptors for a channel to `address`.

    Each call carries `authorization: Bearer ...` where `tokens` are given, on plaintext channels too, and ends by its
    own deadline, `deadline_s` (unary) or `STREAM_DEADLINE_S`. Spans and durations are told where anybody looks.
    """
    breaker = CircuitBreaker(address)
    return [
        shape(address, tokens, deadline_s, breaker)
        for shape in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)
    ]
