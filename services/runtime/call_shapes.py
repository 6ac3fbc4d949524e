"""One surrounding for calls of every shape, and their messages checked as they come in."""

import asyncio
import inspect
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Protocol, cast

import grpc
from google.protobuf.message import DecodeError

from services.runtime.drain import Conversations, draining
from services.runtime.errors import InvalidArgument, Unavailable
from services.runtime.messages import LARGE_BYTES, LetGo, Turn

# grpc types neither handlers nor contexts usefully: messages are of any type here.
Handler = Any
Context = Any


class Surrounding(Protocol):
    """A call that is being served."""

    def turn(self) -> Turn:
        """What is held while one of its messages comes in."""

    def hold(self, size_bytes: int) -> LetGo:
        """Before a large answer goes out; what it returns is to be called when that was taken. Raises ArenaError."""


Around = Callable[[Context], AbstractAsyncContextManager[Surrounding]]


class _Unfit:
    """Stands for bytes that are no message for the method; gRPC itself would answer them with an internal error."""

    def __init__(self, reason: str, message: str) -> None:
        self.error = InvalidArgument([], reason=reason, message=message)


def _decoding(decode: Callable[[bytes], Any] | None, most_bytes: float = math.inf) -> Callable[[bytes], Any] | None:
    if decode is None:
        return None

    def decoded(raw: bytes) -> Any:
        if len(raw) > most_bytes:
            return _Unfit("REQUEST_TOO_LARGE", f"a request of this method has at most {most_bytes} bytes")
        try:
            return decode(raw)
        except DecodeError:
            return _Unfit("NOT_A_MESSAGE", "the bytes are no message of this method")

    return decoded


def _request_decoding(handler: Handler) -> Callable[[bytes], Any] | None:
    # A request that is answered by a stream lies in memory as long as that: a watch lasts for hours.
    lasting = handler.response_streaming and not handler.request_streaming
    return _decoding(handler.request_deserializer, LARGE_BYTES if lasting else math.inf)


def _checked(request: Any) -> Any:
    if isinstance(request, _Unfit):
        raise request.error
    return request


class _InTime:
    """The messages of a client's stream, each whole within `idle_s` seconds (0: whenever) of the one before.

    While one comes in, `turn` is held: without it no byte more of it is taken than gRPC lets come unasked.
    No generator: one that its method leaves half read would be closed who knows when. gRPC's is one, and keeps the last
    message, until `aclose`.
    """

    def __init__(self, requests: Any, idle_s: float, turn: Turn, conversations: Conversations) -> None:
        self._requests = requests
        self._idle_s = idle_s
        self._turn = turn
        self._conversations = conversations

    def __aiter__(self) -> "_InTime":
        self._requests = aiter(self._requests)
        return self

    async def __anext__(self) -> Any:
        try:
            async with asyncio.timeout(self._idle_s or None) as patience:
                self._conversations.wait(patience)
                try:
                    async with self._turn:
                        return _checked(await anext(self._requests))
                finally:
                    self._conversations.go_on(patience)
        except TimeoutError:
            if self._conversations.over:
                raise draining() from None
            idle_s = f"{self._idle_s:g}"
            raise Unavailable("STREAM_IDLE", f"no message came for {idle_s} s", idle_s=idle_s) from None

    async def aclose(self) -> None:
        """No more of them are wanted."""
        if isinstance(self._requests, AsyncGenerator):
            await self._requests.aclose()


def _alone(abort: grpc.aio.AbortError) -> grpc.aio.AbortError:
    """The error without where it came from.

    The context of a call keeps it, and the frames on its way keep the context and the request: a circle that would live
    until the collector of cycles comes by, hundreds of megabytes later.
    """
    abort.__context__ = None
    return abort.with_traceback(None)


async def _only(requests: AsyncIterator[Any]) -> Any:
    async for request in requests:
        return request
    raise InvalidArgument([], reason="NO_MESSAGE", message="this method takes one message, and none came")


def streamed(handler: Handler) -> Handler:
    """`handler` of one message as one that reads it from a client's stream, the same on the wire.

    gRPC waits for that message before it calls a method, for as long as its caller likes; a stream's is called at once.
    """

    coders = {
        "request_deserializer": _request_decoding(handler),
        "response_serializer": handler.response_serializer,
    }
    if handler.response_streaming:

        async def answers(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            found = handler.unary_stream(await _only(requests), context)
            if inspect.isawaitable(found):
                await found
            elif found is not None:
                async with aclosing(found):
                    async for answer in found:
                        yield answer

        return grpc.stream_stream_rpc_method_handler(answers, **coders)

    async def answer(requests: AsyncIterator[Any], context: Context) -> Any:
        found = handler.unary_unary(await _only(requests), context)
        return await found if inspect.isawaitable(found) else found

    return grpc.stream_unary_rpc_method_handler(answer, **coders)


def surrounded(handler: Handler, around: Around, stream_idle_s: float, conversations: Conversations) -> Handler:
    """`handler` with every call inside `around(context)`, for all four shapes; its streams are `conversations`.

    A servicer method may be an async method, an async generator, a coroutine that reads and writes on the context, or
    the plain function that the generated base answers UNIMPLEMENTED with.
    """

    streaming, encode = handler.request_streaming, handler.response_serializer

    def encoded(answer: Any) -> Any:
        return answer if isinstance(answer, bytes) else encode(answer)

    def taken(request: Any, call: Surrounding) -> Any:
        return _InTime(request, stream_idle_s, call.turn(), conversations) if streaming else _checked(request)

    def unary(behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> Any:
            try:
                async with around(context) as call:
                    request = taken(request, call)
                    try:
                        answer = behaviour(request, context)
                        raw = encoded(await answer if inspect.isawaitable(answer) else answer)
                        if len(raw) > LARGE_BYTES:
                            # gRPC sends it when this has returned, as the last thing that the task does.
                            cast(asyncio.Task[Any], asyncio.current_task()).add_done_callback(call.hold(len(raw)))
                        return raw
                    finally:
                        if streaming:
                            await request.aclose()
            except grpc.aio.AbortError as abort:
                del request, context
                raise _alone(abort)  # noqa: B904 - it is the same error

        return call

    def stream(behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                async with around(context) as call:
                    request = taken(request, call)
                    try:
                        answers = behaviour(request, context)
                        if inspect.isawaitable(answers):
                            await answers
                        elif answers is not None:
                            async with aclosing(answers):
                                async for answer in answers:
                                    raw = encoded(answer)
                                    if len(raw) <= LARGE_BYTES:
                                        yield raw
                                        continue
                                    let_go = call.hold(len(raw))
                                    try:
                                        yield raw
                                    finally:
                                        let_go()
                    finally:
                        if streaming:
                            await request.aclose()
            except grpc.aio.AbortError as abort:
                del request, context
                raise _alone(abort)  # noqa: B904 - it is the same error

        return call

    coders = {
        "request_deserializer": _request_decoding(handler),
        # For what a method writes on the context.
        "response_serializer": encoded,
    }
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(stream(handler.stream_stream), **coders)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(unary(handler.stream_unary), **coders)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream(handler.unary_stream), **coders)
    return grpc.unary_unary_rpc_method_handler(unary(handler.unary_unary), **coders)
