"""What one caller or one address may take of a server: calls, streams, connections, pings, time."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from services.runtime import call_shapes, connections, messages
from services.runtime import limits as limits_module
from services.runtime.auth import Authenticator, Caller, Role
from services.runtime.connections import ConnectionLimits
from services.runtime.errors import ResourceExhausted
from services.runtime.limits import Buckets, CallGate, CallLimits
from services.runtime.server import ArenaServer, Mount
from tests.support import http2
from tiltyard.calls.channel import open_channel
from tiltyard.calls.resuming import persist
from tiltyard.identity import Key, TokenSource, issue_token

AUDIENCE = "tiltyard.local/test"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
PING = bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + b"12345678"


class Seconds:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Streams:
    """A method of each shape; `Watch` lasts until it is cancelled."""

    async def unary(self, request: StringValue, _context: object) -> StringValue:
        return request

    async def note(self, _request: StringValue, _context: object) -> StringValue:
        return StringValue()

    async def notes(self, requests: AsyncIterator[StringValue], _context: object) -> AsyncIterator[StringValue]:
        async for _ in requests:
            yield StringValue()

    async def large(self, _request: StringValue, _context: object) -> StringValue:
        return StringValue(value="x" * 1_000_000)

    async def download(self, _request: StringValue, _context: object) -> AsyncIterator[StringValue]:
        for _ in range(10):
            yield StringValue(value="x" * 1_000_000)

    async def watch(self, request: StringValue, _context: object) -> AsyncIterator[StringValue]:
        yield request
        await asyncio.Event().wait()

    async def collect(self, requests: AsyncIterator[StringValue], _context: object) -> StringValue:
        return StringValue(value="".join([request.value async for request in requests]))

    async def echo(self, requests: AsyncIterator[StringValue], _context: object) -> AsyncIterator[StringValue]:
        async for request in requests:
            yield request


def mount(decode: Callable[[bytes], StringValue] = StringValue.FromString) -> Mount:
    streams = Streams()
    coders = {
        "request_deserializer": decode,
        "response_serializer": StringValue.SerializeToString,
    }
    handlers = {
        "Get": grpc.unary_unary_rpc_method_handler(streams.unary, **coders),
        "Note": grpc.unary_unary_rpc_method_handler(streams.note, **coders),
        "Notes": grpc.stream_stream_rpc_method_handler(streams.notes, **coders),
        "Large": grpc.unary_unary_rpc_method_handler(streams.large, **coders),
        "Download": grpc.unary_stream_rpc_method_handler(streams.download, **coders),
        "Watch": grpc.unary_stream_rpc_method_handler(streams.watch, **coders),
        "Collect": grpc.stream_unary_rpc_method_handler(streams.collect, **coders),
        "Echo": grpc.stream_stream_rpc_method_handler(streams.echo, **coders),
    }
    return Mount(
        "test.v1.Streams",
        lambda server: server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("test.v1.Streams", handlers)]
        ),
    )


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[ArenaServer]:
    options = {"authenticator": Authenticator([AUDIENCE])} | options
    async with ArenaServer("127.0.0.1:0", [mount()], **options) as server:
        yield server


def signed(server: ArenaServer, key: Key) -> grpc.aio.Channel:
    return open_channel(server.address, tokens=TokenSource(key, AUDIENCE))


async def get(channel: grpc.aio.Channel, **options: Any) -> StringValue:
    method = channel.unary_unary(
        "/test.v1.Streams/Get",
        request_serializer=StringValue.SerializeToString,
        response_deserializer=StringValue.FromString,
    )
    answer: StringValue = await method(StringValue(value="x"), timeout=10, **options)
    return answer


def reason(error: grpc.aio.AioRpcError) -> tuple[str, str, float | None]:
    """Code, ErrorInfo's reason, and RetryInfo's seconds."""
    raw: Any = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info, retry, wait_s = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), None
    for detail in status_pb2.Status.FromString(raw).details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            wait_s = retry.retry_delay.ToNanoseconds() / 1e9
    return error.code().name, info.reason, wait_s


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    clock = Seconds()
    buckets = Buckets(per_second=2, burst=3, clock=clock)
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b") == 0
    clock.now = 0.25
    assert buckets.take("a") == 0.25
    clock.now = 0.5
    assert buckets.take("a") == 0
    clock.now = 1000
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_buckets_are_bounded_and_forget_those_unused_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "_REMEMBERED", 100)
    buckets = Buckets(per_second=1, burst=1, clock=Seconds())
    assert buckets.take("first") == 0
    for number in range(1000):
        buckets.take("busy")
        buckets.take(str(number))
        assert len(buckets) <= 100
    assert buckets.take("busy") == 1
    assert buckets.take("first") == 0


async def test_a_caller_above_its_rate_is_told_how_long_to_wait_and_others_are_served() -> None:
    limits = CallLimits(per_second=0.5, burst=3)
    async with serving(limits=limits) as server:
        async with signed(server, Key.generate()) as channel:
            for _ in range(3):
                await get(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await get(channel)
            code, why, wait_s = reason(caught.value)
            assert (code, why) == ("RESOURCE_EXHAUSTED", "CALL_RATE")
            assert wait_s is not None
            assert 1 < wait_s <= 2
        async with signed(server, Key.generate()) as another:
            await get(another)


async def test_our_client_waits_as_long_as_the_server_says() -> None:
    async with serving(limits=CallLimits(per_second=5, burst=2)) as server, signed(server, Key.generate()) as channel:
        started = time.monotonic()
        for _ in range(4):
            await persist(lambda: get(channel))
        assert time.monotonic() - started >= 0.35


async def test_operators_and_services_are_exempt_unless_told() -> None:
    operator, service = Key.generate(), Key.generate()
    authenticator = Authenticator([AUDIENCE], operators=[operator.id], services=[service.id])
    async with serving(authenticator=authenticator, limits=CallLimits(per_second=0.01, burst=2)) as server:
        for key in (operator, service):
            async with signed(server, key) as channel:
                for _ in range(5):
                    await get(channel)
    strict = CallLimits(per_second=0.01, burst=2, exempt=frozenset({Role.SERVICE}))
    async with serving(authenticator=authenticator, limits=strict) as server, signed(server, operator) as channel:
        await get(channel)
        await get(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(channel)
        assert reason(caught.value)[1] == "CALL_RATE"


async def test_one_caller_can_not_hold_all_streams() -> None:
    async with serving(limits=CallLimits(in_flight=3)) as server, signed(server, Key.generate()) as channel:
        open_watch = channel.unary_stream(
            "/test.v1.Streams/Watch",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
        )
        watches = [open_watch(StringValue(value="x")) for _ in range(3)]
        for watch in watches:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(channel)
        assert reason(caught.value)[:2] == ("RESOURCE_EXHAUSTED", "CALLS_IN_FLIGHT")
        async with signed(server, Key.generate()) as another:
            await get(another)
        watches[0].cancel()
        async with asyncio.timeout(10):
            while True:  # the server hears of the cancellation a little later
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await get(channel)
                    break


async def test_one_address_can_not_hold_all_calls_with_any_number_of_keys_or_without_one() -> None:
    operator = Key.generate()
    authenticator = Authenticator([AUDIENCE], operators=[operator.id])
    limits = CallLimits(in_flight_per_address=3)
    async with (
        serving(authenticator=authenticator, limits=limits) as server,
        signed(server, Key.generate()) as first,
        signed(server, Key.generate()) as second,
        signed(server, operator) as exempt,
    ):
        watches: list[Any] = []
        for channel in (first, second):
            watches.append(raw_call(channel, "Watch")(b""))
            await watches[-1].read()
        watches.append(health_pb2_grpc.HealthStub(first).Watch(health_pb2.HealthCheckRequest()))
        await watches[-1].read()
        for refused in (
            get(second),
            health_pb2_grpc.HealthStub(second).Watch(health_pb2.HealthCheckRequest()).read(),
            reflection_pb2_grpc.ServerReflectionStub(second).ServerReflectionInfo(timeout=10).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await refused
            assert reason(caught.value)[:2] == ("RESOURCE_EXHAUSTED", "CALLS_IN_FLIGHT_PER_ADDRESS")
        await get(exempt)
        await health_pb2_grpc.HealthStub(second).Check(health_pb2.HealthCheckRequest())
        watches.pop().cancel()
        async with asyncio.timeout(10):
            while True:  # the server hears of the cancellation a little later
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await get(second)
                    break


def test_an_address_is_one_of_ipv4_or_a_network_of_ipv6() -> None:
    gate = CallGate(CallLimits(per_second=0, in_flight_per_address=1), Seconds())
    held = [
        gate.begin(None, peer) for peer in ("ipv4:10.0.0.1:5000", "ipv4:10.0.0.2:5000", "ipv6:%5B2001:db8::1%5D:5000")
    ]
    for peer in ("ipv4:10.0.0.1:6000", "ipv6:%5B::ffff:10.0.0.2%5D:6000", "ipv6:%5B2001:db8::2%5D:6000"):
        with pytest.raises(ResourceExhausted):
            gate.begin(None, peer)
    for each in held:
        gate.end(each)
    assert gate.begin(None, "ipv6:%5B2001:db8::2%5D:6000")


async def test_calls_that_send_no_message_are_counted_for_their_address_and_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # gRPC calls no method of one message before that is there.
    monkeypatch.setattr(messages, "_MOST_UNREAD", 4)
    limits = CallLimits(in_flight_per_address=3)
    async with (
        serving(limits=limits, stream_idle_s=0.2) as server,
        signed(server, Key.generate()) as silent,
        signed(server, Key.generate()) as honest,
    ):
        # Headers, and then nothing: a client's stream is the same on the wire.
        calls = [silent.stream_unary(f"/test.v1.Streams/{name}")() for name in ("Get", "Watch") * 6]
        refused = ("RESOURCE_EXHAUSTED", "CALLS_IN_FLIGHT_PER_ADDRESS")
        assert await until_failed(calls, 12 - 4 - 3) == [refused] * 5
        ended = await until_failed(calls, 12 - 4)
        assert sorted(ended) == [refused] * 5 + [("UNAVAILABLE", "STREAM_IDLE")] * 3
        # Those that gRPC keeps stay, and others are served beside them.
        assert sum(not call.done() for call in calls) == 4
        assert (await get(honest)).value == "x"
        assert await raw_call(honest, "Watch")(StringValue(value="x").SerializeToString()).read()
        for call in calls:
            call.cancel()


async def until_failed(calls: list[Any], count: int) -> list[tuple[str, str]]:
    """Waits until at least `count` of `calls` have ended, each by an error: their codes and reasons."""
    async with asyncio.timeout(20):
        while sum(call.done() for call in calls) < count:  # noqa: ASYNC110 - to await a call and let go cancels it
            await asyncio.sleep(0.02)
    ended = []
    for call in [call for call in calls if call.done()]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        ended.append(reason(caught.value)[:2])
    return ended


async def get_until_refused(channel: grpc.aio.Channel) -> None:
    while True:
        await get(channel)


async def test_a_caller_that_takes_no_answers_is_counted_for_its_calls() -> None:
    limits = CallLimits(in_flight=3, in_flight_per_address=0)
    key = Key.generate()
    token = {"authorization": f"Bearer {issue_token(key, audience=AUDIENCE)}"}
    request = StringValue(value="x").SerializeToString()
    async with serving(limits=limits) as server, signed(server, key) as channel:
        calls = b"".join(http2.call(stream, "/test.v1.Streams/Get", request, token) for stream in (1, 3, 5))
        with closing(connect(server, 1, say=http2.greeting() + calls)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(get_until_refused(channel), 20)
            assert reason(caught.value)[:2] == ("RESOURCE_EXHAUSTED", "CALLS_IN_FLIGHT")
        async with asyncio.timeout(20):
            while True:  # until it knows that the connection has ended
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await get(channel)
                    break


@pytest.mark.parametrize("method", ["Get", "Watch", "Collect", "Echo"])
async def test_messages_that_are_never_whole_take_little_memory(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_MOST_UNREAD", 4)
    monkeypatch.setattr(messages, "_MOST_READ", 8)
    key = Key.generate()
    token = {"authorization": f"Bearer {issue_token(key, audience=AUDIENCE)}"}
    size, calls = 4_000_000, 60
    async with serving(limits=CallLimits(), stream_idle_s=60) as server, signed(server, key) as channel:
        taken = await http2.push(server.port, f"/test.v1.Streams/{method}", token, calls=calls, message_bytes=size)
        # What is read at once comes whole, of all others only what a stream may send unasked.
        assert taken <= (4 + 8) * size + calls * 65_535
        assert (await asyncio.wait_for(get(channel), 20)).value == "x"


@pytest.mark.parametrize("method", ["Large", "Download"])
async def test_large_answers_that_nobody_takes_are_bounded(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_MOST_HELD_BYTES", 3_500_000)
    request = StringValue(value="x").SerializeToString()
    calls = b"".join(http2.call(stream, f"/test.v1.Streams/{method}", request, {}) for stream in (1, 3, 5))
    greedy: list[socket.socket] = []

    async def ask(channel: grpc.aio.Channel) -> int:
        """Asks once; how many bytes came."""
        call = raw_call(channel, method)(request, timeout=10)
        return len(await call) if method == "Large" else sum([len(answer) async for answer in call])

    async def ask_until_refused(server: ArenaServer, channel: grpc.aio.Channel) -> None:
        while True:  # a greedy call that comes while an answer of ours is on its way is refused itself
            greedy.extend(connect(server, 1, say=http2.greeting() + calls))
            await ask(channel)

    # Our own client would wait and ask again.
    async with (
        serving(authenticator=None, limits=CallLimits()) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for _ in range(10):  # what was taken is let go
            assert await ask(channel) >= 1_000_000
        with closing(greedy):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(ask_until_refused(server, channel), 20)
            assert reason(caught.value) == ("RESOURCE_EXHAUSTED", "MESSAGES_PER_ADDRESS", 1)
            assert (await get(channel)).value == "x"
        async with asyncio.timeout(20):
            while True:  # until the server knows that the connection has ended
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await ask(channel)
                    break


@pytest.mark.parametrize("method", ["Note", "Notes"])
async def test_large_requests_whose_answers_nobody_takes_are_bounded(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_shapes, "LARGE_BYTES", 8000)
    monkeypatch.setattr(messages, "_MOST_HELD_BYTES", 40_000)
    large = StringValue(value="x" * 15_000).SerializeToString()
    calls = b"".join(http2.call(stream, f"/test.v1.Streams/{method}", large, {}) for stream in (1, 3))

    async def note(channel: grpc.aio.Channel) -> None:
        call = raw_call(channel, method)
        if method == "Note":
            await call(large, timeout=10)
        else:
            assert [answer async for answer in call([large] * 5, timeout=10)] == [b""] * 5

    greedy: list[socket.socket] = []

    async def note_until_refused(server: ArenaServer, channel: grpc.aio.Channel) -> None:
        while True:  # a greedy call that comes while ours is on its way is refused itself
            greedy.extend(connect(server, 1, say=http2.greeting() + calls))
            await note(channel)

    async with (
        serving(authenticator=None, limits=CallLimits()) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for _ in range(5):  # what has been answered is let go
            await note(channel)
        with closing(greedy):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(note_until_refused(server, channel), 20)
            assert reason(caught.value) == ("RESOURCE_EXHAUSTED", "MESSAGES_PER_ADDRESS", 1)
            assert (await get(channel)).value == "x"
        async with asyncio.timeout(20):
            while True:  # until the server knows that the connection has ended
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await note(channel)
                    break


class Counting(Authenticator):
    """Knows how many callers came without a token."""

    strangers = 0

    def authenticate(self, authorization: str | None) -> Caller:
        self.strangers += authorization is None
        return super().authenticate(authorization)


def has_unread(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


async def test_refusals_that_nobody_takes_shut_nobody_out() -> None:
    key = Key.generate()
    token = {"authorization": f"Bearer {issue_token(key, audience=AUDIENCE)}"}
    request = StringValue(value="x").SerializeToString()
    authenticator = Counting([AUDIENCE])
    # Nothing is read from the connections: behind ten megabytes no further answer leaves the server.
    download = http2.greeting(window=1 << 30) + http2.call(1, "/test.v1.Streams/Download", request, token)
    strangers = b"".join(http2.call(stream, "/test.v1.Streams/Get", b"", {}) for stream in range(3, 23, 2))
    async with (
        serving(authenticator=authenticator, limits=CallLimits(), max_concurrent_rpcs=32) as server,
        signed(server, key) as channel,
        open_channel(server.address) as other,
    ):
        with closing(connect(server, 10, say=download)) as opened:
            async with asyncio.timeout(20):
                while not all(map(has_unread, opened)):  # noqa: ASYNC110 - the sockets' state is all there is to look at
                    await asyncio.sleep(0.02)
                for connection in opened:
                    connection.sendall(strangers)
                while authenticator.strangers < 100:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            for _ in range(3):
                assert (await get(channel)).value == "x"
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await get(other, metadata=(("authorization", "Bearer forged"),))
                assert reason(caught.value)[0] == "UNAUTHENTICATED"


async def test_some_room_is_kept_for_operators_and_services() -> None:
    operator = Key.generate()
    authenticator = Authenticator([AUDIENCE], operators=[operator.id])
    async with (
        serving(authenticator=authenticator, limits=CallLimits(), max_concurrent_rpcs=32) as server,
        signed(server, Key.generate()) as crowd,
        signed(server, operator) as exempt,
    ):
        watches = [raw_call(crowd, "Watch")(b"") for _ in range(30)]
        for watch in watches:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(crowd)
        assert reason(caught.value)[:2] == ("RESOURCE_EXHAUSTED", "CALLS_IN_FLIGHT_IN_ALL")
        await get(exempt)


async def test_unproven_callers_of_one_address_share_a_rate() -> None:
    async with (
        serving(limits=CallLimits(per_second=0.01, burst=4)) as server,
        signed(server, Key.generate()) as known,
        open_channel(server.address) as channel,
    ):
        await get(known)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await get(channel, metadata=(("authorization", "Bearer forged"),))
            assert reason(caught.value)[0] == "UNAUTHENTICATED"
        for authorization in ("Bearer forged", f"Bearer {issue_token(Key.generate(), audience=AUDIENCE)}"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await get(channel, metadata=(("authorization", authorization),))
            assert reason(caught.value)[:2] == ("RESOURCE_EXHAUSTED", "CALL_RATE")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()).read()
        assert reason(caught.value)[:2] == ("RESOURCE_EXHAUSTED", "CALL_RATE")
        # Who probes this server from that address and is refused may end it.
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        # A token that was checked before costs nothing to know again.
        await get(known)


def test_a_private_socket_has_no_address_to_limit() -> None:
    gate = CallGate(CallLimits(per_second=0.01, burst=1), Seconds())
    for _ in range(5):
        gate.admit_stranger("unix:")
        assert gate.begin(None, "unix:") == ()


@pytest.mark.parametrize("method", ["Collect", "Echo"])
async def test_a_stream_that_falls_silent_ends(method: str) -> None:
    async with (
        serving(authenticator=None, stream_idle_s=0.3) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        call = raw_call(channel, method)(timeout=20)
        for _ in range(4):
            # Slower in all than a pause may be, but never silent for long.
            await call.write(StringValue(value="x").SerializeToString())
            await asyncio.sleep(0.1)
            if method == "Echo":
                await call.read()
        assert await asyncio.wait_for(call.code(), 10) is grpc.StatusCode.UNAVAILABLE
        raw: Any = dict(await call.trailing_metadata())["grpc-status-details-bin"]
        info = error_details_pb2.ErrorInfo()
        assert status_pb2.Status.FromString(raw).details[0].Unpack(info)
        assert info.reason == "STREAM_IDLE"


def raw_call(channel: grpc.aio.Channel, method: str) -> Any:
    """A method of Streams that takes and gives bytes."""
    shapes = {
        "Get": channel.unary_unary,
        "Note": channel.unary_unary,
        "Notes": channel.stream_stream,
        "Large": channel.unary_unary,
        "Download": channel.unary_stream,
        "Watch": channel.unary_stream,
        "Collect": channel.stream_unary,
        "Echo": channel.stream_stream,
    }
    return shapes[method](f"/test.v1.Streams/{method}")


@pytest.mark.parametrize("method", ["Get", "Watch", "Collect", "Echo"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(method: str) -> None:
    async with serving(authenticator=None) as server, grpc.aio.insecure_channel(server.address) as channel:
        nonsense = b"\xff\xff\xff"
        call = raw_call(channel, method)
        if method in ("Get", "Watch"):
            running = call(nonsense, timeout=10)
        else:
            running = call(timeout=10)
            await running.write(nonsense)
        assert await running.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["Get", "Watch"])
async def test_the_message_of_a_caller_who_is_refused_is_never_decoded(method: str) -> None:
    decoded: list[bytes] = []

    def decode(raw: bytes) -> StringValue:
        decoded.append(raw)
        return StringValue.FromString(raw)

    authenticator = Authenticator([AUDIENCE])
    async with (
        ArenaServer("127.0.0.1:0", [mount(decode)], authenticator=authenticator) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        running = raw_call(channel, method)(b"", timeout=10)
        assert await running.code() is grpc.StatusCode.UNAUTHENTICATED
        assert not decoded


async def test_a_request_that_lasts_as_long_as_its_stream_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(limits=CallLimits()) as server, signed(server, Key.generate()) as channel:
        large = StringValue(value="x" * 65_536).SerializeToString()
        assert await raw_call(channel, "Get")(large) == large
        for most_unread in (messages._MOST_UNREAD, 0):
            monkeypatch.setattr(messages, "_MOST_UNREAD", most_unread)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw_call(channel, "Watch")(large).read()
            assert reason(caught.value)[:2] == ("INVALID_ARGUMENT", "REQUEST_TOO_LARGE")


def connect(
    server: ArenaServer, count: int, *, source: str = "127.0.0.1", say: bytes = PREFACE, timeout_s: float = 5
) -> list[socket.socket]:
    opened = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout_s, source_address=(source, 0))
        connection.sendall(say)
        connection.setblocking(False)
        opened.append(connection)
    return opened


def is_open(connection: socket.socket) -> bool:
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    return False


async def until_open(opened: list[socket.socket], count: int) -> None:
    """Waits until exactly `count` of them are open."""
    async with asyncio.timeout(20):
        while sum(map(is_open, opened)) != count:  # noqa: ASYNC110 - the sockets' state is all there is to look at
            await asyncio.sleep(0.02)


@contextlib.contextmanager
def closing(opened: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield opened
    finally:
        for connection in opened:
            connection.close()


async def test_the_newest_connections_of_a_greedy_address_are_cut_and_others_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0
    look = connections.Doorkeeper.look

    def counted(doorkeeper: connections.Doorkeeper) -> Any:
        nonlocal looks
        result = look(doorkeeper)
        looks += 1
        return result

    async def another_look() -> None:
        before = looks
        async with asyncio.timeout(20):
            while looks < before + 2:  # noqa: ASYNC110 - the first of them may have begun already
                await asyncio.sleep(0.02)

    monkeypatch.setattr(connections, "_EVERY_S", 0.1)
    monkeypatch.setattr(connections.Doorkeeper, "look", counted)
    async with serving(connections=ConnectionLimits(per_address=20)) as server:
        with closing(connect(server, 15)) as early, closing(connect(server, 5, source="127.0.0.3")) as other:
            await another_look()
            with closing(connect(server, 70)) as late:
                await until_open(late, 5)
                assert sum(map(is_open, early)) == 15
                assert sum(map(is_open, other)) == 5
                with closing(connect(server, 1, source="127.0.0.2")) as fresh:
                    await another_look()
                    assert is_open(fresh[0])


async def test_connections_in_all_are_limited() -> None:
    async with serving(connections=ConnectionLimits(total=20)) as server:
        with closing(connect(server, 30, say=b"")) as opened:
            await until_open(opened, 20)
        async with signed(server, Key.generate()) as channel:
            await persist(lambda: get(channel))


async def test_who_connects_and_says_nothing_is_hung_up_on() -> None:
    async with serving(connections=ConnectionLimits(handshake_s=0.3)) as server:
        with closing(connect(server, 5, say=b"")) as opened:
            await until_open(opened, 0)


async def test_who_connects_and_asks_nothing_is_hung_up_on() -> None:
    async with serving(connections=ConnectionLimits(idle_s=0.5)) as server:
        with closing(connect(server, 5)) as opened:
            await until_open(opened, 0)


async def test_too_many_pings_end_a_connection() -> None:
    async with serving() as server:
        with closing(connect(server, 1)) as (connection,):
            received = b""
            async with asyncio.timeout(20):
                while b"too_many_pings" not in received:
                    with contextlib.suppress(ConnectionError):
                        connection.sendall(PING * 5)
                    with contextlib.suppress(BlockingIOError):
                        received += connection.recv(65536)
                    await asyncio.sleep(0.01)


async def test_an_old_connection_is_replaced_and_its_calls_end_after_the_grace() -> None:
    limits = ConnectionLimits(age_s=0.5, age_grace_s=0.5)
    async with serving(authenticator=None, connections=limits) as server, open_channel(server.address) as channel:
        watch = channel.unary_stream(
            "/test.v1.Streams/Watch",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
        )(StringValue(value="x"), timeout=20)
        await watch.read()
        started = time.monotonic()
        while time.monotonic() - started < 1.5:
            await get(channel)  # never fails while connections come and go
            await asyncio.sleep(0.02)
        assert await watch.code() is grpc.StatusCode.UNAVAILABLE
