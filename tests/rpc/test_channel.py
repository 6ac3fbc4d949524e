"""Our outgoing channels: a deadline and a request id on every call, repeats on a budget, cancellations passed on."""

import asyncio
import ipaddress
import struct
from typing import Any, cast

import grpc
import pytest

from services.runtime.errors import NotFound, Unavailable
from tests.support.called_peer import Peer, code_of, collect, echo, get_stake, serving
from tests.support.line import Line
from tiltyard.calls.channel import open_channel
from tiltyard.calls.outgoing import DEADLINE_S, STREAM_DEADLINE_S
from tiltyard.calls.resuming import persist
from tiltyard.registry.v1 import task_pb2, task_pb2_grpc
from tiltyard.selector.v1 import stake_pb2


async def test_a_call_of_every_shape_has_a_deadline() -> None:
    peer = Peer()
    async with serving(peer) as server, open_channel(server.address) as channel:
        await get_stake(channel)
        await anext(aiter(task_pb2_grpc.TaskServiceStub(channel).WatchTask(task_pb2.WatchTaskRequest())))
        await collect(channel)
        await echo(channel)
        await get_stake(channel, timeout=3)
    limits_s = [DEADLINE_S, STREAM_DEADLINE_S, STREAM_DEADLINE_S, STREAM_DEADLINE_S, 3]
    assert len(peer.given_s) == len(limits_s)
    for given_s, limit_s in zip(peer.given_s, limits_s, strict=True):
        assert given_s is not None
        # Long deadlines are rounded up on the wire.
        assert limit_s / 2 < given_s <= limit_s * 1.01


async def test_a_change_goes_out_with_a_request_id_that_stays_the_same_through_repeats() -> None:
    peer = Peer()
    failures = iter([True, True, False, False, False])

    def fail(_context: object) -> None:
        if next(failures):
            raise Unavailable("AWAY", "not now")

    peer.fail = fail
    async with serving(peer) as server, open_channel(server.address) as channel:
        tasks = task_pb2_grpc.TaskServiceStub(channel)
        request = task_pb2.CloseTaskRequest(name="tasks/t")
        await tasks.CloseTask(request)
        assert request.request_id == ""
        await tasks.CloseTask(request)
        await tasks.CloseTask(task_pb2.CloseTaskRequest(name="tasks/t", request_id="mine"))
    ids = [asked.request_id for asked in peer.asked]
    assert len(ids[0]) == 32
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert ids[4] == "mine"
    assert [asked.name for asked in peer.asked] == ["tasks/t"] * 5


async def test_only_unavailable_is_repeated() -> None:
    peer = Peer()

    def fail(_context: object) -> None:
        raise NotFound("GONE", "gone")

    peer.fail = fail
    async with serving(peer) as server, open_channel(server.address) as channel:
        assert await code_of(get_stake(channel)) is grpc.StatusCode.NOT_FOUND
    assert len(peer.asked) == 1


async def test_repeats_have_a_budget() -> None:
    peer = Peer()

    def fail(_context: object) -> None:
        raise Unavailable("AWAY", "not now")

    peer.fail = fail
    async with serving(peer) as server, open_channel(server.address) as channel:
        calls = 200
        codes = await asyncio.gather(*(code_of(get_stake(channel)) for _ in range(calls)))
    assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
    # Without a budget there would be 800 attempts; half of the hundred tokens pay for repeats.
    assert calls < len(peer.asked) <= calls + 60


async def test_a_cancelled_call_is_cancelled_at_the_peer() -> None:
    peer = Peer()
    begun, ended = asyncio.Event(), asyncio.Event()

    class Slow(Peer):
        async def GetStake(self, request: Any, context: Any) -> stake_pb2.GetStakeResponse:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return stake_pb2.GetStakeResponse()

    peer = Slow()
    async with serving(peer) as server, open_channel(server.address) as channel:
        calling = asyncio.ensure_future(get_stake(channel))
        await asyncio.wait_for(begun.wait(), 10)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await asyncio.wait_for(ended.wait(), 10)


async def test_a_peer_far_away_is_reached_by_the_first_connection() -> None:
    # As long as the round trips of a handshake take.
    async with serving(Peer()) as server, Line(server, delay_s=0.8) as line:
        async with open_channel(f"127.0.0.1:{line.port}") as channel:
            await get_stake(channel)
        assert line.connections == 1


class _Names(asyncio.DatagramProtocol):
    """A server of names that gives every one the same address of IPv4, and has nothing else to say."""

    def __init__(self, address: str) -> None:
        self.address = address

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        end = data.index(b"\0", 12) + 5
        question, asked = data[12:end], data[end - 4 : end - 2]
        answer = b""
        if asked == b"\0\1":  # A
            answer = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + ipaddress.IPv4Address(self.address).packed
        counts = struct.pack("!4H", 1, 1 if answer else 0, 0, 0)
        self._transport.sendto(data[:2] + b"\x81\x80" + counts + question + answer, addr)


async def test_a_peer_that_comes_back_at_another_address_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_grpc_proxy", "peer.test")
    names = _Names("127.0.0.1")
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: names, ("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    async with serving(Peer()) as server:
        address = f"dns://127.0.0.1:{port}/peer.test:{server.port}"
        channel = open_channel(address)
        await get_stake(channel)
    names.address = "127.0.0.2"
    async with channel, serving(Peer(), f"127.0.0.2:{server.port}"):
        await persist(lambda: get_stake(channel), patience_s=10)
    transport.close()
