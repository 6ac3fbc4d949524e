"""The background loop: slow work and deadlines, in small steps that may be repeated after any death of the process."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Protocol

import structlog

from services.registry.transaction import Store
from services.runtime.errors import Unavailable
from tiltyard.telemetry import metrics

Step = Callable[[], Awaitable[int]]
"""Does what is due and answers with the number of things done. What it raises is retried at the next turn."""

# The selector's ledger announces nothing: it is asked this often, and sooner after turns that did something, from which
# most of its changes follow. Under many calls there are twenty turns a second, and nearly all do nothing.
_LONGEST_PAUSE_S = 1.0
# A deadline that no step can act on yet must not keep a processor busy.
_SHORTEST_PAUSE_S = 0.05
_LONGEST_REST_S = 0.25
_SHORTEST_REST_S = 0.04

_TURN = metrics.Histogram(
    "tiltyard.referee.turn.duration",
    unit="s",
    description="Duration of a turn of the background loop.",
    bounds=metrics.CALL_SECONDS,
)
_TURNED = metrics.Gauge(
    "tiltyard.referee.turn.time", unit="s", description="When the background loop last ended a turn, in Unix time."
)
_FAILURES = metrics.Counter(
    "tiltyard.referee.failures", unit="{step}", description="Steps of the background loop that failed, by step."
)

_log = structlog.get_logger("tiltyard.referee")


class Alarm(Protocol):
    """What wakes the loop."""

    async def wait_for_referee(self, timeout_s: float) -> None:
        """Return at the next wake-up or when the time is over."""
        ...


class Referee:
    """Runs all steps when something has changed, when a deadline has come, and at least every second.

    `beat` notes that the registry is at work. Where it fails the turn is over: what could not be taken in is not to
    expire, so that none of the steps comes before it is known for how long that was.
    """

    def __init__(
        self,
        beat: Step,
        steps: Sequence[Step],
        ledger: Step,
        store: Store,
        alarm: Alarm,
        clock: Callable[[], datetime],
    ) -> None:
        self._beat = beat
        self._steps = tuple(steps)
        self._ledger = ledger
        self._store = store
        self._alarm = alarm
        self._clock = clock

    async def run(self) -> None:
        """Turn after turn, without end."""
        ledger_due = 0.0
        while True:
            started = time.perf_counter()
            done = await self.turn(ledger_due=started >= ledger_due)
            if done or started >= ledger_due:
                ledger_due = started + _LONGEST_PAUSE_S
            # Calls and turns share a processor, and under load there is always a wake-up: a turn is followed by a rest
            # as long as itself, a longer one where it found nothing to do.
            took_s = time.perf_counter() - started
            rest_s = took_s if done else max(_SHORTEST_REST_S, 3 * took_s)
            await asyncio.sleep(min(_LONGEST_REST_S, rest_s))
            await self._alarm.wait_for_referee(await self._pause_s())

    async def turn(self, *, ledger_due: bool = True) -> int:
        """Run each step once after the beat; one that fails is logged and does not hold up the others.

        The ledger comes last, where it is due or a step has done something.
        """
        started = time.perf_counter()
        done = await _tried(self._beat)
        if done is not None:
            for step in self._steps:
                done += await _tried(step) or 0
            if ledger_due or done:
                done += await _tried(self._ledger) or 0
            # Told of turns alone that were at work: where none has been for minutes, somebody is woken.
            _TURNED.set(self._clock().timestamp())
        _TURN.record(time.perf_counter() - started)
        return done or 0

    async def _pause_s(self) -> float:
        try:
            deadline = await self._store.look_up(lambda tx: tx.next_deadline())
        except Unavailable:
            # The next turn says so.
            return _LONGEST_PAUSE_S
        if deadline is None:
            return _LONGEST_PAUSE_S
        due_s = (deadline - self._clock()).total_seconds()
        return min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, due_s))


async def _tried(step: Step) -> int | None:
    """How much it has done, None where it failed."""
    try:
        return await step()
    except Exception as error:
        _report(step, error)
        return None


def _report(step: Step, error: Exception) -> None:
    name = getattr(step, "__qualname__", repr(step))
    _FAILURES.add(step=name, unavailable=_is_unavailable(error))
    if _is_unavailable(error):
        _log.warning("a peer cannot be reached, the step is tried again", step=name, error=str(error))
    else:
        _log.error("a step of the referee failed, it is tried again", step=name, exc_info=error)


def _is_unavailable(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_unavailable(part) for part in error.exceptions)
    return isinstance(error, Unavailable)
