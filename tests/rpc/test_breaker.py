"""A breaker to each peer: calls and streams to a dead one fail at once, and none to one that is there."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from services.runtime.errors import Unavailable
from tests.support.called_peer import Peer, code_of, collect, echo, get_stake, serving
from tests.support.line import Line
from tiltyard.calls import breaker as breaker_module
from tiltyard.calls.breaker import CircuitBreaker
from tiltyard.calls.channel import open_channel
from tiltyard.registry.v1 import task_pb2, task_pb2_grpc


class Seconds:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def admitted(breaker: CircuitBreaker) -> bool:
    try:
        breaker.admit()
    except grpc.aio.AioRpcError as error:
        return error.code() is not grpc.StatusCode.UNAVAILABLE
    return True


def test_a_breaker_opens_probes_and_closes() -> None:
    clock = Seconds()
    breaker = CircuitBreaker("peer:1", failures=3, clock=clock)
    for _ in range(2):
        breaker.unanswered()
    breaker.answered()  # the row starts anew
    for _ in range(3):
        assert admitted(breaker)
        breaker.unanswered()
    assert not admitted(breaker)
    pauses = []
    for _ in range(6):
        began = clock.now
        while not admitted(breaker):
            clock.now += 0.01
        pauses.append(clock.now - began)
        # One probe at a time, however many want to call.
        assert not any(admitted(breaker) for _ in range(100))
        breaker.unanswered()
    assert pauses == pytest.approx([0.5, 1, 2, 4, 5, 5], abs=0.02)
    clock.now += 5
    assert admitted(breaker)
    breaker.answered()
    assert all(admitted(breaker) for _ in range(10))


def test_a_probe_that_hangs_does_not_keep_the_breaker_shut() -> None:
    clock = Seconds()
    breaker = CircuitBreaker("peer:1", failures=1, clock=clock)
    breaker.unanswered()
    clock.now += 10
    assert admitted(breaker)  # never ends
    assert not admitted(breaker)
    clock.now += 10
    assert admitted(breaker)


async def test_calls_to_a_dead_peer_fail_at_once_and_work_again_when_it_is_back() -> None:
    peer = Peer()
    async with serving(peer) as server:
        port = server.port
    async with open_channel(f"127.0.0.1:{port}") as channel:
        await asyncio.gather(*(code_of(get_stake(channel)) for _ in range(breaker_module.FAILURES)))
        started = time.monotonic()
        codes = [await code_of(get_stake(channel)) for _ in range(60)]
        assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
        # Each would have made four attempts with pauses of 0.2 s and more in between: 36 s.
        assert time.monotonic() - started < 15
        async with serving(peer, f"127.0.0.1:{port}"):
            async with asyncio.timeout(20):
                while True:
                    try:
                        await get_stake(channel)
                        break
                    except grpc.aio.AioRpcError:
                        await asyncio.sleep(0.05)
            await asyncio.gather(*(get_stake(channel) for _ in range(20)))


async def test_calls_to_a_peer_that_hangs_fail_at_once() -> None:
    peer = Peer()
    async with (
        serving(peer) as server,
        Line(server, delay_s=3600) as line,
        open_channel(f"127.0.0.1:{line.port}", deadline_s=0.3) as channel,
    ):
        expected = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
        for _ in range(breaker_module.FAILURES):
            assert await code_of(get_stake(channel)) in expected
        started = time.monotonic()
        for _ in range(100):
            assert await code_of(get_stake(channel)) in expected
        assert time.monotonic() - started < 15  # 100 deadlines are 30 s
    assert not peer.asked


async def test_a_peer_that_says_why_it_can_not_is_not_dead() -> None:
    peer = Peer()

    def fail(_context: object) -> None:
        raise Unavailable("SERVER_DRAINING", "stopping")

    peer.fail = fail
    async with serving(peer) as server, open_channel(server.address) as channel:
        await asyncio.gather(*(code_of(get_stake(channel)) for _ in range(breaker_module.FAILURES + 1)))
        before = len(peer.asked)
        await code_of(get_stake(channel))
        assert len(peer.asked) > before


STREAMS = ("unary_stream", "stream_unary", "stream_stream")


async def run_stream(channel: grpc.aio.Channel, shape: str) -> list[Any]:
    """A stream from its start to its end, and what it brought. Raises AioRpcError."""
    if shape == "unary_stream":
        watch = task_pb2_grpc.TaskServiceStub(channel).WatchTask(task_pb2.WatchTaskRequest())
        return [each async for each in watch]
    return [await collect(channel)] if shape == "stream_unary" else [*await echo(channel)]


async def refused(channel: grpc.aio.Channel) -> bool:
    """Whether the breaker refuses the next call, which would fail or succeed otherwise."""
    try:
        await get_stake(channel)
    except grpc.aio.AioRpcError as error:
        return "calls in a row unanswered" in (error.details() or "")
    return False


class Watched(Peer):
    """Brings `messages`, and then nothing more until it is cancelled."""

    def __init__(self, messages: int) -> None:
        super().__init__()
        self._messages = messages
        self.watching = 0

    async def WatchTask(self, request: Any, context: Any) -> AsyncIterator[task_pb2.WatchTaskResponse]:
        self.watching += 1
        for _ in range(self._messages):
            yield task_pb2.WatchTaskResponse()
        await asyncio.Event().wait()


@asynccontextmanager
async def watches(channel: grpc.aio.Channel, peer: Watched, messages: int) -> AsyncIterator[list[Any]]:
    """More watches than it takes to open the breaker, each after its first message where it has one."""
    tasks = task_pb2_grpc.TaskServiceStub(channel)
    opened = [aiter(tasks.WatchTask(task_pb2.WatchTaskRequest())) for _ in range(2 * breaker_module.FAILURES)]
    reading = [asyncio.ensure_future(anext(each)) for each in opened]
    if messages:
        await asyncio.gather(*reading)
        reading = [asyncio.ensure_future(anext(each)) for each in opened]
    async with asyncio.timeout(10):
        while peer.watching < len(opened):  # noqa: ASYNC110 - the peer has nothing to wait for
            await asyncio.sleep(0.01)
    yield reading
    await asyncio.gather(*reading, return_exceptions=True)


@pytest.mark.parametrize("shape", STREAMS)
async def test_streams_to_a_dead_peer_are_calls_without_an_answer(shape: str) -> None:
    peer = Peer()
    async with serving(peer) as server:
        port = server.port
    async with open_channel(f"127.0.0.1:{port}") as channel:
        dead = await asyncio.gather(
            *(run_stream(channel, shape) for _ in range(breaker_module.FAILURES)), return_exceptions=True
        )
        assert {each.code() for each in dead if isinstance(each, grpc.aio.AioRpcError)} == {grpc.StatusCode.UNAVAILABLE}
        assert len(dead) == breaker_module.FAILURES
        assert await refused(channel)
        async with serving(peer, f"127.0.0.1:{port}"):
            async with asyncio.timeout(20):
                while True:  # one stream after each pause sees whether it is back
                    try:
                        assert len(await run_stream(channel, shape)) == 1
                        break
                    except grpc.aio.AioRpcError:
                        await asyncio.sleep(0.05)
            assert not await refused(channel)


@pytest.mark.parametrize("shape", STREAMS)
async def test_a_peer_that_says_why_a_stream_can_not_be_is_not_dead(shape: str) -> None:
    class Draining(Peer):
        async def WatchTask(self, request: Any, context: Any) -> AsyncIterator[task_pb2.WatchTaskResponse]:
            self.note(request, context)
            raise Unavailable("SERVER_DRAINING", "stopping")
            yield

    peer = Draining()

    def fail(_context: object) -> None:
        if shape != "unary_stream":
            raise Unavailable("SERVER_DRAINING", "stopping")

    async with serving(peer) as server, open_channel(server.address) as channel:
        peer.fail = fail
        ended = await asyncio.gather(
            *(run_stream(channel, shape) for _ in range(2 * breaker_module.FAILURES)), return_exceptions=True
        )
        assert all(isinstance(each, grpc.aio.AioRpcError) for each in ended)
        peer.fail = lambda _context: None
        assert not await refused(channel)


async def test_watches_that_brought_something_and_end_with_their_server_leave_the_breaker_closed() -> None:
    peer = Watched(messages=1)
    async with serving(peer) as server, Line(server) as line, open_channel(f"127.0.0.1:{line.port}") as channel:
        async with watches(channel, peer, 1) as reading:
            await line.cut()
            ended = await asyncio.gather(*reading, return_exceptions=True)
        assert {each.code() for each in ended} == {grpc.StatusCode.UNAVAILABLE}  # type: ignore[union-attr]
        assert not await refused(channel)


@pytest.mark.parametrize(("deadline_s", "opens"), [(0.2, False), (60, True)])
async def test_silent_watches_had_a_peer_when_a_call_would_have_been_over_before_them(
    deadline_s: float, opens: bool
) -> None:
    peer = Watched(messages=0)
    async with (
        serving(peer) as server,
        Line(server) as line,
        open_channel(f"127.0.0.1:{line.port}", deadline_s=deadline_s) as channel,
    ):
        async with watches(channel, peer, 0) as reading:
            _, pending = await asyncio.wait(reading, timeout=0.3)  # older than the shorter of the two
            assert len(pending) == len(reading)
            await line.cut()
            ended = await asyncio.gather(*reading, return_exceptions=True)
        assert {each.code() for each in ended} == {grpc.StatusCode.UNAVAILABLE}  # type: ignore[union-attr]
        assert await refused(channel) is opens


async def test_the_first_message_of_a_watch_closes_the_breaker_while_it_goes_on() -> None:
    peer = Watched(messages=1)
    async with serving(peer) as server:
        port = server.port
    async with open_channel(f"127.0.0.1:{port}") as channel:
        await asyncio.gather(*(code_of(get_stake(channel)) for _ in range(breaker_module.FAILURES)))
        async with serving(peer, f"127.0.0.1:{port}"):
            tasks = task_pb2_grpc.TaskServiceStub(channel)
            async with asyncio.timeout(20):
                while True:
                    watch = tasks.WatchTask(task_pb2.WatchTaskRequest())
                    try:
                        await anext(aiter(watch))
                        break
                    except grpc.aio.AioRpcError:
                        await asyncio.sleep(0.05)
            assert not watch.done()
            await asyncio.gather(*(get_stake(channel) for _ in range(20)))
            watch.cancel()


async def test_a_stream_that_runs_into_its_deadline_says_nothing_of_the_peer() -> None:
    peer = Peer()
    async with serving(peer) as server:
        port = server.port
    async with open_channel(f"127.0.0.1:{port}") as channel:
        await asyncio.gather(*(code_of(get_stake(channel)) for _ in range(breaker_module.FAILURES - 1)))
        # It ends while gRPC waits before its second attempt.
        watch = task_pb2_grpc.TaskServiceStub(channel).WatchTask(task_pb2.WatchTaskRequest(), timeout=0.05)
        assert await code_of(anext(aiter(watch))) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not await refused(channel)
        assert await refused(channel)
