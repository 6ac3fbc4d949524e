"""Where a training stands: one point, and the thinned history of all points so far."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from services.trainer.jsonfields import from_fields

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
    def from_json(cls, value: object) -> "Progress":
        """The point that `to_json` wrote. Raises TypeError and ValueError for anything else."""
        return from_fields(cls, value)


class History:
    """At most `limit` points, spaced evenly by step over the whole training; the newest is always among them.

    `points` are those that another history kept: a restart thins the past no more than it was.
    """

    def __init__(self, points: Iterable[Progress] = (), *, limit: int = HISTORY_POINTS) -> None:
        self._limit = limit
        self._kept: list[Progress] = list(points)
        self._newest: Progress | None = self._kept[-1] if self._kept else None
        # Fewest steps from one kept point to the next.
        self._gap = self._span() / limit

    def add(self, point: Progress) -> None:
        """Takes a point. One at an earlier step than the newest means that the training went back to a checkpoint."""
        if self._newest is not None and point.step < self._newest.step:
            self._kept = [kept for kept in self._kept if kept.step < point.step]
        self._newest = point
        self._keep(point)
        if len(self._kept) >= self._limit:
            self._gap = 2 * self._span() / self._limit
            thinned, self._kept = self._kept, []
            for each in thinned:
                self._keep(each)

    def _keep(self, point: Progress) -> None:
        if not self._kept or point.step - self._kept[-1].step >= self._gap:
            self._kept.append(point)

    def _span(self) -> int:
        return self._kept[-1].step - self._kept[0].step if self._kept else 0

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
