"""Sends spans and metrics to a collector by OTLP, in batches from a thread of its own.

Configuration, transport and retries are OpenTelemetry's. What runs within every call is not: a span of its SDK costs 30
microseconds to make and 34 to encode, a histogram's value 7, where a whole call takes 300.
"""

import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from struct import Struct
from typing import Any, cast
from urllib.parse import urlsplit
from uuid import uuid4

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, ParentBased
from opentelemetry.sdk.util import instrumentation

from tiltyard.telemetry import metrics, tracing
from tiltyard.telemetry.delivery import Delivery
from tiltyard.telemetry.tracing import Attributes, Kind, Span, TraceContext
from tiltyard.varint import encode_varint

_SCOPE = "tiltyard"
_INTERNAL = Kind.INTERNAL  # an enumeration takes as long to look one up as a span's times to write
_LONGEST_CLOSE_S = 0.5
_COMPLAIN_EVERY_S = 60.0
_DROPPED = metrics.Counter(
    "tiltyard.telemetry.spans.dropped",
    unit="{span}",
    description="Spans dropped since the collector did not keep up.",
    told_at_zero=[{}],
)

_log = logging.getLogger("tiltyard.telemetry")


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{variable} is {text!r}, not a number") from None
    if value <= 0:
        raise ValueError(f"{variable} is {text!r}, not above 0")
    return value


def _check_endpoint(variable: str) -> None:
    """Refuses what no exporter reaches: without a word OpenTelemetry makes a host of it, or leaves the scheme away."""
    text = os.environ.get(variable, "").strip()
    try:
        url = urlsplit(text)
        _ = url.port  # a number, and one of 16 bits
    except ValueError as error:
        raise ValueError(f"{variable} is {text!r}: {error}") from None
    ours = url.scheme in ("http", "https")
    # Without a host of a URL it is one of gRPC's own names, as HOST:PORT or unix:///PATH.
    if text and (bool(url.netloc) != ours or (ours and not url.hostname) or ":" not in text):
        raise ValueError(f"{variable} is {text!r}, not http://HOST:PORT or https://HOST:PORT")


def _goes(exporter: "SpanExporter | OTLPMetricExporter | None") -> str:
    """Where what an exporter is given goes to."""
    return f"{exporter._endpoint} ({'unencrypted' if exporter._insecure else 'by TLS'})" if exporter else "nowhere"


class Export:
    """A bounded queue of spans and the thread that empties it; when the collector is away, spans are dropped.

    No caller ever waits for it. `spans` and `numbers` are None where a signal is not wanted.
    """

    def __init__(
        self,
        resource: Resource,
        *,
        spans: "SpanExporter | None",
        numbers: OTLPMetricExporter | None,
        span_delay_s: float,
        max_queue: int,
        max_batch: int,
        metric_interval_s: float,
    ) -> None:
        self._resource = resource
        self._spans = spans
        self._numbers = numbers
        self._span_delay_s = span_delay_s
        self._max_queue = max_queue
        self._max_batch = min(max_batch, max_queue)
        self._metric_interval_s = metric_interval_s
        self._sampler = TracerProvider(shutdown_on_exit=False).sampler
        self.follows_parents = isinstance(self._sampler, ParentBased)
        self._delivery = Delivery()
        self._queue: deque[Span] = deque()
        self._dropped = 0
        self._next_complaint = 0.0
        self._wake = threading.Event()
        self._closing = False
        self._began_ns = time.time_ns()
        # A daemon: a thread that waits for a collector must not keep a process from ending.
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    @classmethod
    def from_environment(cls, service: str, *, traces: bool, metrics: bool) -> "Export":
        """As the OTEL_* variables say. Raises ValueError naming a variable that makes no sense."""
        for signal in ("", "_TRACES", "_METRICS"):
            _check_endpoint(f"OTEL_EXPORTER_OTLP{signal}_ENDPOINT")
        own = {"service.name": service, "service.instance.id": str(uuid4())}
        # The environment's words win over ours.
        resource = Resource.create(own).merge(OTELResourceDetector().detect())
        return cls(
            resource,
            spans=SpanExporter(resource) if traces else None,
            numbers=OTLPMetricExporter() if metrics else None,
            span_delay_s=_number("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000,
            max_queue=int(_number("OTEL_BSP_MAX_QUEUE_SIZE", 2048)),
            max_batch=int(_number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)),
            metric_interval_s=_number("OTEL_METRIC_EXPORT_INTERVAL", 60_000) / 1000,
        )

    def start(self) -> None:
        """Records and collects from now on."""
        self._began_ns = time.time_ns()
        self._delivery.follow()
        _log.info("traces go to %s, metrics to %s", _goes(self._spans), _goes(self._numbers))
        tracing.install(self if self._spans is not None else None)
        metrics.collect(self._numbers is not None)
        self._thread.start()

    def samples(self, trace_id: str, name: str, parent: TraceContext | None) -> bool:
        """By OTEL_TRACES_SAMPLER."""
        if parent is not None and self.follows_parents:
            return parent.sampled
        return self._sampler.should_sample(None, int(trace_id, 16), name).decision is Decision.RECORD_AND_SAMPLE

    def record(self, span: Span) -> None:
        """Takes a span, or drops it where the queue is full."""
        queued = len(self._queue)
        if queued >= self._max_queue:
            self._dropped += 1
            return
        self._queue.append(span)
        if queued + 1 == self._max_batch:
            self._wake.set()

    def close(self, grace_s: float) -> None:
        """Sends what is queued, and ends after `grace_s` seconds at most, answered or not."""
        if self._closing:
            return
        tracing.install(None)
        metrics.collect(False)
        self._closing = True
        self._wake.set()
        self._thread.join(grace_s)
        # Ends a call that waits for its collector, and retries.
        for exporter in (self._spans, self._numbers):
            if exporter is not None:
                exporter.shutdown()
        self._thread.join(_LONGEST_CLOSE_S)
        self._delivery.leave()

    def _run(self) -> None:
        next_metrics = time.monotonic() + self._metric_interval_s
        while not self._closing:
            woken = self._wake.wait(max(0.0, min(self._span_delay_s, next_metrics - time.monotonic())))
            self._wake.clear()
            # To call the collector costs as much as hundreds of spans: the few that came meanwhile wait for more.
            self._send_spans(at_least=self._max_batch if woken else 1)
            if time.monotonic() >= next_metrics:
                next_metrics = time.monotonic() + self._metric_interval_s
                self._send_metrics()
        self._send_spans(at_least=1)
        self._send_metrics()

    def _send_spans(self, *, at_least: int) -> None:
        if self._spans is None:
            return
        while len(self._queue) >= at_least:
            batch = [self._queue.popleft() for _ in range(min(self._max_batch, len(self._queue)))]
            try:
                sent = self._spans.send(batch)
                self._delivery.note(arrived=sent is not SpanExportResult.FAILURE)
            except Exception as error:
                _log.warning("%d spans were not sent: %s", len(batch), error)
        if self._dropped and (self._closing or time.monotonic() >= self._next_complaint):
            self._next_complaint = time.monotonic() + _COMPLAIN_EVERY_S
            dropped, self._dropped = self._dropped, 0
            _DROPPED.add(dropped)
            _log.warning("%d spans were dropped: the collector is away, or slower than they come", dropped)

    def _send_metrics(self) -> None:
        if self._numbers is None:
            return
        try:
            sent = self._numbers.export(_metrics_data(self._resource, self._began_ns, time.time_ns()))
            self._delivery.note(arrived=sent is not sdk.MetricExportResult.FAILURE)
        except Exception as error:
            _log.warning("metrics were not sent: %s", error)


class SpanExporter(OTLPSpanExporter):
    """OpenTelemetry's exporter with an encoder for `tracing.Span`."""

    def __init__(self, resource: Resource) -> None:
        super().__init__()
        about = trace_pb2.ResourceSpans()
        about.resource.attributes.extend(_pairs(tuple(resource.attributes.items())))
        self._resource = about.SerializeToString()
        self._scope = trace_pb2.ScopeSpans(scope=InstrumentationScope(name=_SCOPE)).SerializeToString()

    def send(self, spans: Sequence[Span]) -> SpanExportResult:
        """Sends a batch, with retries until OTEL_EXPORTER_OTLP_TIMEOUT is over; what fails is gone."""
        return self._export(cast(Any, spans))

    def _initialize_channel_and_stub(self) -> None:
        super()._initialize_channel_and_stub()  # type: ignore[no-untyped-call]
        self._client: Any = _UndecodedStub(self._channel)

    def _translate_data(self, data: Sequence[Span]) -> bytes:  # type: ignore[override]
        return self.encoded(data)

    def encoded(self, spans: Sequence[Span]) -> bytes:
        """An ExportTraceServiceRequest."""
        return _field(1, self._resource + _field(2, self._scope + b"".join(map(_encoded, spans))))


class _UndecodedStub:
    """A TraceServiceStub whose requests are bytes already."""

    def __init__(self, channel: Any) -> None:
        self.Export = channel.unary_unary(
            "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
            response_deserializer=ExportTraceServiceResponse.FromString,
        )


# A span's ids and times as they are on the wire: the tag of each field, the length of an id, the value.
_TIMES = Struct("<BQBQ")


def _encoded(span: Span) -> bytes:
    """A span as a field of ScopeSpans. A message of protobuf's own takes four times as long to fill."""
    if span.unread:
        span.read()
    outline = _template if span.kind is not _INTERNAL else _outline
    if span.parent_id:
        head = outline(span.name, span.kind, span.attributes, span.error, 56)
        ids = f"0a10{span.trace_id}1208{span.span_id}2208{span.parent_id}"
    else:
        head = outline(span.name, span.kind, span.attributes, span.error, 46)
        ids = f"0a10{span.trace_id}1208{span.span_id}"
    return head + bytes.fromhex(ids) + _TIMES.pack(0x39, span.start_ns, 0x41, span.end_ns)


def _outline(name: str, kind: int, attributes: Attributes, error: str, more: int) -> bytes:
    """A span as a field of ScopeSpans up to where its ids and times follow, `more` bytes."""
    message = trace_pb2.Span(name=name, kind=trace_pb2.Span.SpanKind.ValueType(kind), attributes=_pairs(attributes))
    if error:
        message.status.code = trace_pb2.Status.STATUS_CODE_ERROR
        message.status.message = error
    told = message.SerializeToString()
    return b"\x12" + encode_varint(len(told) + more) + told


# Calls of one method that end alike differ in ids and times only.
_template = functools.lru_cache(maxsize=4096)(_outline)


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes, or of a message (https://protobuf.dev/programming-guides/encoding/)."""
    return bytes((number << 3 | 2,)) + encode_varint(len(content)) + content


def _pairs(attributes: Sequence[tuple[str, object]]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_any_value(value)) for key, value in attributes]


def _any_value(value: object) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case _:
            return AnyValue(string_value=str(value))


def _metrics_data(resource: Resource, began_ns: int, now_ns: int) -> sdk.MetricsData:
    """Every declared instrument that has something to say, since the start."""
    told = [
        sdk.Metric(instrument.name, instrument.description, instrument.unit, data)
        for instrument in metrics.declared()
        if (data := _points(instrument, began_ns, now_ns)).data_points
    ]
    scope = sdk.ScopeMetrics(instrumentation.InstrumentationScope(_SCOPE), told, "")
    return sdk.MetricsData([sdk.ResourceMetrics(resource, [scope], "")])


def _points(instrument: metrics.Instrument, began_ns: int, now_ns: int) -> sdk.Sum | sdk.Gauge | sdk.Histogram:
    match instrument:
        case metrics.Counter():
            points = _numbers(instrument.sums(), began_ns, now_ns)
            return sdk.Sum(points, sdk.AggregationTemporality.CUMULATIVE, is_monotonic=True)
        case metrics.Gauge():
            return sdk.Gauge(_numbers(instrument.values(), began_ns, now_ns))
        case metrics.Histogram():
            return sdk.Histogram(
                [
                    sdk.HistogramDataPoint(
                        attributes=dict(key),
                        start_time_unix_nano=began_ns,
                        time_unix_nano=now_ns,
                        count=found.count,
                        sum=found.total,
                        bucket_counts=found.counts,
                        explicit_bounds=instrument.bounds,
                        min=found.lowest,
                        max=found.highest,
                    )
                    for key, found in instrument.distributions().items()
                ],
                sdk.AggregationTemporality.CUMULATIVE,
            )
        case _:
            raise TypeError(f"{instrument.name} is of no known kind")


def _numbers(values: Mapping[metrics.Key, float], began_ns: int, now_ns: int) -> list[sdk.NumberDataPoint]:
    return [
        sdk.NumberDataPoint(attributes=dict(key), start_time_unix_nano=began_ns, time_unix_nano=now_ns, value=value)
        for key, value in values.items()
    ]
