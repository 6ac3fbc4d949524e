"""Counters, gauges and histograms, declared where they are used; they cost one test until somebody collects them.

Names, units and attributes follow OpenTelemetry's semantic conventions where those have a word for it, and begin with
`tiltyard.` elsewhere. An attribute has few values: no names of tasks or participants.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

Value = str | int | float | bool
Key = tuple[tuple[str, Value], ...]

# Further combinations of attributes are counted together (OpenTelemetry's "cardinality limits").
MAX_SERIES = 1000
OVERFLOW: Key = (("otel.metric.overflow", True),)

# https://opentelemetry.io/docs/specs/semconv/rpc/rpc-metrics/: seconds.
CALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)

_COUNTED_AT_ONCE = 256

collecting = False
"""Whether instruments count; read it only."""


def collect(on: bool) -> None:
    """Instruments count from now on, or no longer."""
    global collecting
    collecting = on


class Instrument:
    """What is told in one metric: `unit` is UCUM's (`s`, `By`, `{call}`), `description` one sentence."""

    def __init__(self, name: str, *, unit: str, description: str) -> None:
        self.name = name
        self.unit = unit
        self.description = description
        self._lock = threading.Lock()
        if name in _declared:
            raise ValueError(f"the metric {name} is declared twice")
        _declared[name] = self


_declared: dict[str, Instrument] = {}


def declared() -> Sequence[Instrument]:
    """Every instrument of the modules that have been imported."""
    return tuple(_declared.values())


class Counter(Instrument):
    """A sum that only grows.

    What is `told_at_zero` is told before anything has been counted, too: who looks for an increase between two reports
    sees none where a sum first appears as what it has grown to.
    """

    def __init__(
        self, name: str, *, unit: str, description: str, told_at_zero: Sequence[Mapping[str, Value]] = ()
    ) -> None:
        super().__init__(name, unit=unit, description=description)
        self._sums: dict[Key, float] = {tuple(attributes.items()): 0 for attributes in told_at_zero}

    def add(self, amount: float = 1, **attributes: Value) -> None:
        """Adds to the sum of these attributes."""
        if not collecting:
            return
        key = tuple(attributes.items())
        with self._lock:
            key = _bounded(key, self._sums)
            self._sums[key] = self._sums.get(key, 0) + amount

    def sums(self) -> Mapping[Key, float]:
        """The sums as they are."""
        with self._lock:
            return dict(self._sums)


class Gauge(Instrument):
    """A value that goes up and down: set, or asked for when it is collected."""

    def __init__(self, name: str, *, unit: str, description: str) -> None:
        super().__init__(name, unit=unit, description=description)
        self._values: dict[Key, float] = {}
        self._sources: list[Callable[[], Mapping[Key, float]]] = []

    def set(self, value: float, **attributes: Value) -> None:
        """The value of these attributes is now this."""
        if not collecting:
            return
        key = tuple(attributes.items())
        with self._lock:
            self._values[_bounded(key, self._values)] = value

    def follow(self, source: Callable[[], Mapping[Key, float]]) -> None:
        """Asks `source` whenever the gauge is collected: in a thread of its own, so it must be quick and safe there.

        Where nobody collects by now, it is not kept.
        """
        if not collecting:
            return
        with self._lock:
            self._sources.append(source)

    def values(self) -> Mapping[Key, float]:
        """The values as they are; what several sources say of the same attributes is added up."""
        with self._lock:
            values, sources = dict(self._values), list(self._sources)
        for source in sources:
            for key, value in source().items():
                values[key] = values.get(key, 0) + value
        return values


class Buckets:
    """One distribution of a histogram. `counts` has one more entry than `bounds`: what lies above the last."""

    __slots__ = ("_bounds", "_lock", "_recorded", "count", "counts", "highest", "lowest", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._lock = threading.Lock()
        # Values are counted many at a time: one by one it takes ten times as long.
        self._recorded: list[float] = []
        self.counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.total = 0.0
        self.lowest = float("inf")
        self.highest = float("-inf")

    def record(self, value: float) -> None:
        """Takes one value, which the next copy counts."""
        recorded = self._recorded
        recorded.append(value)
        if len(recorded) >= _COUNTED_AT_ONCE:
            with self._lock:
                self._count()

    def _count(self) -> None:
        """Counts what was recorded, each value in the bucket whose upper bound it does not pass."""
        # Others may append meanwhile, at the end.
        values = sorted(self._recorded)
        del self._recorded[: len(values)]
        if not values:
            return
        below = 0
        for bucket, bound in enumerate(self._bounds):
            up_to = bisect_right(values, bound, below)
            self.counts[bucket] += up_to - below
            below = up_to
        self.counts[-1] += len(values) - below
        self.count += len(values)
        self.total += sum(values)
        self.lowest = min(self.lowest, values[0])
        self.highest = max(self.highest, values[-1])

    def copy(self) -> "Buckets":
        """As it is now."""
        taken = Buckets(self._bounds)
        with self._lock:
            self._count()
            taken.counts, taken.count, taken.total = list(self.counts), self.count, self.total
            taken.lowest, taken.highest = self.lowest, self.highest
        return taken


class Histogram(Instrument):
    """A distribution over `bounds`, the buckets' upper ends in ascending order."""

    def __init__(self, name: str, *, unit: str, description: str, bounds: Sequence[float]) -> None:
        super().__init__(name, unit=unit, description=description)
        self.bounds = tuple(bounds)
        self._buckets: dict[Key, Buckets] = {}

    def record(self, value: float, **attributes: Value) -> None:
        """Counts one value."""
        if collecting:
            self.under(tuple(attributes.items())).record(value)

    def under(self, key: Key) -> Buckets:
        """The distribution of these attributes, for those who keep it, since every microsecond counts there."""
        with self._lock:
            found = self._buckets.get(key)
            if found is None:
                found = self._buckets.setdefault(_bounded(key, self._buckets), Buckets(self.bounds))
            return found

    def distributions(self) -> Mapping[Key, Buckets]:
        """The distributions as they are."""
        with self._lock:
            kept = dict(self._buckets)
        copies = {key: buckets.copy() for key, buckets in kept.items()}
        return {key: copy for key, copy in copies.items() if copy.count}


def _bounded(key: Key, series: Mapping[Key, object]) -> Key:
    return key if key in series or len(series) < MAX_SERIES else OVERFLOW
