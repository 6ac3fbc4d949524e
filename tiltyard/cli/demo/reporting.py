"""What the demo shows while it runs: bars on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_PLAIN_SHARE = 0.25


class Reporter:
    """Prints lines, and shows jobs by name. With `to_stderr` nothing goes to standard output."""

    def __init__(self, *, to_stderr: bool) -> None:
        self._stream: TextIO = sys.stderr if to_stderr else sys.stdout
        self._started = time.monotonic()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._shown: dict[str, float] = {}
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bars = Progress(*columns, console=Console(file=self._stream), transient=True)

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """One line (or more), with the seconds since the start."""
        for line in text.splitlines():
            stamped = f"{self.seconds:6.1f} s  {line}"
            if self._bars:
                self._bars.console.print(stamped, markup=False, highlight=False, soft_wrap=True)
            else:
                print(stamped, file=self._stream, flush=True)

    def show(self, job: str, done: int, total: int, text: str) -> None:
        """A job stands at `done` of `total`; elsewhere than on a terminal it gets a line for each quarter."""
        if self._bars:
            if job not in self._tasks:
                self._tasks[job] = self._bars.add_task(job, total=total or None, text=text)
            self._bars.update(self._tasks[job], completed=done, total=total or None, text=text)
            return
        share = done / total if total else 0.0
        if share >= self._shown.get(job, 0.0) + _PLAIN_SHARE or (share == 1.0 and self._shown.get(job) != 1.0):
            self._shown[job] = share
            self.say(f"{job}: {done}/{total} {text}")

    def done(self, job: str) -> None:
        """The job's bar goes away."""
        if self._bars and job in self._tasks:
            self._bars.remove_task(self._tasks.pop(job))
