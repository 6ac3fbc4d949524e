"""What a validator tells of its duties in numbers."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from services.validator.runs import Run, RunState
from tiltyard.telemetry import metrics

_ENDED = metrics.Counter(
    "tiltyard.evaluations.ended",
    unit="{run}",
    description="Runs that ended, by state.",
    told_at_zero=[{"state": state.value} for state in (RunState.OPENED, RunState.FAILED)],
)
_ROWS = metrics.Counter("tiltyard.evaluation.rows", unit="{row}", description="Rows counted in runs that ended.")
_FAULTS = metrics.Counter("tiltyard.evaluation.faults", unit="{fault}", description="Faults found in models, by kind.")
_DURATION = metrics.Histogram(
    "tiltyard.evaluation.duration",
    unit="s",
    description="From the lease to the end of a run, in which a validator also waits for the others.",
    bounds=(0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0),
)
_DUTIES = metrics.Gauge("tiltyard.duties", unit="{duty}", description="Duties not yet ended, by what they are at.")

_STATES = ("WAITING", *(state.value for state in (RunState.FETCHING, RunState.EVALUATING, RunState.SEALED)))


class Duty(Protocol):
    """One assignment that has not ended; `run` is None until the lease is held."""

    run: Run | None


def follow(duties: Callable[[], Sequence[Duty]]) -> None:
    """Tells how many duties there are whenever metrics are collected."""

    def counts() -> dict[metrics.Key, float]:
        states = Counter("WAITING" if duty.run is None else duty.run.state.value for duty in duties())
        return {(("state", state),): states[state] for state in _STATES}

    _DUTIES.follow(counts)


def note_ended(run: Run) -> None:
    """Counts a run that has ended."""
    _ENDED.add(state=run.state.value)
    if run.end_time is not None:
        _DURATION.record((run.end_time - run.start_time).total_seconds())
    if run.finding is None:
        return
    if run.finding.counts is not None:
        _ROWS.add(run.finding.counts.total)
    if run.finding.fault is not None:
        _FAULTS.add(fault=run.finding.fault.value)
