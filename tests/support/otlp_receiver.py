"""A collector for tests, in a process of its own: takes OTLP on a free port and writes down what came.

`python -m tests.support.otlp_receiver FILE` prints its address, then appends a JSON line to FILE for each span and each
metric.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


def _values(attributes: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}


class Receiver(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Both services of a collector, which have a method of one name."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            self._write(_spans(request))
            return trace_service_pb2.ExportTraceServiceResponse()
        self._write(_metrics(request))
        return metrics_service_pb2.ExportMetricsServiceResponse()

    def _write(self, lines: Iterator[dict[str, Any]]) -> None:
        # One write a batch: whoever reads sees whole lines.
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with self._file.open("a") as file:
            file.write(text)


def _spans(request: trace_service_pb2.ExportTraceServiceRequest) -> Iterator[dict[str, Any]]:
    for resource in request.resource_spans:
        about = _values(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield {
                    "kind": trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    "service": about["service.name"],
                    "instance": about["service.instance.id"],
                    "name": span.name,
                    "trace": span.trace_id.hex(),
                    "id": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(),
                    "start_ns": span.start_time_unix_nano,
                    "end_ns": span.end_time_unix_nano,
                    "error": span.status.message,
                    "attributes": _values(span.attributes),
                }


def _metrics(request: metrics_service_pb2.ExportMetricsServiceRequest) -> Iterator[dict[str, Any]]:
    for resource in request.resource_metrics:
        service = _values(resource.resource.attributes)["service.name"]
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                shape = metric.WhichOneof("data")
                for point in getattr(metric, shape).data_points:
                    value = point.sum if shape == "histogram" else getattr(point, point.WhichOneof("value"))
                    yield {
                        "metric": metric.name,
                        "unit": metric.unit,
                        "shape": shape,
                        "service": service,
                        "attributes": _values(point.attributes),
                        "value": value,
                        "count": point.count if shape == "histogram" else 1,
                    }


@dataclass(frozen=True)
class Span:
    """One span as it came."""

    kind: str
    service: str
    instance: str
    name: str
    trace: str
    id: str
    parent: str
    start_ns: int
    end_ns: int
    error: str
    attributes: Mapping[str, Any] = field(compare=False)


@dataclass(frozen=True)
class Collector:
    """A receiver that runs: where it listens, and what it has taken."""

    address: str
    process: subprocess.Popen[str]
    file: Path

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process tell this collector at once."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self.address}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_METRIC_EXPORT_INTERVAL": "500",
        }

    def spans(self) -> list[Span]:
        """Every span so far."""
        return [Span(**line) for line in self._lines() if "metric" not in line]

    def metrics(self) -> list[dict[str, Any]]:
        """Every point of every metric so far."""
        return [line for line in self._lines() if "metric" in line]

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]


@contextmanager
def collecting(file: Path) -> Iterator[Collector]:
    """A receiver in a process of its own, until the end of the context."""
    file.touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.otlp_receiver", str(file)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield Collector(process.stdout.readline().strip(), process, file)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> None:
    """Serves until it is killed."""
    server = grpc.server(ThreadPoolExecutor(4))
    receiver = Receiver(Path(sys.argv[1]))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    sys.stdout.write(f"127.0.0.1:{port}\n")
    sys.stdout.flush()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
