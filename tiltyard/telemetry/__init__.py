"""Switches telemetry on where the OTEL_* variables ask for it; without them nothing of OpenTelemetry is imported."""

import atexit
import logging
import os
from collections.abc import Mapping

_log = logging.getLogger("tiltyard.telemetry")

# How long the end of a process may wait for a collector that does not answer.
CLOSE_S = 2.0
_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def wanted(signal: str, environment: Mapping[str, str]) -> bool:
    """Whether a signal (`traces` or `metrics`) is to be exported.

    It is where its exporter is `otlp`, or where that is not said but an endpoint is: the specification's default would
    have every process look for a collector that nobody has set up.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporters = environment.get(f"OTEL_{signal.upper()}_EXPORTER", "").lower().replace(" ", "").split(",")
    if any(exporters):
        return "otlp" in exporters
    return bool(environment.get(_ENDPOINT) or environment.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT"))


def start(service: str) -> bool:
    """Begins to export what this process does, as the service `tiltyard-{service}` where OTEL_SERVICE_NAME is silent.

    True when something is exported. What is wrong with the variables is logged, and never stops a process.
    """
    traces, metrics = wanted("traces", os.environ), wanted("metrics", os.environ)
    if not (traces or metrics):
        return False
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc").strip().lower()
    if protocol != "grpc":
        _log.warning("telemetry is off: OTEL_EXPORTER_OTLP_PROTOCOL is %r, and only grpc is built in", protocol)
        return False
    try:
        from tiltyard.telemetry import otlp
    except ImportError as error:
        _log.warning("telemetry is off: it needs pip install 'tiltyard[telemetry]' (%s)", error)
        return False
    try:
        export = otlp.Export.from_environment(f"tiltyard-{service}", traces=traces, metrics=metrics)
    except (ValueError, RuntimeError, OSError) as error:
        _log.warning("telemetry is off: %s", error)
        return False
    export.start()
    atexit.register(export.close, CLOSE_S)
    return True
