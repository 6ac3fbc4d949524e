"""A clock for what cannot be undone: what it jumped to counts once it has held for a day."""

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from services.trainer.runfolder import write_json

# Who looks at it once an hour has seen longer than that between two looks where the clock was put forward, or the node
# was off.
_STEP = timedelta(days=1)
_HOLDS = timedelta(days=1)


class SteadyClock:
    """Tells the time of a clock that may be put forward by mistake, and right again.

    It goes on across restarts by what it keeps in a file; where that cannot be read, it has yet to hold for a day.
    """

    def __init__(self, path: Path, clock: Callable[[], datetime]) -> None:
        self._path = path
        self._clock = clock
        self._believed: datetime | None = None
        self._doubted_since: datetime | None = None
        self._seen: datetime | None = None
        # What cannot be read or is of another form counts as nothing.
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text())
            times = [_read(kept[name]) for name in ("believed", "doubted_since", "seen")]
            self._believed, self._doubted_since, self._seen = times

    def now(self) -> datetime | None:
        """The time, or that from before a jump that has yet to hold; None where there is no such. Blocks."""
        now, believed, since, seen = self._clock(), self._believed, self._doubted_since, self._seen
        # A clock that jumps once more has not held.
        if since is None or since > now or seen is None or now - seen > _STEP:
            since = now
        self._seen = now
        goes_on = believed is not None and now - believed <= _STEP
        if goes_on or now - since >= _HOLDS:
            self._believed, self._doubted_since = now, None
        else:
            self._doubted_since = since
        with suppress(OSError):  # what is to be removed may be what fills the disk
            self._keep()
        return self._believed

    def _keep(self) -> None:
        times = {"believed": self._believed, "doubted_since": self._doubted_since, "seen": self._seen}
        write_json(self._path, {name: _written(time) for name, time in times.items()})


def _written(time: datetime | None) -> str:
    return time.isoformat() if time else ""


def _read(written: str) -> datetime | None:
    return datetime.fromisoformat(written) if written else None
