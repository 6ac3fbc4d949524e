"""How commands print: protobuf JSON for programs, aligned tables for people, progress for whoever watches."""

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.progress import Progress

_PLAIN_EVERY_S = 2.0
_PIPE_COLUMNS = 10_000


def open_output() -> None:
    """Lets a command print whatever names others chose, and run where standard output is closed."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
    elif isinstance(sys.stdout, TextIOWrapper):
        sys.stdout = _Output(sys.stdout)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - as above


def end_output() -> None:
    """Lets go of what standard output did not take: Python would tell of it at its end, in words for programmers."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _Output(TextIOWrapper):
    """Standard output, whose errors have its name."""

    def __init__(self, opened: TextIOWrapper) -> None:
        super().__init__(
            opened.buffer,
            encoding=opened.encoding,
            errors="replace",  # into a terminal that knows fewer characters than UTF-8 has
            line_buffering=opened.line_buffering,
            write_through=opened.write_through,
        )

    def write(self, text: str, /) -> int:
        """Raises OSError, as when the disk is full."""
        try:
            return super().write(text)
        except OSError as error:
            raise _named(error) from None

    def flush(self) -> None:
        """Raises OSError, as when the disk is full."""
        try:
            super().flush()
        except OSError as error:
            raise _named(error) from None


def _named(error: OSError) -> OSError:
    return OSError(error.errno, error.strerror, "standard output")


def as_json(message: "Message") -> dict[str, Any]:
    """A message in protobuf's JSON form with the contract's snake_case names."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)


def print_json(document: Any) -> None:
    """Prints one JSON document."""
    plain = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    print(json.dumps(document, indent=2, ensure_ascii=plain))


def print_message(message: "Message", *, as_document: bool) -> None:
    """One message: as JSON, or a line for each field that is set."""
    document = as_json(message)
    if as_document:
        print_json(document)
        return
    for name, value in document.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        print(f"{name:<24}{text}")


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows under headings, in columns as wide as they need."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        # As Text: others choose names, and "[/x]" or ":x:" in one of them is no markup.
        table.add_row(*(Text(str(cell)) for cell in row))
    # Into a pipe nothing is cut off: programs and people with grep read whole names.
    console = Console() if sys.stdout.isatty() else Console(width=_PIPE_COLUMNS)
    console.print(table)


def accuracy(correct: int, total: int) -> str:
    """A count of right rows with its share and the 95 % Wilson interval."""
    from tiltyard.scoring import wilson_interval

    low, high = wilson_interval(correct, total)
    return f"{correct}/{total} = {correct / total:.4f} ({low:.4f} to {high:.4f})"


def enum_name(message: "Message", field: str) -> str:
    """A field's TASK_STATE_OPEN as OPEN; the number of a value that only a newer server knows."""
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    assert kind is not None
    values = kind.values_by_number
    number = getattr(message, field)
    # Every enum of the contract has its prefix before UNSPECIFIED, which is 0.
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    return values[number].name.removeprefix(prefix) if number in values else str(number)


def enum_word(message: "Message", field: str) -> str:
    """A field's TASK_STATE_OPEN as open."""
    return enum_name(message, field).lower().replace("_", " ")


class ProgressLine:
    """One long job's progress on standard error: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, description: str, *, unit: str = "") -> None:
        self._description = description
        self._unit = unit
        self._bar: Progress | None = None
        self._last_time = 0.0
        self._last_line = ""
        if sys.stderr.isatty():
            from rich import console, progress

            self._bar = progress.Progress(console=console.Console(stderr=True), transient=True)
            self._task = self._bar.add_task(description, total=None)

    def __enter__(self) -> "ProgressLine":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, total: int, text: str = "") -> None:
        """Where the job stands: `done` of `total`, and a few words."""
        if self._bar:
            from rich.markup import escape

            said = escape(f"{self._description} {text}")
            self._bar.update(self._task, completed=done, total=total or None, description=said)
            return
        now = time.monotonic()
        if now - self._last_time >= _PLAIN_EVERY_S or (total and done >= total):
            counted = f"{done}/{total}{self._unit and ' '}{self._unit} " if total else ""
            line = f"{self._description}: {counted}{text}".rstrip()
            if line != self._last_line:
                self._last_time, self._last_line = now, line
                print(line, file=sys.stderr, flush=True)
