"""The same request twice gives the same answer once: `request_id` remembered in the transaction of the change."""

import asyncio
import functools
import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from google.protobuf import any_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

from services.runtime.auth import Role, maybe_caller
from services.runtime.errors import AlreadyExists, ResourceExhausted
from services.runtime.fields import check_request_id
from services.runtime.limits import Buckets

Result = TypeVar("Result")
Answer = TypeVar("Answer", bound=Message)
Method = Callable[[Any, Any, Any], Awaitable[Answer]]

ANSWERS_PER_DAY = 100_000
"""Of one caller other than an operator: each is kept for a week."""
_DAY_S = 86_400


@dataclass
class PendingRequest:
    """A call under a request id, until its answer has been stored. `method` is the full name of its request message.

    `stored` turns true with the commit of the domain's final write, `closed` with the end of the call: a task that the
    call left behind inherits its context, and must not store under its key.
    """

    sub: str
    method: str
    request_id: str
    body_sha256: bytes
    encode: Callable[[Any], bytes]
    stored: bool = field(default=False)
    closed: bool = field(default=False)
    room: Buckets | None = None
    """Where what is stored is counted for its caller, if it is. What fails is not: else keys without number could have
    the counts of those who store something forgotten."""

    def demand_room(self) -> None:
        """Raises ResourceExhausted (ANSWERS_PER_DAY) with the wait where as many are stored of its caller as may be."""
        wait_s = 0.0 if self.room is None else self.room.wait_s(self.sub)
        if wait_s:
            raise ResourceExhausted(
                "ANSWERS_PER_DAY",
                f"{ANSWERS_PER_DAY} answers a day are kept for the request ids of one participant",
                retry_after_s=math.ceil(wait_s * 1000) / 1000,
                limit=str(ANSWERS_PER_DAY),
            )

    def note_stored(self) -> None:
        """Its answer is in the database, also where the caller has gone meanwhile."""
        self.stored = True
        if self.room is not None:
            self.room.take(self.sub)


class Replayed(Exception):
    """This very request was answered before; `answer` is what `PendingRequest.encode` made of it then."""

    def __init__(self, answer: bytes) -> None:
        super().__init__("the request was answered before")
        self.answer = answer


class RequestMemory(Protocol):
    """Where answers are remembered; services.runtime.database.Database is one."""

    async def lookup_remembered(self, pending: PendingRequest) -> bytes | None:
        """The answer stored under this key, None if there is none. Raises AlreadyExists for another body."""
        ...


class InFlight:
    """Serves calls under one key one after the other, so that a duplicate waits for the first one's answer."""

    def __init__(self) -> None:
        self._locks: dict[tuple[str, str, str], tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def alone(self, key: tuple[str, str, str]) -> AsyncIterator[None]:
        """Waits until no other call under `key` is running."""
        lock, waiting = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, waiting + 1)
        try:
            async with lock:
                yield
        finally:
            _, waiting = self._locks[key]
            if waiting == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, waiting - 1)


@dataclass(frozen=True)
class RequestScope:
    """What the calls of one server share: where answers are remembered, and which ids are being served."""

    memory: RequestMemory
    in_flight: InFlight
    room: Buckets = field(default_factory=lambda: Buckets(ANSWERS_PER_DAY / _DAY_S, ANSWERS_PER_DAY))


_pending: ContextVar[PendingRequest | None] = ContextVar("tiltyard_pending_request", default=None)
_scope: ContextVar[RequestScope | None] = ContextVar("tiltyard_request_memory", default=None)


def pending_request() -> PendingRequest | None:
    """The request whose answer the next final write has to remember, if there is one."""
    pending = _pending.get()
    return None if pending is None or pending.closed else pending


def use_memory(scope: RequestScope) -> None:
    """Names the memory for the rest of the current task: the server does so for each call."""
    _scope.set(scope)


def check_body(pending: PendingRequest, remembered_sha256: bytes) -> None:
    """Raises AlreadyExists when the id was used before with another body."""
    if pending.body_sha256 != remembered_sha256:
        raise AlreadyExists(
            "REQUEST_ID_REUSED",
            "this request_id was used before with another request",
            request_id=pending.request_id,
        )


def _encoded(message: Message) -> bytes:
    packed = any_pb2.Any()
    packed.Pack(message, deterministic=True)
    return packed.SerializeToString()


def _decoded(answer: bytes) -> Message:
    packed = any_pb2.Any.FromString(answer)
    # The type's name lies with the bytes, so that a replay needs no knowledge of the method.
    descriptor = descriptor_pool.Default().FindMessageTypeByName(packed.TypeName())
    message = message_factory.GetMessageClass(descriptor)()
    packed.Unpack(message)
    return message


def idempotent(
    answer: Callable[[Any], Answer],
) -> Callable[[Callable[[Any, Any, Any], Awaitable[Any]]], Callable[[Any, Any, Any], Awaitable[Answer]]]:
    """Makes a servicer method that returns its domain result idempotent under `request.request_id`.

    `answer` turns the domain result into the response. The last `Database.write` of the domain call must return exactly
    what the domain call returns: that result's answer is stored in its transaction, for each (caller, method, id). A
    repeated request gets the stored answer: its method runs up to its first write, or to what it fails on, and changes
    nothing; another body under the same id gets AlreadyExists (REQUEST_ID_REUSED). Failed calls are not remembered. An
    empty id switches all of this off. Raises ResourceExhausted (ANSWERS_PER_DAY) where no more answers are kept.
    """

    def decorate(
        method: Callable[[Any, Any, Any], Awaitable[Any]],
    ) -> Callable[[Any, Any, Any], Awaitable[Answer]]:
        @functools.wraps(method)
        async def served(self: Any, request: Any, context: Any) -> Answer:
            if not request.request_id:
                return answer(await method(self, request, context))
            check_request_id(request.request_id)
            caller = maybe_caller()
            pending = PendingRequest(
                sub=caller.id if caller else "",
                method=request.DESCRIPTOR.full_name,
                request_id=request.request_id,
                body_sha256=hashlib.sha256(request.SerializeToString(deterministic=True)).digest(),
                encode=lambda result: _encoded(answer(result)),
            )
            scope = _scope.get()
            if scope is not None and caller is not None and Role.OPERATOR not in caller.roles:
                pending.room = scope.room
            if scope is None:
                return await _run(pending, None, lambda: method(self, request, context), answer)
            async with scope.in_flight.alone((pending.sub, pending.method, pending.request_id)):
                return await _run(pending, scope.memory, lambda: method(self, request, context), answer)

        return served

    return decorate


async def _run(
    pending: PendingRequest,
    memory: RequestMemory | None,
    call: Callable[[], Awaitable[Any]],
    answer: Callable[[Any], Answer],
) -> Answer:
    _pending.set(pending)
    try:
        pending.demand_room()
        return answer(await call())
    except Replayed as replayed:
        return _decoded(replayed.answer)  # type: ignore[return-value]
    except Exception:
        # The second time may fail on what the first time has changed, before it comes to a write. So only a failure
        # needs the look here, and every first time is spared it.
        remembered = None if memory is None or pending.stored else await memory.lookup_remembered(pending)
        if remembered is None:
            raise
        return _decoded(remembered)  # type: ignore[return-value]
    finally:
        pending.closed = True
