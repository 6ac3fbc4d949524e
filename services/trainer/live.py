"""The trainings that have not ended, as they are this moment, and those who watch them."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from services.trainer.progress import History, Progress
from services.trainer.training import Training


@dataclass
class _Entry:
    training: Training
    history: History


class LiveTrainings:
    """Progress is published here many times a second and written to the store now and then.

    A watcher takes the newest state when it is ready for it: nobody waits for a slow one.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        # Held by those who wait alone: of a training that has ended no change is to come.
        self._changes: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

    def publish(self, training: Training, history: Iterable[Progress] = ()) -> None:
        """A training's new state; `history` counts when it was not here before. An ended one leaves."""
        entry = self._entries.get(training.id)
        if entry is None:
            entry = self._entries[training.id] = _Entry(training, History(history))
        newest = entry.history.newest
        entry.training = training if training.ended or newest is None else replace(training, progress=newest)
        if training.ended:
            del self._entries[training.id]
        self._wake(training.id)

    def report(self, training: str, point: Progress) -> None:
        """A new point of a training that is here."""
        entry = self._entries[training]
        entry.history.add(point)
        entry.training = replace(entry.training, progress=point)
        self._wake(training)

    def amend(self, training: str, change: Callable[[Training], Training]) -> None:
        """Replaces a training by what `change` makes of it; one that has ended and left stays as it is."""
        entry = self._entries.get(training)
        if entry is None:
            return
        entry.training = change(entry.training)
        self._wake(training)

    def get(self, training: str) -> Training | None:
        """The training as it is now, None when it is not here."""
        entry = self._entries.get(training)
        return entry.training if entry else None

    def history(self, training: str) -> Sequence[Progress] | None:
        """The points of a training, None when it is not here."""
        entry = self._entries.get(training)
        return entry.history.points if entry else None

    def all(self) -> Sequence[Training]:
        """Every training that is here, oldest first."""
        # Also asked from the thread of the metrics, so the values are taken at once.
        return [entry.training for entry in tuple(self._entries.values())]

    def next_change(self, training: str) -> asyncio.Event:
        """Set at the next change after now: take it before reading, wait for it after."""
        return self._changes.setdefault(training, asyncio.Event())

    def _wake(self, training: str) -> None:
        changed = self._changes.pop(training, None)
        if changed is not None:
            changed.set()
