"""The server that all services stand on: error table, shapes, limits, health, reflection, channelz, drain."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2, status_pb2
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from services.runtime import errors, interceptors
from services.runtime.errors import ArenaError, FieldViolation, InvalidArgument, NotFound, ResourceExhausted
from services.runtime.rpc_errors import STATUS_CODES, from_rpc_error
from services.runtime.server import ArenaServer, Mount
from tiltyard.calls.channel import open_channel
from tiltyard.selector.v1 import stake_pb2, stake_pb2_grpc

SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream", "unary_context", "stream_context")


class Shapes:
    """Answers in every shape a servicer may take; `fail` decides what goes wrong in the middle of a call."""

    def __init__(self, fail: Callable[[str], None] = lambda text: None) -> None:
        self.fail = fail

    async def unary_unary(self, request: StringValue, context: Any) -> StringValue:
        self.fail(request.value)
        return request

    async def unary_stream(self, request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        yield request
        self.fail(request.value)
        yield request

    async def stream_unary(self, requests: AsyncIterator[StringValue], context: Any) -> StringValue:
        texts = [request.value async for request in requests]
        self.fail(texts[0])
        return StringValue(value=texts[0])

    async def stream_stream(self, requests: AsyncIterator[StringValue], context: Any) -> AsyncIterator[StringValue]:
        async for request in requests:
            yield request
            self.fail(request.value)

    async def unary_context(self, request: StringValue, context: Any) -> None:
        await context.write(request)
        self.fail(request.value)
        await context.write(request)

    async def stream_context(self, requests: AsyncIterator[StringValue], context: Any) -> None:
        async for request in requests:
            await context.write(request)
            self.fail(request.value)


def mount(servicer: Any, service: str = "test.v1.Shapes", **shapes: str) -> Mount:
    """Serves the methods of `servicer`; a method's shape is its name's, or as given."""
    made = {
        "unary_unary": grpc.unary_unary_rpc_method_handler,
        "unary_stream": grpc.unary_stream_rpc_method_handler,
        "stream_unary": grpc.stream_unary_rpc_method_handler,
        "stream_stream": grpc.stream_stream_rpc_method_handler,
    }
    known = {**{shape: shape for shape in made}, "unary_context": "unary_stream", "stream_context": "stream_stream"}
    handlers = {
        name: made[shape](
            getattr(servicer, name),
            request_deserializer=StringValue.FromString,
            response_serializer=StringValue.SerializeToString,
        )
        for name, shape in (known | shapes).items()
        if hasattr(servicer, name)
    }
    return Mount(
        service,
        lambda server: server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)]),
    )


async def call(channel: grpc.aio.Channel, name: str, text: str = "hello") -> list[str]:
    """Calls a method of Shapes in its shape; the texts it answered."""
    coders = {
        "request_serializer": StringValue.SerializeToString,
        "response_deserializer": StringValue.FromString,
    }
    path = f"/test.v1.Shapes/{name}"
    request = StringValue(value=text)

    async def requests() -> AsyncIterator[StringValue]:
        yield request

    if name == "unary_unary":
        return [(await channel.unary_unary(path, **coders)(request, timeout=10)).value]
    if name == "stream_unary":
        return [(await channel.stream_unary(path, **coders)(requests(), timeout=10)).value]
    if name.startswith("stream"):
        return [answer.value async for answer in channel.stream_stream(path, **coders)(requests(), timeout=10)]
    return [answer.value async for answer in channel.unary_stream(path, **coders)(request, timeout=10)]


@asynccontextmanager
async def serving(*mounts: Mount, deadline_s: float | None = None, **options: Any) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a running server with `mounts` and no authenticator: a bare one, or ours with a default deadline."""
    async with ArenaServer("127.0.0.1:0", mounts, authenticator=None, **options) as server:
        bare = grpc.aio.insecure_channel
        channel = bare(server.address) if deadline_s is None else open_channel(server.address, deadline_s=deadline_s)
        async with channel:
            yield channel


def rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    return status_pb2.Status.FromString(details)


def detail(error: grpc.aio.AioRpcError, kind: Callable[[], Any]) -> Any:
    message = kind()
    assert any(packed.Unpack(message) for packed in rich_status(error).details)
    return message


def raising(error: Exception) -> Callable[[str], None]:
    def fail(text: str) -> None:
        raise error

    return fail


@pytest.mark.parametrize("shape", SHAPES)
async def test_every_shape_answers(shape: str) -> None:
    async with serving(mount(Shapes())) as channel:
        assert set(await call(channel, shape)) == {"hello"}


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_domain_error_keeps_reason_and_metadata_in_every_shape(shape: str) -> None:
    fail = raising(NotFound("TASK_NOT_FOUND", "there is no tasks/nope", name="tasks/nope"))
    async with serving(mount(Shapes(fail))) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, shape)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "there is no tasks/nope"
    info = detail(caught.value, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, dict(info.metadata)) == ("TASK_NOT_FOUND", "tiltyard", {"name": "tasks/nope"})


@pytest.mark.parametrize("shape", SHAPES)
async def test_an_unknown_exception_is_internal_without_detail_and_logged_with_its_id(shape: str) -> None:
    with capture_logs() as logs:
        async with serving(mount(Shapes(raising(KeyError("the password is hunter2"))))) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(channel, shape)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "hunter2" not in str(caught.value) + str(caught.value.trailing_metadata())
    info = detail(caught.value, error_details_pb2.ErrorInfo)
    assert info.metadata["error_id"] in (caught.value.details() or "")
    (logged,) = [entry for entry in logs if entry["event"] == "internal error"]
    assert logged["error_id"] == info.metadata["error_id"]
    assert "hunter2" in str(logged["exc_info"])


def _every_error() -> list[ArenaError]:
    special: dict[type[ArenaError], ArenaError] = {
        InvalidArgument: InvalidArgument([FieldViolation("spec.name", "is empty"), FieldViolation("k", "is 0")]),
        ResourceExhausted: ResourceExhausted("QUOTA_USED", "wait", retry_after_s=12.5, task="t"),
    }
    return [special.get(kind) or kind("SOME_REASON", "some text", name="value") for kind in STATUS_CODES]


def test_the_table_has_a_row_for_every_domain_error() -> None:
    defined = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ArenaError)}
    # A full disk is a ResourceExhausted to those who called, and has no code of its own.
    assert defined - {ArenaError, errors.DiskFull} == set(STATUS_CODES)
    assert len(set(STATUS_CODES.values())) == len(STATUS_CODES)


@pytest.mark.parametrize("error", _every_error(), ids=lambda error: type(error).__name__)
async def test_each_row_of_the_table_there_and_back(error: ArenaError) -> None:
    async with serving(mount(Shapes(raising(error)))) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "unary_unary")
    assert caught.value.code() is STATUS_CODES[type(error)]
    assert rich_status(caught.value).code == STATUS_CODES[type(error)].value[0]
    back = from_rpc_error(caught.value)
    assert type(back) is type(error)
    assert (back.reason, back.message, back.metadata) == (error.reason, error.message, error.metadata)
    if isinstance(error, InvalidArgument):
        bad_request = detail(caught.value, error_details_pb2.BadRequest)
        assert [violation.field for violation in bad_request.field_violations] == ["spec.name", "k"]
        assert isinstance(back, InvalidArgument)
        assert back.violations == error.violations
    if isinstance(error, ResourceExhausted):
        delay = detail(caught.value, error_details_pb2.RetryInfo).retry_delay
        assert delay.ToTimedelta().total_seconds() == 12.5
        assert isinstance(back, ResourceExhausted)
        assert back.retry_after_s == 12.5


async def test_a_peer_whose_disk_is_full_is_one_to_wait_for() -> None:
    async with serving(mount(Shapes(raising(errors.DiskFull("no room", resource="database"))))) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "unary_unary")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    back = from_rpc_error(caught.value)
    assert isinstance(back, errors.Unavailable)
    assert (back.reason, back.metadata) == ("DISK_FULL", {"resource": "database"})


async def test_an_error_with_very_many_fields_still_arrives() -> None:
    violations = [FieldViolation(f"values[{number}]", "is bad " * 1000) for number in range(5000)]
    async with serving(mount(Shapes(raising(InvalidArgument(violations))))) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "unary_unary")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert detail(caught.value, error_details_pb2.BadRequest).field_violations[0].field == "values[0]"


async def test_a_peer_that_does_not_answer_is_unavailable() -> None:
    async with ArenaServer("127.0.0.1:0", [], authenticator=None) as gone:
        address = gone.address
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "unary_unary")
    back = from_rpc_error(caught.value)
    assert (type(back), back.reason) == (errors.Unavailable, "UNAVAILABLE")


async def test_an_abort_of_the_method_itself_is_left_alone() -> None:
    class Aborting:
        async def unary_unary(self, request: StringValue, context: Any) -> StringValue:
            await context.abort(grpc.StatusCode.ABORTED, "my own words")
            return request

    async with serving(mount(Aborting())) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "unary_unary")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.ABORTED, "my own words")


async def test_a_method_that_is_not_built_yet_is_unimplemented() -> None:
    stakes = Mount(
        "tiltyard.selector.v1.StakeService",
        lambda server: stake_pb2_grpc.add_StakeServiceServicer_to_server(stake_pb2_grpc.StakeServiceServicer(), server),
    )
    async with serving(stakes) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stake_pb2_grpc.StakeServiceStub(channel).GetStake(stake_pb2.GetStakeRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "METHOD_UNIMPLEMENTED"


async def test_not_implemented_anywhere_else_is_a_defect() -> None:
    async with serving(mount(Shapes(raising(NotImplementedError("branch"))))) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "unary_unary")
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_a_cancelled_call_cancels_the_method_and_closes_its_generator() -> None:
    begun, closed = asyncio.Event(), asyncio.Event()

    class Endless:
        async def unary_stream(self, request: StringValue, context: Any) -> AsyncIterator[StringValue]:
            try:
                yield request
                begun.set()
                await asyncio.Event().wait()
            finally:
                closed.set()

    async with serving(mount(Endless())) as channel:
        stream = channel.unary_stream("/test.v1.Shapes/unary_stream", StringValue.SerializeToString)(StringValue())
        await stream.read()
        await asyncio.wait_for(begun.wait(), 10)
        stream.cancel()
        await asyncio.wait_for(closed.wait(), 10)


async def test_each_call_is_logged_with_its_code() -> None:
    with capture_logs() as logs:
        async with serving(mount(Shapes(raising(NotFound("GONE", "gone"))))) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await call(channel, "unary_unary")
            await health(channel)
    entries = {entry["method"]: entry for entry in logs if entry["event"] == "call"}
    entry = entries["/test.v1.Shapes/unary_unary"]
    assert (entry["code"], entry["caller"], entry["log_level"]) == ("NOT_FOUND", None, "info")
    assert entry["duration_ms"] >= 0
    assert entries["/grpc.health.v1.Health/Check"]["code"] == "OK"
    assert entries["/grpc.health.v1.Health/Check"]["log_level"] == "debug"


async def test_a_call_that_went_well_shows_at_debug_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with capture_logs() as logs:
        async with serving(mount(Shapes())) as channel:
            await call(channel, "unary_unary")
            monkeypatch.setattr(interceptors, "_SLOW_S", 0.0)
            await call(channel, "unary_unary")
    levels = [entry["log_level"] for entry in logs if entry["event"] == "call"]
    assert levels == ["debug", "info"]


async def test_a_watch_that_its_caller_ends_shows_at_debug_only(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = asyncio.Event()

    class Watched:
        async def WatchForever(self, request: StringValue, context: Any) -> AsyncIterator[StringValue]:
            try:
                yield request
                await asyncio.Event().wait()
            finally:
                gone.set()

    monkeypatch.setattr(interceptors, "_SLOW_S", 0.0)
    with capture_logs() as logs:
        async with serving(mount(Watched(), WatchForever="unary_stream")) as channel:
            watch = channel.unary_stream("/test.v1.Shapes/WatchForever", StringValue.SerializeToString)(StringValue())
            await watch.read()
            watch.cancel()
            await asyncio.wait_for(gone.wait(), 60)
    entries = [(entry["code"], entry["log_level"]) for entry in logs if entry["event"] == "call"]
    assert entries == [("CANCELLED", "debug")]


async def test_a_watch_that_has_nothing_to_tell_is_taken_up_at_once() -> None:
    class Watched:
        async def WatchForever(self, request: StringValue, context: Any) -> AsyncIterator[StringValue]:
            await asyncio.Event().wait()
            yield request

    async with serving(mount(Watched(), WatchForever="unary_stream")) as channel:
        watch = channel.unary_stream("/test.v1.Shapes/WatchForever", StringValue.SerializeToString)(StringValue())
        async with asyncio.timeout(60):
            await watch.initial_metadata()
        assert not watch.done()


async def test_messages_above_the_limit_are_refused() -> None:
    async with serving(mount(Shapes()), max_message_bytes=1000) as channel:
        assert await call(channel, "unary_unary", "x" * 900)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "unary_unary", "x" * 1100)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_calls_above_the_limit_are_refused() -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    class Slow:
        async def unary_unary(self, request: StringValue, context: Any) -> StringValue:
            begun.set()
            await release.wait()
            return request

    async with serving(mount(Slow()), max_concurrent_rpcs=1) as channel:
        first = asyncio.create_task(call(channel, "unary_unary"))
        await asyncio.wait_for(begun.wait(), 10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "unary_unary")
        release.set()
        assert await first == ["hello"]
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def health(channel: grpc.aio.Channel, service: str = "") -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    status: int = answer.status
    return status


async def test_health_is_not_serving_until_it_is_said() -> None:
    server = ArenaServer("127.0.0.1:0", [mount(Shapes())], authenticator=None)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        for service in ("", "test.v1.Shapes"):
            assert await health(channel, service) == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.set_serving(True)
        for service in ("", "test.v1.Shapes"):
            assert await health(channel, service) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(channel, "test.v1.Other")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    await server.stop(0)


async def test_a_drain_lets_calls_finish_ends_watches_and_tells_health() -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    class Working:
        async def unary_unary(self, request: StringValue, context: Any) -> StringValue:
            begun.set()
            await release.wait()
            return request

        async def WatchForever(self, request: StringValue, context: Any) -> AsyncIterator[StringValue]:
            yield request
            await asyncio.Event().wait()

    server = ArenaServer("127.0.0.1:0", [mount(Working(), WatchForever="unary_stream")], authenticator=None)
    await server.start()
    await server.set_serving(True)
    async with grpc.aio.insecure_channel(server.address) as channel:
        working = asyncio.create_task(call(channel, "unary_unary"))
        watch = channel.unary_stream("/test.v1.Shapes/WatchForever", StringValue.SerializeToString)(StringValue())
        await watch.read()
        told = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await told.read()).status == health_pb2.HealthCheckResponse.SERVING
        await asyncio.wait_for(begun.wait(), 10)

        stopping = asyncio.create_task(server.stop(grace_s=60))
        assert (await told.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await watch.read()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert detail(ended.value, error_details_pb2.ErrorInfo).reason == "SERVER_DRAINING"
        assert not stopping.done()
        release.set()
        assert await working == ["hello"]
        # Well before the grace period: nothing is left to wait for.
        await asyncio.wait_for(stopping, 10)


async def test_a_tool_that_is_left_open_on_reflection_does_not_hold_a_drain_up() -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    class Working:
        async def unary_unary(self, request: StringValue, context: Any) -> StringValue:
            begun.set()
            await release.wait()
            return request

    server = ArenaServer("127.0.0.1:0", [mount(Working())], authenticator=None)
    await server.start()
    await server.set_serving(True)
    async with grpc.aio.insecure_channel(server.address) as channel:
        working = asyncio.create_task(call(channel, "unary_unary"))
        await asyncio.wait_for(begun.wait(), 10)
        tool = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health")
        await tool.write(asked)
        assert (await tool.read()).file_descriptor_response.file_descriptor_proto
        told = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await told.read()).status == health_pb2.HealthCheckResponse.SERVING

        stopping = asyncio.create_task(server.stop(grace_s=60))
        assert (await told.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        # It reads the answers that are still to come by what it asks meanwhile.
        await tool.write(asked)
        assert (await tool.read()).file_descriptor_response.file_descriptor_proto
        assert not stopping.done()
        release.set()
        assert await working == ["hello"]
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await tool.read()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert detail(ended.value, error_details_pb2.ErrorInfo).reason == "SERVER_DRAINING"
        await asyncio.wait_for(stopping, 10)


async def test_a_second_server_on_the_port_fails() -> None:
    async with ArenaServer("127.0.0.1:0", [], authenticator=None) as first:
        with pytest.raises(RuntimeError, match=r"TILTYARD_LISTEN: .* is taken"):
            await ArenaServer(first.address, [], authenticator=None).start()


async def test_a_unix_socket_serves_and_a_stale_one_is_taken_over(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path / 's'}"
    for _ in range(2):
        async with ArenaServer(listen, [mount(Shapes())], authenticator=None) as server:
            assert (server.address, server.port) == (listen, 0)
            async with open_channel(server.address) as channel:
                assert await call(channel, "unary_unary") == ["hello"]
        # What a killed server leaves behind: a socket that nobody listens on.
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(listen.removeprefix("unix:"))


async def test_reflection_lists_every_service() -> None:
    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async with serving(mount(Shapes())) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = [answer async for answer in stub.ServerReflectionInfo(ask())]
    assert {service.name for service in answers[0].list_services_response.service} == {
        "test.v1.Shapes",
        "grpc.health.v1.Health",
        "grpc.channelz.v1.Channelz",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_channelz_counts_calls() -> None:
    async with serving(mount(Shapes())) as channel:
        await call(channel, "unary_unary")
        stub = channelz_pb2_grpc.ChannelzStub(channel)
        servers = (await stub.GetServers(channelz_pb2.GetServersRequest())).server
    assert sum(server.data.calls_succeeded for server in servers) >= 1


async def test_unary_calls_get_a_deadline() -> None:
    class Slow:
        async def unary_unary(self, request: StringValue, context: Any) -> StringValue:
            return StringValue(value=str(context.time_remaining()))

    async with serving(mount(Slow()), deadline_s=7) as channel:
        method = channel.unary_unary(
            "/test.v1.Shapes/unary_unary", StringValue.SerializeToString, StringValue.FromString
        )
        # gRPC rounds a deadline up on the wire.
        assert 0 < float((await method(StringValue())).value) < 8
        assert float((await method(StringValue(), timeout=100)).value) > 50


async def test_a_call_is_retried_while_the_server_is_unavailable() -> None:
    attempts = []

    def fail_twice(text: str) -> None:
        attempts.append(text)
        if len(attempts) < 3:
            raise errors.Unavailable("NOT_YET", "try again")

    async with serving(mount(Shapes(fail_twice)), deadline_s=20) as channel:
        assert await call(channel, "unary_unary") == ["hello"]
    assert len(attempts) == 3


_SERVICE = """
import asyncio
import structlog
from services.runtime.server import run, serve
from services.runtime.settings import ServiceSettings
from services.runtime.telemetry import configure_logging

lives = []

async def dies_once():
    lives.append(1)
    if len(lives) == 1:
        raise OSError("the first life ends")
    structlog.get_logger().info("second life", token="eyJ")
    await asyncio.Event().wait()

async def close():
    print("closed", flush=True)

settings = ServiceSettings.load()
configure_logging("sample", settings.log_level, settings.log_format)
run(serve(settings, [], name="sample", authenticator=None, background=[dies_once], on_close=[close]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_serves_restarts_its_background_work_and_stops_on_a_signal(tmp_path: Path, number: int) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")}
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVICE],
        env=environment | {"TILTYARD_STATE_DIR": str(tmp_path), "TILTYARD_LOG_FORMAT": "json"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stdout, process.stderr:
        entries: dict[str, dict[str, Any]] = {}
        while not {"serving", "second life"} <= entries.keys():
            entry = json.loads(process.stderr.readline())
            entries[entry["event"]] = entry
        with grpc.insecure_channel(entries["serving"]["address"]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
            # An open watch does not hold the stop up for the ten seconds of grace.
            next(stub.Watch(health_pb2.HealthCheckRequest()))
            process.send_signal(number)
            assert process.wait(timeout=8) == 0
        rest = [json.loads(line) for line in process.stderr]
        assert process.stdout.read() == "closed\n"
    assert "the first life ends" in entries["background work died, it starts again"]["exception"]
    assert "eyJ" not in str(entries["second life"])
    assert rest[-1]["event"] == "stopped"
    assert {entry["service"] for entry in [*entries.values(), *rest]} == {"sample"}
