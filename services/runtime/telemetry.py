"""What a process tells its operator: logs on standard error, and spans and metrics where the OTEL_* variables say so.

A log line is one JSON object with ids and no secrets; within a span it names the trace.
"""

import logging
import sys
import threading
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from services.runtime import process_metrics
from tiltyard import telemetry
from tiltyard.telemetry import tracing

LogFormat = Literal["json", "console"]

_SECRET_KEYS = frozenset({"authorization", "token", "lease_token", "secret", "password", "salt", "database_url"})


_log = structlog.get_logger("tiltyard.process")


def _without_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key in _SECRET_KEYS & event.keys():
        event[key] = "(left out)"
    return event


def _with_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    span = tracing.current()
    if span is not None and (context := span.context) is not None:
        event["trace_id"], event["span_id"] = context.trace_id, context.span_id
    return event


def default_format() -> LogFormat:
    """For people on a terminal, JSON everywhere else."""
    return "console" if sys.stderr.isatty() else "json"


def configure_telemetry(name: str, level: str = "info", format: LogFormat | None = None) -> None:
    """Logs, traces and metrics of the service `name`, from its composition root and before any channel is opened."""
    configure_logging(name, level, format)
    _log_what_python_prints()
    if telemetry.start(name):
        process_metrics.follow()


def _log_what_python_prints() -> None:
    """Warnings, and what ends a thread or a finaliser, as lines of the log; by default these go to standard error bare.

    gRPC's core and other native code write there by themselves.
    """
    logging.captureWarnings(True)

    def log_thread(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_type is not SystemExit:
            thread = ended.thread.name if ended.thread else ""
            _log.error("a thread was ended by an error", thread=thread, exc_info=ended.exc_value)

    def log_unraisable(ignored: "sys.UnraisableHookArgs") -> None:
        _log.error("an error could not be raised", where=repr(ignored.object), exc_info=ignored.exc_value)

    threading.excepthook = log_thread
    sys.unraisablehook = log_unraisable


def configure_logging(name: str, level: str = "info", format: LogFormat | None = None) -> None:
    """Sends the logs of structlog and of `logging` to standard error, each line with the service's `name`."""
    threshold = logging.getLevelNamesMapping()[level.upper()]

    def with_service(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", name)
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        with_service,
        _with_trace,
        _without_secrets,
    ]
    renderers: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
        if (format or default_format()) == "json"
        else [structlog.dev.ConsoleRenderer()]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(threshold)
    # Each migration step is worth a line only to whoever debugs one.
    logging.getLogger("alembic").setLevel(max(threshold, logging.WARNING))
