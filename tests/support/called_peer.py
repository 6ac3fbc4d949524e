"""A peer that notes how it is called, for the tests of our outgoing channels."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import wrappers_pb2

from services.runtime.server import ArenaServer, Mount
from tiltyard.registry.v1 import task_pb2, task_pb2_grpc
from tiltyard.selector.v1 import stake_pb2, stake_pb2_grpc

StringValue = wrappers_pb2.StringValue


class Peer(task_pb2_grpc.TaskServiceServicer, stake_pb2_grpc.StakeServiceServicer):
    """Notes what it was asked and how long it was given; `fail` decides what goes wrong."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.given_s: list[float | None] = []
        self.fail: Callable[[Any], None] = lambda context: None

    def note(self, request: Any, context: Any) -> None:
        self.asked.append(request)
        self.given_s.append(context.time_remaining())
        self.fail(context)

    async def CloseTask(self, request: Any, context: Any) -> task_pb2.CloseTaskResponse:
        self.note(request, context)
        return task_pb2.CloseTaskResponse()

    async def WatchTask(self, request: Any, context: Any) -> AsyncIterator[task_pb2.WatchTaskResponse]:
        self.note(request, context)
        yield task_pb2.WatchTaskResponse()

    async def GetStake(self, request: Any, context: Any) -> stake_pb2.GetStakeResponse:
        self.note(request, context)
        return stake_pb2.GetStakeResponse()

    async def collect(self, requests: AsyncIterator[Any], context: Any) -> StringValue:
        self.note([request async for request in requests], context)
        return StringValue()

    async def echo(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        self.note(None, context)
        async for request in requests:
            yield request

    def mounts(self) -> list[Mount]:
        coders = {
            "request_deserializer": StringValue.FromString,
            "response_serializer": StringValue.SerializeToString,
        }
        streams = {
            "Collect": grpc.stream_unary_rpc_method_handler(self.collect, **coders),
            "Echo": grpc.stream_stream_rpc_method_handler(self.echo, **coders),
        }
        generic = grpc.method_handlers_generic_handler("test.v1.Streams", streams)
        return [
            Mount("tasks", lambda server: task_pb2_grpc.add_TaskServiceServicer_to_server(self, server)),
            Mount("stakes", lambda server: stake_pb2_grpc.add_StakeServiceServicer_to_server(self, server)),
            Mount("test.v1.Streams", lambda server: server.add_generic_rpc_handlers([generic])),
        ]


@asynccontextmanager
async def serving(peer: Peer, listen: str = "127.0.0.1:0") -> AsyncIterator[ArenaServer]:
    async with ArenaServer(listen, peer.mounts(), authenticator=None) as server:
        yield server


def get_stake(channel: grpc.aio.Channel, **options: Any) -> Any:
    return stake_pb2_grpc.StakeServiceStub(channel).GetStake(stake_pb2.GetStakeRequest(name="stakes/x"), **options)


async def code_of(call: Any) -> grpc.StatusCode:
    """The code of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def collect(channel: grpc.aio.Channel) -> StringValue:
    """A call with a stream of requests."""
    return await channel.stream_unary("/test.v1.Streams/Collect", **_CODERS)(_requests())


async def echo(channel: grpc.aio.Channel) -> list[StringValue]:
    """A call with streams both ways."""
    return [each async for each in channel.stream_stream("/test.v1.Streams/Echo", **_CODERS)(_requests())]


_CODERS: dict[str, Any] = {
    "request_serializer": StringValue.SerializeToString,
    "response_deserializer": StringValue.FromString,
}


async def _requests() -> AsyncIterator[StringValue]:
    yield StringValue(value="x")
