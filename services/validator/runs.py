"""The validator's work on one assignment: its states, what it found, and how far it is."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from tiltyard.counting import Counts

_RATE_SAMPLES = 32


class RunState(StrEnum):
    """Where a run stands, as tiltyard.validator.v1.EvaluationRunState names it."""

    FETCHING = "FETCHING"
    EVALUATING = "EVALUATING"
    SEALED = "SEALED"
    OPENED = "OPENED"
    RELEASED = "RELEASED"
    FAILED = "FAILED"


ENDED_RUNS = frozenset({RunState.OPENED, RunState.RELEASED, RunState.FAILED})


class Fault(StrEnum):
    """What can be wrong with a model, as tiltyard.type.v1.ModelFault names it."""

    NAN_OUTPUT = "NAN_OUTPUT"
    BAD_FORMAT = "BAD_FORMAT"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    TOO_SLOW = "TOO_SLOW"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    CRASHED = "CRASHED"


@dataclass(frozen=True)
class Finding:
    """What an evaluation found: counts with the digests of the predictions, or a fault with a sentence on it.

    `node_endpoint`: the training node's own server answered, and nothing ties that to the committed weights.
    """

    counts: Counts | None = None
    prediction_blocks: tuple[bytes, ...] = ()
    fault: Fault | None = None
    detail: str = ""
    node_endpoint: bool = False


@dataclass(frozen=True)
class SealedReport:
    """A signed report, the salt that hides it, and its signed seal; the envelopes are serialised.

    `hashes` are handed in beside the report: `tiltyard.predictions.handed_in` of its prediction blocks.
    """

    report: bytes
    salt: bytes
    seal: bytes
    hashes: bytes = b""


@dataclass(frozen=True)
class Run:
    """One run as the validator's own database keeps it. `number` orders runs by their start; 0 before it is stored."""

    assignment: str
    task: str
    state: RunState
    start_time: datetime
    finding: Finding | None = None
    sealed: SealedReport | None = None
    detail: str = ""
    end_time: datetime | None = None
    number: int = 0


class RunStore(Protocol):
    """Where runs outlive the process; a returned `add` or `save` is durable."""

    async def add(self, run: Run) -> Run:
        """Stores a new run and returns it with its number."""
        ...

    async def save(self, run: Run) -> None:
        """Stores a run's new state."""
        ...

    async def get(self, assignment: str) -> Run | None:
        """The run of an assignment."""
        ...

    async def unfinished(self) -> list[Run]:
        """Runs that have not ended, oldest first."""
        ...

    async def page(self, *, below: int | None, size: int) -> list[Run]:
        """At most `size` runs numbered below `below` (None: from the newest on), newest first."""
        ...

    async def count_ended(self) -> int:
        """How many runs have ended."""
        ...

    async def tasks(self) -> list[str]:
        """The tasks of all runs."""
        ...


class Progress:
    """Position in a run's rows. One thread moves it, others read."""

    def __init__(self, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self._samples: deque[tuple[float, int]] = deque(maxlen=_RATE_SAMPLES)
        self.position = 0
        self.total = 0

    def begin(self, total: int) -> None:
        """Rows are about to be answered, from the first on: `total` in all."""
        self.position = 0
        self.total = total
        self._samples.clear()
        self._samples.append((self._timer(), 0))

    def advance(self, position: int) -> None:
        """So many rows have been answered."""
        self.position = position
        self._samples.append((self._timer(), position))

    def samples_per_second(self) -> float:
        """Rows per second over the last batches; 0 before the first."""
        samples = tuple(self._samples)
        if len(samples) < 2:
            return 0.0
        (first_time, first), (last_time, last) = samples[0], samples[-1]
        return (last - first) / (last_time - first_time) if last_time > first_time else 0.0

    def eta_s(self) -> float:
        """Seconds until the last row at the present rate; 0 where there is none."""
        rate = self.samples_per_second()
        return (self.total - self.position) / rate if rate > 0 else 0.0


@dataclass(frozen=True)
class RunView:
    """A run and how far it is: rows answered, rows in all, rows per second, seconds left."""

    run: Run
    position: int
    total: int
    samples_per_second: float = 0.0
    eta_s: float = 0.0


def view(run: Run, progress: Progress | None = None) -> RunView:
    """What a watcher sees of a run now; one that has a finding is as far as that says."""
    if run.finding is not None and run.finding.counts is not None:
        total = run.finding.counts.total
        return RunView(run, total, total)
    if progress is None:
        return RunView(run, 0, 0)
    if run.state is not RunState.EVALUATING or run.finding is not None:
        return RunView(run, progress.position, progress.total)
    return RunView(run, progress.position, progress.total, progress.samples_per_second(), progress.eta_s())
