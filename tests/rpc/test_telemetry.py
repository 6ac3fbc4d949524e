"""Calls as telemetry tells of them, over a real server and to a real collector, or to one that is away."""

import asyncio
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SpanExportResult

from services.runtime.errors import NotFound, ResourceExhausted
from services.runtime.server import ArenaServer
from services.runtime.telemetry import configure_logging
from tests.rpc.test_runtime_server import SHAPES, Shapes, call, mount
from tests.support.otlp_receiver import collecting
from tests.unit.test_tracing import Kept
from tiltyard import telemetry
from tiltyard.calls import breaker, observed
from tiltyard.calls.channel import open_channel
from tiltyard.telemetry import metrics, otlp, tracing
from tiltyard.telemetry.delivery import COMPLAIN_EVERY_S, Delivery

SERVICE = "test.v1.Shapes"


@pytest.fixture
def kept() -> Iterator[Kept]:
    recorder = Kept()
    tracing.install(recorder)
    metrics.collect(True)
    yield recorder
    tracing.install(None)
    metrics.collect(False)


def raise_by_name(text: str) -> None:
    if text == "missing":
        raise NotFound("SHAPE_NOT_FOUND", "there is none")
    if text == "quota":
        raise ResourceExhausted("QUOTA_USED_UP", "come back later")
    if text == "defect":
        raise ValueError("a defect")


async def until_kept(kept: Kept, number: int) -> None:
    # A span ends a moment after the answer has come.
    for _ in range(500):
        if len(kept.spans) >= number:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"{len(kept.spans)} spans of {number}")


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_call_of_any_shape_is_two_spans_of_the_callers_trace(kept: Kept, shape: str) -> None:
    async with (
        ArenaServer("127.0.0.1:0", [mount(Shapes())], authenticator=None) as server,
        open_channel(server.address) as channel,
    ):
        with tracing.span("caller") as caller:
            await call(channel, shape)
        await until_kept(kept, 3)
        port = server.port
    client, answered = (
        next(span for span in kept.spans if span.kind == kind) for kind in (tracing.Kind.CLIENT, tracing.Kind.SERVER)
    )
    assert (client.name, answered.name) == (f"{SERVICE}/{shape}",) * 2
    assert (client.parent, answered.parent) == (caller.context, client.context)
    told = {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/{shape}",
        "rpc.response.status_code": "OK",
    }
    assert dict(answered.attributes) == told
    assert dict(client.attributes) == {**told, "server.address": "127.0.0.1", "server.port": port}


@pytest.mark.parametrize(
    ("text", "code", "server_error", "refused"),
    [
        ("missing", "NOT_FOUND", "", "SHAPE_NOT_FOUND"),
        ("quota", "RESOURCE_EXHAUSTED", "", "QUOTA_USED_UP"),
        ("defect", "INTERNAL", "INTERNAL", "INTERNAL"),
    ],
)
async def test_failures_are_counted_by_reason_and_in_error_where_the_server_is_to_blame(
    kept: Kept, text: str, code: str, server_error: str, refused: str
) -> None:
    (refusals,) = [each for each in metrics.declared() if each.name == "tiltyard.call.refusals"]
    assert isinstance(refusals, metrics.Counter)
    key = (("reason", refused), ("code", code))
    before = refusals.sums().get(key, 0)
    async with (
        ArenaServer("127.0.0.1:0", [mount(Shapes(raise_by_name))], authenticator=None) as server,
        open_channel(server.address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError):
            await call(channel, "unary_unary", text)
        await until_kept(kept, 2)
    errors = {span.kind: span.error for span in kept.spans}
    assert errors == {tracing.Kind.CLIENT: code, tracing.Kind.SERVER: server_error}
    assert {dict(span.attributes)["rpc.response.status_code"] for span in kept.spans} == {code}
    assert refusals.sums()[key] == before + 1


async def test_a_call_that_the_breaker_refuses_is_told_as_unavailable(kept: Kept) -> None:
    async with open_channel("127.0.0.1:1") as channel:
        for _ in range(breaker.FAILURES):
            with pytest.raises(grpc.aio.AioRpcError):
                await call(channel, "unary_unary")
        made = len(kept.spans)
        for shape in ("unary_unary", "unary_stream"):
            with pytest.raises(grpc.aio.AioRpcError):
                await call(channel, shape)
    refused = kept.spans[made:]
    assert [span.error for span in refused] == ["UNAVAILABLE", "UNAVAILABLE"]
    assert all(span.end_ns - span.start_ns < 100_000_000 for span in refused)


async def test_health_is_asked_too_often_to_be_told(kept: Kept) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with (
        ArenaServer("127.0.0.1:0", [mount(Shapes())], authenticator=None) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert kept.spans == []


def test_nothing_is_observed_where_nobody_looks() -> None:
    assert not observed.observing()
    assert observed.CallsMade("127.0.0.1:1").begin("/a.B/C") is None


def test_without_the_variables_nothing_of_opentelemetry_is_imported() -> None:
    code = (
        "import sys, services.registry.__main__, services.runtime.telemetry as t, tiltyard.cli;"
        "t.configure_telemetry('registry'); print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("environment", "traces", "metrics_too"),
    [
        ({}, False, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317"}, True, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317", "OTEL_METRICS_EXPORTER": "none"}, True, False),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://x:4317"}, False, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True, False),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, True, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317", "OTEL_SDK_DISABLED": "true"}, False, False),
    ],
)
def test_the_standard_variables_say_what_is_exported(
    environment: dict[str, str], traces: bool, metrics_too: bool
) -> None:
    assert telemetry.wanted("traces", environment) is traces
    assert telemetry.wanted("metrics", environment) is metrics_too


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "only grpc is built in"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many", "OTEL_BSP_MAX_QUEUE_SIZE is 'many', not a number"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0", "OTEL_METRIC_EXPORT_INTERVAL is '0', not above 0"),
    ],
)
def test_what_makes_no_sense_is_said_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.WARNING, "tiltyard.telemetry"):
        assert not telemetry.start("test")
    assert said in caplog.text
    assert not observed.observing()


@pytest.mark.parametrize(
    "endpoint", ["nonsense", "http://", "http://:4317", "ftp://127.0.0.1:1", "http://127.0.0.1:port", "http://[::1:1"]
)
@pytest.mark.parametrize("signal", ["", "_TRACES"])
def test_an_endpoint_that_is_none_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, endpoint: str, signal: str
) -> None:
    monkeypatch.setenv(f"OTEL_EXPORTER_OTLP{signal}_ENDPOINT", endpoint)
    with caplog.at_level(logging.WARNING, "tiltyard.telemetry"):
        assert not telemetry.start("test")
    assert f"telemetry is off: OTEL_EXPORTER_OTLP{signal}_ENDPOINT is '{endpoint}'" in caplog.text


@pytest.mark.parametrize(
    ("endpoint", "goes"),
    [
        ("http://127.0.0.1:1", "127.0.0.1:1 (unencrypted)"),
        ("https://[::1]:1/", "[::1]:1 (by TLS)"),
        # As OpenTelemetry has it: who leaves the scheme away means TLS.
        ("127.0.0.1:1", "127.0.0.1:1 (by TLS)"),
        ("unix:///nowhere", "unix:///nowhere (by TLS)"),
    ],
)
def test_where_telemetry_goes_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, endpoint: str, goes: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    export = otlp.Export.from_environment("tiltyard-test", traces=True, metrics=False)
    with caplog.at_level(logging.INFO, "tiltyard.telemetry"):
        export.start()
        export.close(grace_s=30)
    assert f"traces go to {goes}, metrics to nowhere" in caplog.text


def test_a_collector_that_is_away_is_told_of_in_few_lines_and_so_is_its_return(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    told = Delivery(clock=lambda: now[0])
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    spans = otlp.SpanExporter(Resource({}))

    def lines() -> list[str]:
        said = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return said

    told.follow()
    try:
        with caplog.at_level(logging.DEBUG):
            for _ in range(3):
                told.note(arrived=spans.send([]) is not SpanExportResult.FAILURE)
            (first,) = lines()
            assert first.startswith("telemetry does not arrive, sent in vain 1 times: Failed to export traces to 127.")
            # On a busy machine the refusal may come too late.
            assert re.search("UNAVAILABLE|DEADLINE_EXCEEDED", first)
            now[0] = COMPLAIN_EVERY_S
            told.note(arrived=False)
            told.note(arrived=False)
            (later,) = lines()
            assert later.startswith("telemetry does not arrive, sent in vain 4 times")
            told.note(arrived=True)
            told.note(arrived=True)
            assert lines() == ["telemetry arrives again, after it was sent in vain 5 times"]
            told.note(arrived=False)
            assert len(lines()) == 1
    finally:
        told.leave()
        spans.shutdown()


def exporting(monkeypatch: pytest.MonkeyPatch, address: str, **more: str) -> otlp.Export:
    for name, value in {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}", **more}.items():
        monkeypatch.setenv(name, value)
    return otlp.Export.from_environment("tiltyard-test", traces=True, metrics=True)


def test_a_busy_service_sends_whole_batches_and_at_its_end_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    grown = threading.Condition()

    def work(times: int) -> None:
        for _ in range(times):
            with tracing.span("work"):
                pass

    def send(_exporter: otlp.SpanExporter, spans: Sequence[tracing.Span]) -> None:
        if not sent:
            work(2)  # what comes while the collector is called
        with grown:
            sent.append(len(spans))
            grown.notify_all()

    monkeypatch.setattr(otlp.SpanExporter, "send", send)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "3600000")
    export = otlp.Export.from_environment("tiltyard-test", traces=True, metrics=False)
    export.start()
    try:
        for whole in (1, 2):
            work(4)
            with grown:
                assert grown.wait_for(lambda many=whole: len(sent) == many, timeout=30)
    finally:
        export.close(grace_s=30)
    assert sent == [4, 4, 2]


def test_a_collector_that_is_away_costs_spans_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Connections are taken, and nobody ever answers: the worst that a collector can do.
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        export = exporting(monkeypatch, f"127.0.0.1:{deaf.getsockname()[1]}", OTEL_BSP_MAX_QUEUE_SIZE="100")
        export.start()
        try:
            started = time.monotonic()
            for _ in range(1000):
                with tracing.span("work"):
                    pass
            assert time.monotonic() - started < 5  # an export that nobody answers takes 10 s
        finally:
            closing = time.monotonic()
            with caplog.at_level(logging.WARNING):
                export.close(grace_s=0.5)
    assert time.monotonic() - closing < 8
    assert not observed.observing()
    assert "spans were dropped" in caplog.text


def test_everything_queued_is_sent_at_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with collecting(tmp_path / "told.jsonl") as collector:
        export = exporting(monkeypatch, collector.address, OTEL_SERVICE_NAME="mine", OTEL_RESOURCE_ATTRIBUTES="a=b")
        export.start()
        with tracing.span("outer", rows=3, share=0.5, good=True), pytest.raises(KeyError), tracing.span("inner"):
            raise KeyError
        export.close(grace_s=10)
        inner, outer = collector.spans()
        assert (inner.name, inner.parent, inner.trace, inner.error) == ("inner", outer.id, outer.trace, "KeyError")
        assert (outer.service, outer.parent, outer.error, outer.kind) == ("mine", "", "", "INTERNAL")
        assert outer.attributes == {"tiltyard.rows": 3, "tiltyard.share": 0.5, "tiltyard.good": True}


@pytest.mark.parametrize("kind", tracing.Kind)
@pytest.mark.parametrize(
    ("parent", "parent_id"),
    [(None, ""), (f"00-{'0a' * 16}-{'0b' * 8}-01", "0b" * 8), (f"00-{'0a' * 16}-{'no' * 8}-01", "")],
)
@pytest.mark.parametrize("error", ["", "UNAVAILABLE"])
@pytest.mark.parametrize("size", [1, 300])
def test_spans_are_on_the_wire_as_protobuf_would_have_them(
    kept: Kept, kind: tracing.Kind, parent: str | None, parent_id: str, error: str, size: int
) -> None:
    with tracing.Span("n" * size, kind, parent, (("text", "v" * size), ("number", -1), ("good", True))) as span:
        span.error = error
    exporter = otlp.SpanExporter(Resource({"service.name": "mine"}))
    request = ExportTraceServiceRequest.FromString(exporter.encoded([span, span]))
    exporter.shutdown()
    context = span.context
    assert context is not None
    expected = trace_pb2.Span(
        trace_id=bytes.fromhex(context.trace_id),
        span_id=bytes.fromhex(context.span_id),
        parent_span_id=bytes.fromhex(parent_id),
        name="n" * size,
        kind=trace_pb2.Span.SpanKind.ValueType(kind),
        start_time_unix_nano=span.start_ns,
        end_time_unix_nano=span.end_ns,
    )
    for key, value in (
        ("text", {"string_value": "v" * size}),
        ("number", {"int_value": -1}),
        ("good", {"bool_value": True}),
    ):
        expected.attributes.add(key=key, value=AnyValue(**value))
    if error:
        expected.status.code, expected.status.message = trace_pb2.Status.STATUS_CODE_ERROR, error
    (resource,) = request.resource_spans
    (scope,) = resource.scope_spans
    assert [(each.key, each.value.string_value) for each in resource.resource.attributes] == [("service.name", "mine")]
    assert scope.scope.name == "tiltyard"
    assert list(scope.spans) == [expected, expected]


@pytest.mark.parametrize(
    ("sampler", "argument", "recorded"),
    [
        ("parentbased_always_off", "", 1),
        ("parentbased_traceidratio", "0", 1),
        ("parentbased_traceidratio", "1", 2),
        ("always_off", "", 0),
        ("always_on", "", 3),
        ("traceidratio", "1", 3),
    ],
)
def test_sampling_is_the_users(monkeypatch: pytest.MonkeyPatch, sampler: str, argument: str, recorded: int) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    export = exporting(monkeypatch, "127.0.0.1:1")
    taken: list[tracing.Span] = []
    monkeypatch.setattr(export, "record", taken.append)
    tracing.install(export)
    try:
        with tracing.span("a root"):
            pass
        with tracing.span("of a sampled caller", parent=f"00-{'a' * 32}-{'b' * 16}-01"):
            pass
        with tracing.span("of another", parent=f"00-{'a' * 32}-{'b' * 16}-00"):
            pass
    finally:
        tracing.install(None)
    assert len(taken) == recorded


def test_log_lines_within_a_span_name_it(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    try:
        monkeypatch.setattr(sys, "stderr", stream)
        configure_logging("test", "info", "json")
        log = structlog.get_logger()
        log.info("outside")
        with tracing.span("work"):
            log.info("within")
            logging.getLogger("library").warning("within, too")
    finally:
        root.handlers[:], root.level = handlers, level
        structlog.configure(**before)
    outside, within, library = map(json.loads, stream.getvalue().splitlines())
    (span,) = kept.spans
    assert span.context is not None
    assert "trace_id" not in outside
    for line in (within, library):
        assert (line["trace_id"], line["span_id"]) == (span.context.trace_id, span.context.span_id)
