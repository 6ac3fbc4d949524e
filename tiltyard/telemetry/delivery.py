"""Says whether a collector takes what is sent: once it does not, now and then from there on, and once it does again."""

import logging
import time
from collections.abc import Callable

COMPLAIN_EVERY_S = 600.0
# OpenTelemetry tells of each try and of each that failed: a dozen lines a minute while a collector is away.
_EXPORTER = logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter")

_log = logging.getLogger("tiltyard.telemetry")


class Delivery(logging.Filter):
    """Takes what OpenTelemetry's exporters would log between `follow` and `leave`, and puts it in few lines."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._error = "it has not answered"
        self._failures = 0
        self._next_complaint = 0.0

    def follow(self) -> None:
        """Nothing of theirs is logged from now on."""
        _EXPORTER.addFilter(self)

    def leave(self) -> None:
        """They may log again."""
        _EXPORTER.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Keeps an error for the next complaint."""
        if record.levelno >= logging.ERROR:
            self._error = record.getMessage()
        return False

    def note(self, *, arrived: bool) -> None:
        """Something was taken, or was sent in vain and is gone."""
        if arrived:
            if self._failures:
                _log.warning("telemetry arrives again, after it was sent in vain %d times", self._failures)
            self._failures = 0
            return
        now = self._clock()
        if not self._failures:
            self._next_complaint = now
        self._failures += 1
        if now >= self._next_complaint:
            self._next_complaint = now + COMPLAIN_EVERY_S
            _log.warning("telemetry does not arrive, sent in vain %d times: %s", self._failures, self._error)
