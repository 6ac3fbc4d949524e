"""Where a training stands: one point, and the thinned history of all points so far."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

HISTORY_POINTS = 500


@dataclass(frozen=True)
class Progress:
    """One point of a training.

    `step` counts batches done, `epoch` from 1. `loss` is the mean of the batches since the point before. Held-out
    numbers are those of the last evaluation, `holdout_total` 0 before the first one; a regression has no correct rows.
    `time_s` is in Unix seconds.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    learning_rate: float
    samples_per_second: float = 0.0
    device_memory_bytes: int = 0
    eta_s: float = 0.0
    holdout_correct: int = 0
    holdout_total: int = 0
    holdout_loss: float = 0.0
    time_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Progress":
        """The point that `to_json` wrote."""
        return cls(**value)


class History:
    """At most `limit` points, evenly spaced in what was reported; the newest is always among them."""

    def __init__(self, points: Iterable[Progress] = (), *, limit: int = HISTORY_POINTS) -> None:
        self._limit = limit
        self._kept: list[Progress] = []
        self._newest: Progress | None = None
        self._stride = 1
        self._seen = 0
        for point in points:
            self.add(point)

    def add(self, point: Progress) -> None:
        """Takes a point. One at an earlier step than the newest means that the training went back to a checkpoint."""
        if self._newest is not None and point.step < self._newest.step:
            self._kept = [kept for kept in self._kept if kept.step < point.step]
        if self._seen % self._stride == 0:
            self._kept.append(point)
            if len(self._kept) >= self._limit:
                self._kept = self._kept[::2]
                self._stride *= 2
        self._seen += 1
        self._newest = point

    @property
    def points(self) -> Sequence[Progress]:
        """The points kept, by step."""
        if self._newest is None or self._kept[-1:] == [self._newest]:
            return tuple(self._kept)
        return (*self._kept, self._newest)

    @property
    def newest(self) -> Progress | None:
        """The last point taken."""
        return self._newest
