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
        """Before a large message lies here; what it returns is to be called when it is gone. Raises ArenaError."""


Around = Callable[[Context], AbstractAsyncContextManager[Surrounding]]


Decode = Callable[[bytes], Any]


def _decoding(handler: Handler) -> Decode:
    """What makes a message of bytes. Raises InvalidArgument, where gRPC itself would answer with an internal error."""
    decode = handler.request_deserializer
    # A request that is answered by a stream lies in memory as long as that: a watch lasts for hours.
    lasting = handler.response_streaming and not handler.request_streaming
    most_bytes = LARGE_BYTES if lasting else math.inf

    def decoded(raw: bytes) -> Any:
        if len(raw) > most_bytes:
            message = f"a request of this method has at most {most_bytes} bytes"
            raise InvalidArgument([], reason="REQUEST_TOO_LARGE", message=message)
        try:
            return decode(raw)
        except DecodeError:
            message = "the bytes are no message of this method"
            raise InvalidArgument([], reason="NOT_A_MESSAGE", message=message) from None

    return decoded


class _InTime:
    """The messages of a client's stream, each whole within `idle_s` seconds (0: whenever) of the one before.

    While one comes in, its turn is held: without it no byte more of it is taken than gRPC lets come unasked. A large
    one is held room for until the next is asked for.
    No generator: one that its method leaves half read would be closed who knows when. gRPC's is one, and keeps the last
    message, until `aclose`.
    """

    def __init__(
        self, requests: Any, idle_s: float, call: Surrounding, decode: Decode, conversations: Conversations
    ) -> None:
        self._requests = requests
        self._idle_s = idle_s
        self._call = call
        self._turn = call.turn()
        self._decode = decode
        self._conversations = conversations
        self._let_go: LetGo | None = None

    def __aiter__(self) -> "_InTime":
        self._requests = aiter(self._requests)
        return self

    async def __anext__(self) -> Any:
        self._no_more()
        try:
            async with asyncio.timeout(self._idle_s or None) as patience:
                self._conversations.wait(patience)
                try:
                    async with self._turn:
                        raw = await anext(self._requests)
                finally:
                    self._conversations.go_on(patience)
        except TimeoutError:
            if self._conversations.over:
                raise draining() from None
            idle_s = f"{self._idle_s:g}"
            raise Unavailable("STREAM_IDLE", f"no message came for {idle_s} s", idle_s=idle_s) from None
        if len(raw) > LARGE_BYTES:
            self._let_go = self._call.hold(len(raw))
        return self._decode(raw)

    def _no_more(self) -> None:
        if self._let_go is not None:
            self._let_go()
            self._let_go = None

    async def aclose(self) -> None:
        """No more of them are wanted."""
        self._no_more()
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


def _until_done(let_go: LetGo) -> None:
    """Lets go when gRPC has sent the answer, the last thing that a call's task does: it keeps the only request, too."""
    cast(asyncio.Task[Any], asyncio.current_task()).add_done_callback(let_go)


def streamed(handler: Handler) -> Handler:
    """`handler` of one message as one that reads it from a client's stream, the same on the wire.

    gRPC waits for that message before it calls a method, for as long as its caller likes; a stream's is called at once.
    """

    coders = {
        "request_deserializer": _decoding(handler),
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

    A servicer method may be an async method, an async generator, a coroutine that writes on the context, or the plain
    function that the generated base answers UNIMPLEMENTED with.
    """

    streaming, decode, encode = handler.request_streaming, _decoding(handler), handler.response_serializer

    def encoded(answer: Any) -> Any:
        return answer if isinstance(answer, bytes) else encode(answer)

    def taken(request: Any, call: Surrounding) -> Any:
        if streaming:
            return _InTime(request, stream_idle_s, call, decode, conversations)
        if len(request) > LARGE_BYTES:
            _until_done(call.hold(len(request)))
        return decode(request)

    def unary(behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> Any:
            try:
                async with around(context) as call:
                    request = taken(request, call)
                    try:
                        answer = behaviour(request, context)
                        raw = encoded(await answer if inspect.isawaitable(answer) else answer)
                        if len(raw) > LARGE_BYTES:
                            _until_done(call.hold(len(raw)))
                        return raw
                    finally:
                        if streaming:
                            await request.aclose()
            except grpc.aio.AbortError as abort:
                request = context = call = None
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
                request = context = call = None
                raise _alone(abort)  # noqa: B904 - it is the same error

        return call

    coders = {
        # Bytes come in here: of a caller that is refused they are never decoded.
        "request_deserializer": None,
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
