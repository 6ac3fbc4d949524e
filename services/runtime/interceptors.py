"""What every call passes through, whatever its shape: span, log, errors, drain, identity, limits, remembered requests.

All of it is one interceptor: each further one would cost every call a wrapper, a coroutine and a handler of its own.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import structlog

from services.runtime.auth import AccessPolicy, Authenticator, maybe_caller, set_caller
from services.runtime.call_shapes import Context, Handler, streamed, surrounded
from services.runtime.drain import Conversations, Drain, draining
from services.runtime.errors import Unimplemented
from services.runtime.idempotency import InFlight, RequestMemory, RequestScope, use_memory
from services.runtime.limits import CallGate, Held, address_of
from services.runtime.messages import LetGo, MessageRoom, Turn, UnreadCalls
from services.runtime.rpc_errors import to_rpc_status
from tiltyard.calls.observed import Calls, ObservedCall, answering
from tiltyard.telemetry import metrics
from tiltyard.telemetry.tracing import Kind

Headers = Sequence[tuple[str, Any]]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]

_REFLECTION = "/grpc.reflection."
_ABOUT_SERVER = ("/grpc.health.v1.Health/", _REFLECTION)
_QUIET = (*_ABOUT_SERVER, "/grpc.channelz.")
# Refusing it costs more than answering it, and a flood from the address of whoever probes (the kubelet has its node's)
# must not have this process ended.
_PROBE = "/grpc.health.v1.Health/Check"
_SLOW_S = 1.0
_WATCHED = (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED)
_CODES = {code.value[0]: code for code in grpc.StatusCode}

_REFUSALS = metrics.Counter(
    "tiltyard.call.refusals", unit="{call}", description="Calls refused by an error of the contract, by its reason."
)

_log = structlog.get_logger("tiltyard.calls")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Surrounds each call; unknown methods pass through to gRPC's own UNIMPLEMENTED.

    Without an `authenticator` no call is asked for a token, and without a `gate` none is limited. `memory` is where
    `@idempotent` finds earlier answers. A client's stream that is silent for `stream_idle_s` seconds ends (0: never).
    """

    def __init__(
        self,
        drain: Drain,
        authenticator: Authenticator | None = None,
        policy: AccessPolicy | None = None,
        memory: RequestMemory | None = None,
        gate: CallGate | None = None,
        stream_idle_s: float = 0.0,
    ) -> None:
        self.drain = drain
        self.gate = gate
        self.messages = MessageRoom()
        self._unread = UnreadCalls()
        self._stream_idle_s = stream_idle_s
        self._authenticator = authenticator
        self._policy = policy or AccessPolicy()
        self._scope = None if memory is None else RequestScope(memory, InFlight())
        self._known: dict[str, _Known] = {}
        # Bound once: an unbound logger costs every call a new one, printed or not.
        self._log = _log.bind()

    def _method(self, name: str) -> "_Method":
        return _Method(
            name,
            free=self._policy.is_free(name),
            quiet=name.startswith(_QUIET),
            watch=name.rpartition("/")[2].startswith("Watch") or name.startswith(_REFLECTION),
            about_server=name.startswith(_ABOUT_SERVER),
            calls=None if name.startswith(_QUIET) else Calls(Kind.SERVER, name[1:]),
        )

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        known = self._known.get(method)
        if known is None or known.handler is not handler:
            known = self._known[method] = self._surround(handler, method)
        if self.gate is None or known.as_stream is None or self._unread.add():
            return known.plain
        return known.as_stream

    def _surround(self, handler: Handler, name: str) -> "_Known":
        method = self._method(name)
        around = functools.partial(self._around, method)
        # An upload has an end, and is waited for; reflection goes on until the last call has ended.
        upload = handler.request_streaming and not handler.response_streaming
        conversations = Conversations() if upload or method.about_server else self.drain.conversations
        plain = surrounded(handler, around, self._stream_idle_s, conversations)
        if handler.request_streaming:
            return _Known(handler, plain, None)
        return _Known(handler, plain, surrounded(streamed(handler), around, self._stream_idle_s, conversations))

    def _around(self, method: "_Method", context: Context) -> "_Surroundings":
        return _Surroundings(self, method, context)

    def enter(self, method: "_Method", context: Context, headers: Headers, task: asyncio.Task[Any]) -> None:
        """Names the caller for the call when its token proves one whom the policy and the limits admit, or raises."""
        self._unread.read(task)
        if self._authenticator is not None and not (method.name == _PROBE and self._probes(task)):
            self._admit(self._authenticator, method, context, headers, task)
        if self._scope is not None:
            use_memory(self._scope)

    def _probes(self, task: asyncio.Task[Any]) -> bool:
        if self.gate is None:
            return True
        if not self.gate.begin_probe():
            return False
        task.add_done_callback(self.gate.end_probe)
        return True

    def _admit(
        self,
        authenticator: Authenticator,
        method: "_Method",
        context: Context,
        headers: Headers,
        task: asyncio.Task[Any],
    ) -> None:
        authorization = None
        for key, value in headers:
            if key == "authorization":
                authorization = value
                break
        if self.gate is not None and (method.free or not authenticator.knows(authorization)):
            self.gate.admit_stranger(context.peer())
        caller = None
        if not method.free:
            caller = authenticator.authenticate(authorization)
            self._policy.check(method.name, caller)
            # Each call has its own task and so its own context: nothing to reset.
            peer = context.peer()
            set_caller(caller, "" if peer.startswith("unix:") else address_of(peer))
        if self.gate is not None:
            # Not until its method is done: a caller that takes no answer holds its call.
            task.add_done_callback(functools.partial(_end, self.gate, self.gate.begin(caller, context.peer())))

    def log_call(self, method: "_Method", code: grpc.StatusCode, duration_s: float) -> None:
        """One line a call: at level info when it failed or took long, at debug when there is nothing to learn."""
        # A watch lasts until its caller goes.
        usual = code in _WATCHED if method.watch else code is grpc.StatusCode.OK and duration_s < _SLOW_S
        remarkable = not (usual or method.quiet)
        if not remarkable and not self._log.is_enabled_for(logging.DEBUG):
            return
        caller = maybe_caller()
        (self._log.info if remarkable else self._log.debug)(
            "call",
            method=method.name,
            code=code.name,
            duration_ms=round(duration_s * 1000, 2),
            caller=caller.id if caller else None,
        )


def _end(gate: CallGate, held: Held, _task: asyncio.Task[Any]) -> None:
    gate.end(held)


@dataclass(frozen=True, slots=True)
class _Known:
    """A method's handler, the same surrounded, and surrounded as one that reads its only message from a stream."""

    handler: Handler
    plain: Handler
    as_stream: Handler | None
    """None where it reads a stream anyway."""


@dataclass(frozen=True)
class _Method:
    """What is known of a method before its first call."""

    name: str
    free: bool
    """Of tokens."""
    quiet: bool
    watch: bool
    """Whether it lasts as long as its caller likes."""
    about_server: bool
    """Health and reflection: who makes other calls asks them, too."""
    calls: Calls | None
    """As telemetry tells of them."""


class _Surroundings:
    """One call, from its first moment to its answer.

    Written out, with neither generators nor context managers of its own: they would take as long as all they surround.
    """

    __slots__ = ("_context", "_entered", "_interceptor", "_method", "_observed", "_started", "_task")

    def __init__(self, interceptor: CallInterceptor, method: _Method, context: Context) -> None:
        self._interceptor = interceptor
        self._method = method
        self._context = context
        self._entered = False
        self._observed: ObservedCall | None = None

    def turn(self) -> Turn:
        """What is held while one of its messages comes in."""
        return self._interceptor.messages.turn(self._address())

    def hold(self, size_bytes: int) -> LetGo:
        """Room for a message of that size; what it returns is to be called when that lies here no more."""
        return self._interceptor.messages.hold(self._address(), size_bytes)

    def _address(self) -> str | None:
        gate = self._interceptor.gate
        return None if gate is None else gate.counted_address(maybe_caller(), self._context.peer())

    async def __aenter__(self) -> Self:
        self._started = time.monotonic()
        headers = self._context.invocation_metadata() or ()
        calls = self._method.calls
        self._observed = answering(calls, headers) if calls is not None else None
        try:
            self._task = self._interceptor.drain.begin(self._method)
            self._entered = True
            self._interceptor.enter(self._method, self._context, headers, self._task)
            if self._method.watch:
                # It may have nothing to tell for long, and its caller asks whether there is a server at all.
                await self._context.send_initial_metadata(())
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        code: grpc.StatusCode | None = None
        interceptor, method, context = self._interceptor, self._method, self._context
        try:
            if self._entered:
                interceptor.drain.end(method, self._task)
                # A task that was cancelled keeps the error, which keeps this and the request: a circle without this.
                del self._task
            if error is None:
                return
            if isinstance(error, asyncio.CancelledError):
                if not interceptor.drain.ends(method, context):
                    code = grpc.StatusCode.CANCELLED
                    return
                error = draining()
            # With AbortError the method has answered by itself.
            if isinstance(error, Exception) and not isinstance(error, grpc.aio.AbortError):
                await _abort(method.name, context, error)
        finally:
            code = code or _code(context)
            interceptor.log_call(method, code, time.monotonic() - self._started)
            if self._observed is not None:
                self._observed.answered(code)


def _code(context: Context) -> grpc.StatusCode:
    code = context.code()
    return code if isinstance(code, grpc.StatusCode) else _CODES.get(code, grpc.StatusCode.OK)


async def _abort(method: str, context: Context, error: Exception) -> None:
    """Answers an exception by the table of rpc_errors; what nobody foresaw becomes INTERNAL with a logged id."""
    # The generated base sets the code before it raises; anybody else's NotImplementedError is a defect.
    if isinstance(error, NotImplementedError) and _code(context) is grpc.StatusCode.UNIMPLEMENTED:
        name = method.rpartition("/")[2]
        error = Unimplemented("METHOD_UNIMPLEMENTED", f"{name} is not built yet", method=method)
    status = to_rpc_status(error)
    _REFUSALS.add(reason=getattr(error, "reason", "INTERNAL"), code=status.code.name)
    await context.abort(status.code, status.message, status.trailing_metadata)
