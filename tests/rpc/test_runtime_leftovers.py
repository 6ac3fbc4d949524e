"""What a call leaves in the memory of its server when it is over, however it ends, without the collector of cycles."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from services.runtime.errors import InvalidArgument
from services.runtime.server import ArenaServer, Mount
from tiltyard.calls.channel import open_channel

SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
ENDS = ("refused", "defect", "cancelled", "half read", "read")


class Message:
    """A request as the server has it."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        THERE.add(self)


THERE: weakref.WeakSet[Message] = weakref.WeakSet()


class Method:
    """One method in all four shapes, which ends like `end`."""

    def __init__(self) -> None:
        self.end = ""
        self.begun = asyncio.Event()

    async def _take(self, request: Any) -> None:
        async for each in _each(request):
            assert len(each.raw) == 1000
            match self.end:
                case "refused":
                    raise InvalidArgument.field("value", "is bad")
                case "defect":
                    raise ZeroDivisionError
                case "cancelled":
                    self.begun.set()
                    await asyncio.Event().wait()
                case "half read":
                    return

    async def unary(self, request: Any, _context: object) -> bytes:
        await self._take(request)
        return b""

    async def stream(self, request: Any, _context: object) -> AsyncIterator[bytes]:
        yield b""
        await self._take(request)

    def add_to(self, server: grpc.aio.Server) -> None:
        handlers = {
            shape: getattr(grpc, f"{shape}_rpc_method_handler")(
                self.stream if shape.endswith("stream") else self.unary, request_deserializer=Message
            )
            for shape in SHAPES
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.v1.Shapes", handlers)])


async def _each(request: Any) -> AsyncIterator[Message]:
    if isinstance(request, Message):
        yield request
        return
    async for each in request:
        yield each


async def requests() -> AsyncIterator[bytes]:
    for _ in range(3):
        yield bytes(1000)


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """What is logged; the collector does not come by meanwhile."""
    gc.collect()
    gc.disable()
    with capture_logs() as logged:
        yield logged
    gc.enable()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ENDS)
async def test_nothing_is_kept_of_the_messages_of_a_call_that_is_over(logged: list[Any], shape: str, end: str) -> None:
    method, before = Method(), _aborts()
    method.end = end
    mount = Mount("test.v1.Shapes", method.add_to)
    async with (
        ArenaServer("127.0.0.1:0", [mount], authenticator=None) as server,
        open_channel(server.address) as channel,
    ):
        for _ in range(5):
            stub = getattr(channel, shape)(f"/test.v1.Shapes/{shape}")
            call = stub(requests() if shape.startswith("stream") else bytes(1000))
            if end == "cancelled":
                reading = asyncio.ensure_future(_to_its_end(call))
                await asyncio.wait_for(method.begun.wait(), 10)
                method.begun.clear()
                call.cancel()
                await asyncio.wait([reading])
            else:
                await _to_its_end(call)
        async with asyncio.timeout(10):
            # An error keeps the frames that it came through, and the answers in them. gRPC keeps the last one or two.
            while THERE or _aborts() > before + 2:
                logged.clear()  # an entry keeps its error, which is written and forgotten elsewhere
                await asyncio.sleep(0.01)


def _aborts() -> int:
    return sum(type(each) is grpc.aio.AbortError for each in gc.get_objects())


async def _to_its_end(call: Any) -> None:
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError:
        pass
