"""Calls that outlast a restart of the server: patience, watches that resume, pages to the end."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from tiltyard.calls.errors import pause_before_retry_s
from tiltyard.calls.outgoing import DEADLINE_S, new_request_id

__all__ = ["PATIENCE_S", "new_request_id", "pages", "persist", "watch"]

T = TypeVar("T")
PATIENCE_S = 60.0
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
# A proxy that has lost the server may hold a stream open and say nothing. Where nothing happens, a server does so too.
_LONGEST_SILENCE_S = 120.0


async def persist(call: Callable[[], Awaitable[T]], *, patience_s: float = PATIENCE_S) -> T:
    """Awaits `call()`, again and again with growing pauses while it fails for a transient reason, `patience_s` at most.

    A mutating call must carry one request id through all of them. Raises the last grpc.aio.AioRpcError.
    """
    give_up = time.monotonic() + patience_s
    wait_s = _FIRST_WAIT_S
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            pause_s = _pause_s(error, wait_s, give_up)
        await asyncio.sleep(pause_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def _pause_s(error: grpc.aio.AioRpcError, wait_s: float, give_up: float) -> float:
    """Seconds until the next attempt: `wait_s`, or more where the server said so. Raises the error when it is over."""
    least_s = pause_before_retry_s(error)
    if least_s is None or time.monotonic() + max(wait_s, least_s) > give_up:
        raise error
    return max(wait_s, least_s)


class _WatchRequest(Protocol):
    cursor: str


class _Seen(Protocol):
    @property
    def cursor(self) -> str: ...


Watched = TypeVar("Watched", bound=_WatchRequest)
Seen = TypeVar("Seen", bound=_Seen)


async def watch(
    method: Callable[[Watched], AsyncIterable[Seen]], request: Watched, *, patience_s: float = PATIENCE_S
) -> AsyncIterator[Seen]:
    """The messages of a watch that resumes by cursor: a stream that breaks is started again where it was.

    `request` is copied, not changed. Raises grpc.aio.AioRpcError when it fails for good, or when no stream can be had
    for `patience_s`; one that a server has taken up may be silent for as long as it likes. After each two minutes of
    silence it is asked for again, since what stands may be broken.
    """
    asked = _copy(request)
    wait_s, give_up = _FIRST_WAIT_S, None
    while True:
        began, taken_up = time.monotonic(), False
        try:
            stream = method(asked)
            await _taken_up(stream)
            taken_up = True
            async with aclosing(not_silent(stream, silence_s=_LONGEST_SILENCE_S)) as messages:
                async for message in messages:
                    asked.cursor, wait_s, give_up = message.cursor, _FIRST_WAIT_S, None
                    yield message
            return
        except grpc.aio.AioRpcError as error:
            broke = time.monotonic()
            # What stood for longer than the channel's own retries take had a server, though it brought nothing.
            if give_up is None or (taken_up and broke - began > DEADLINE_S):
                wait_s, give_up = _FIRST_WAIT_S, broke + patience_s
            pause_s = _pause_s(error, wait_s, give_up)
        await asyncio.sleep(pause_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


async def follow(
    stream: Callable[[], AsyncIterable[T]], answers: Callable[[], Awaitable[object]]
) -> AsyncGenerator[T, None]:
    """The messages of a watch without a cursor, which begins with how things are: one that breaks is begun anew.

    So is one that was silent for two minutes. Not before the server answers a unary call, which `answers` makes, and
    after a pause, which grows while streams break soon. Raises grpc.aio.AioRpcError for what waiting does not help, or
    when the server is away for long.
    """
    wait_s = _FIRST_WAIT_S
    while True:
        began = time.monotonic()
        try:
            async with aclosing(not_silent(stream(), silence_s=_LONGEST_SILENCE_S)) as messages:
                async for message in messages:
                    yield message
            return
        except grpc.aio.AioRpcError as error:
            least_s = pause_before_retry_s(error)
            if least_s is None:
                raise
        if time.monotonic() - began > _LONGEST_WAIT_S:
            wait_s = _FIRST_WAIT_S
        await asyncio.sleep(max(wait_s, least_s))
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        await persist(answers)


async def _taken_up(stream: AsyncIterable[object]) -> None:
    """Returns when the server has taken the stream up, which it says at once, or has refused it.

    Raises grpc.aio.AioRpcError when it does neither for long: what lies between may hold the stream.
    """
    if not isinstance(stream, grpc.aio.Call):
        return
    try:
        async with asyncio.timeout(DEADLINE_S):
            await stream.initial_metadata()
    except TimeoutError:
        stream.cancel()
        raise _nothing_came(DEADLINE_S) from None


async def not_silent(stream: AsyncIterable[T], *, silence_s: float) -> AsyncGenerator[T, None]:
    """The messages of a stream, which ends with this. Raises grpc.aio.AioRpcError, also when none comes for long."""
    messages = aiter(stream)
    try:
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    message = await anext(messages)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise _nothing_came(silence_s) from None
            yield message
    finally:
        if isinstance(stream, grpc.aio.Call):
            stream.cancel()


def _nothing_came(silence_s: float) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        initial_metadata=grpc.aio.Metadata(),
        trailing_metadata=grpc.aio.Metadata(),
        details=f"nothing has come for {silence_s:g} s",
    )


class _PageRequest(Protocol):
    page_token: str


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


Asked = TypeVar("Asked", bound=_PageRequest)
Page = TypeVar("Page", bound=_Page)


async def pages(
    method: Callable[[Asked], Awaitable[Page]], request: Asked, *, patience_s: float = 0.0
) -> AsyncIterator[Page]:
    """All pages of a list method, in order, each asked for as `persist` does. `request` is copied, not changed."""
    asked = _copy(request)
    while True:
        page = await persist(lambda: method(asked), patience_s=patience_s)
        yield page
        if not page.next_page_token:
            return
        asked.page_token = page.next_page_token


def _copy(request: T) -> T:
    copy = type(request)()
    assert isinstance(copy, Message)
    assert isinstance(request, Message)
    copy.CopyFrom(request)
    return copy
