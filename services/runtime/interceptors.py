"""What every call passes through, whatever its shape: log line, error table, drain, identity, remembered requests."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import grpc
import structlog

from services.runtime.auth import AccessPolicy, Authenticator, maybe_caller, set_caller
from services.runtime.errors import Unavailable, Unimplemented
from services.runtime.idempotency import InFlight, RequestMemory, use_memory
from services.runtime.rpc_errors import to_rpc_status

# grpc types neither handlers nor contexts usefully: messages are of any type here.
Handler = Any
Context = Any
Around = Callable[[Context], AbstractAsyncContextManager[None]]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]

_HEALTH = "/grpc.health.v1.Health/"
_QUIET = (_HEALTH, "/grpc.reflection.", "/grpc.channelz.")

_log = structlog.get_logger("tiltyard.calls")


def _surrounded(handler: Handler, around: Around) -> Handler:
    """`handler` with every call inside `around(context)`, for all four shapes.

    A servicer method may be an async method, an async generator, a coroutine that reads and writes on the context, or
    the plain function that the generated base answers UNIMPLEMENTED with.
    """

    def unary(behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with around(context):
                answer = behaviour(request, context)
                return await answer if inspect.isawaitable(answer) else answer

        return call

    def stream(behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            async with around(context):
                answers = behaviour(request, context)
                if inspect.isawaitable(answers):
                    await answers
                elif answers is not None:
                    async with aclosing(answers):
                        async for answer in answers:
                            yield answer

        return call

    coders = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(stream(handler.stream_stream), **coders)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(unary(handler.stream_unary), **coders)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream(handler.unary_stream), **coders)
    return grpc.unary_unary_rpc_method_handler(unary(handler.unary_unary), **coders)


class _CallInterceptor(grpc.aio.ServerInterceptor):
    """Puts one async context manager around each call; unknown methods pass through to gRPC's own UNIMPLEMENTED."""

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not self.covers(handler_call_details.method):
            return handler
        return _surrounded(handler, lambda context: self.around(handler_call_details.method, context))

    def covers(self, method: str) -> bool:
        """Whether `method` (`/pkg.Service/Method`) is this interceptor's business."""
        return True

    def around(self, method: str, context: Context) -> AbstractAsyncContextManager[None]:
        """What happens before and after one call."""
        raise NotImplementedError


def _code(context: Context) -> grpc.StatusCode:
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((known for known in grpc.StatusCode if known.value[0] == code), grpc.StatusCode.OK)


class RequestLogInterceptor(_CallInterceptor):
    """One line a call: method, code, duration_ms, caller. Health, reflection and channelz show at level debug only."""

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        started = time.monotonic()
        code: grpc.StatusCode | None = None
        try:
            yield
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        finally:
            caller = maybe_caller()
            level = "debug" if method.startswith(_QUIET) else "info"
            getattr(_log, level)(
                "call",
                method=method,
                code=(code or _code(context)).name,
                duration_ms=round((time.monotonic() - started) * 1000, 2),
                caller=caller.id if caller else None,
            )


class ErrorInterceptor(_CallInterceptor):
    """Answers every exception by the table of rpc_errors; what nobody foresaw becomes INTERNAL with a logged id."""

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AbortError:
            raise  # the method has answered by itself
        except NotImplementedError as error:
            # The generated base sets the code before it raises; anybody else's NotImplementedError is a defect.
            known = _code(context) is grpc.StatusCode.UNIMPLEMENTED
            name = method.rpartition("/")[2]
            await _abort(
                context,
                Unimplemented("METHOD_UNIMPLEMENTED", f"{name} is not built yet", method=method) if known else error,
            )
        except Exception as error:
            await _abort(context, error)


async def _abort(context: Context, error: Exception) -> None:
    status = to_rpc_status(error)
    await context.abort(status.code, status.message, status.trailing_metadata)


class IdentityInterceptor(_CallInterceptor):
    """Lets a call through when its token proves a caller whom the policy admits, and names that caller for the call."""

    def __init__(self, authenticator: Authenticator, policy: AccessPolicy) -> None:
        self._authenticator = authenticator
        self._policy = policy

    def covers(self, method: str) -> bool:
        return not self._policy.is_free(method)

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        headers = context.invocation_metadata() or ()
        authorization = next((value for key, value in headers if key == "authorization"), None)
        caller = self._authenticator.authenticate(authorization)
        self._policy.check(method, caller)
        # Each call has its own task and so its own context: nothing to reset.
        set_caller(caller)
        yield


class MemoryInterceptor(_CallInterceptor):
    """Tells `@idempotent` methods where answers are remembered."""

    def __init__(self, memory: RequestMemory) -> None:
        self._memory = memory
        self._in_flight = InFlight()

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        use_memory(self._memory, self._in_flight)
        yield


class DrainInterceptor(_CallInterceptor):
    """Ends the streams that would never end by themselves (`Watch...`) when the server drains, with UNAVAILABLE.

    Their callers then watch another server, or this one after its restart; every other call is left to finish. The
    watches of health end last: they are how a client learns of the drain.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._watching: set[asyncio.Task[Any]] = set()
        self._watching_health: set[asyncio.Task[Any]] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def around(self, method: str, context: Context) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None  # a call is a task
        watching = method.rpartition("/")[2].startswith("Watch")
        if watching and self._draining:
            raise _draining()
        group = self._group(method, watching)
        group.add(task)
        self._note_idle()
        try:
            yield
        except asyncio.CancelledError:
            if watching and self._draining and not context.cancelled():
                raise _draining() from None
            raise
        finally:
            group.discard(task)
            self._note_idle()

    def _group(self, method: str, watching: bool) -> set[asyncio.Task[Any]]:
        if method.startswith(_HEALTH):
            return self._watching_health
        return self._watching if watching else self._running

    def _note_idle(self) -> None:
        if self._running or self._watching:
            self._idle.clear()
        else:
            self._idle.set()

    async def drain(self) -> None:
        """Ends the watches, now and from now on, and health's when no other call is left."""
        self._draining = True
        for task in list(self._watching):
            task.cancel()
        await self._idle.wait()
        for task in list(self._watching_health):
            task.cancel()


def _draining() -> Unavailable:
    return Unavailable("SERVER_DRAINING", "this server is stopping, watch again")
