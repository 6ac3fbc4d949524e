"""Which trace the work at hand belongs to: W3C trace contexts, and spans that cost nothing until somebody records them.

A trace outlives a call where its context is kept beside the work: `carried()` is what to write down with it, and
`span(name, parent=...)` takes it up again, in another process and after a restart. Nothing here knows OpenTelemetry:
`tiltyard.telemetry` installs the recorder that does.
"""

import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from enum import IntEnum
from time import time_ns
from types import TracebackType
from typing import NamedTuple, Protocol, Self

Value = str | int | float | bool
Attributes = tuple[tuple[str, Value], ...]

# https://www.w3.org/TR/trace-context/#traceparent-header, version 00; ids of zeros are invalid.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_LENGTH = 55
_SAMPLED = "13579bdf"  # the last digit of its flags where the last bit is set


class Kind(IntEnum):
    """What a span is to its neighbours; numbers are OTLP's."""

    INTERNAL = 1
    SERVER = 2
    CLIENT = 3


class TraceContext(NamedTuple):
    """A place in a trace: ids in lowercase hex, 32 and 16 digits, and whether spans of it are recorded."""

    trace_id: str
    span_id: str
    sampled: bool


class Recorder(Protocol):
    """Where ended spans go. Both methods are called on hot paths and from any thread."""

    follows_parents: bool
    """Whether a span is recorded where its parent is; only those without one are asked for then."""

    def samples(self, trace_id: str, name: str, parent: TraceContext | None) -> bool:
        """Whether a span is to be recorded."""
        ...

    def record(self, span: "Span") -> None:
        """Takes a span that has ended."""
        ...


recorder: Recorder | None = None
"""Who records spans in this process, or None where nobody does; read it only."""

_current: ContextVar["Span | None"] = ContextVar("tiltyard_trace", default=None)

current: Callable[[], "Span | None"] = _current.get
"""The innermost span that surrounds the caller; None outside of any, and while nobody records."""

enter: Callable[["Span"], object] = _current.set
"""Makes this the current span of a task that is its own, whose context nobody needs to reset."""

# Of its own: what seeds the shared one must not make two processes choose the same ids.
_random = random.Random()  # noqa: S311
# To write one number in hex takes as long as all else about a span: ids are made many at a time.
_IDS_AT_ONCE = 256
_ids: list[str] = []

_reading = threading.Lock()


def _begin_anew() -> None:
    global _reading
    _random.seed()
    _ids.clear()
    _reading = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def install(new: Recorder | None) -> None:
    """Records spans from now on, or with None no longer."""
    global recorder
    recorder = new


def carried() -> str:
    """The traceparent to keep beside work that somebody else will go on with; empty where there is none."""
    surrounding = _current.get()
    return surrounding.traceparent if surrounding is not None else ""


def parse(traceparent: str) -> TraceContext | None:
    """The context in a traceparent; None for anything else, since a trace is never worth refusing a call."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    trace_id, span_id, flags = found.groups()
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & 1))


class Span:
    """A stretch of work, from `with` to its end. Times are nanoseconds since 1970; `error` is the error's type.

    Within it, `current()` is this span. An exception that leaves it is its error, a cancellation is not. It is part of
    the span `parent`, or of that with this traceparent. A traceparent stays `unread`, and the ids empty, until somebody
    asks for them: mostly that is the recorder, whose loop does in one microsecond what would take the call five.
    """

    __slots__ = (
        "_token",
        "attributes",
        "end_ns",
        "error",
        "kind",
        "name",
        "parent_id",
        "sampled",
        "span_id",
        "start_ns",
        "trace_id",
        "unread",
    )

    def __init__(self, name: str, kind: Kind, parent: "Span | str | None", attributes: Attributes) -> None:
        self.name = name
        self.kind = kind
        self.attributes = attributes
        self.error = ""
        self.end_ns = 0
        self._token: Token[Span | None] | None = None
        self.unread = ""
        self.trace_id = self.span_id = self.parent_id = ""
        self.sampled = False
        # Every call passes here, mostly through cold memory: each function or object more costs it a microsecond.
        self.start_ns = time_ns()
        if recorder is None:
            return
        if recorder.follows_parents and isinstance(parent, Span):
            if parent.unread:
                parent.read()
            self.sampled = parent.sampled
            self.trace_id = parent.trace_id
            # Nothing will point at a span that is not recorded: those below it go on with its parent's id.
            self.span_id = self.parent_id = parent.span_id
            if self.sampled:
                try:
                    self.span_id = _ids.pop()
                except IndexError:
                    self.span_id = _id()
        elif recorder.follows_parents and isinstance(parent, str) and len(parent) == _LENGTH:
            self.unread = parent
            self.sampled = parent[-1] in _SAMPLED
        else:
            context = parent.context if isinstance(parent, Span) else parse(parent or "")
            self.trace_id = context.trace_id if context else _id() + _id()
            self.parent_id = context.span_id if context else ""
            self.sampled = recorder.samples(self.trace_id, name, context)
            self.span_id = _id() if self.sampled or not context else self.parent_id

    def read(self) -> None:
        """Finds its place in the trace that it came with; where that is none, it begins one."""
        with _reading:
            if found := _TRACEPARENT.fullmatch(self.unread):
                self.trace_id, self.parent_id, _ = found.groups()
                self.span_id = _id() if self.sampled else self.parent_id
            elif self.unread:  # or another thread was first
                self.trace_id, self.span_id = _id() + _id(), _id()
            self.unread = ""

    @property
    def traceparent(self) -> str:
        """As the header has it; empty where nobody recorded at its beginning."""
        if self.unread:
            self.read()
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}" if self.trace_id else ""

    @property
    def context(self) -> TraceContext | None:
        """Its place in its trace; None where nobody recorded at its beginning."""
        if self.unread:
            self.read()
        return TraceContext(self.trace_id, self.span_id, self.sampled) if self.trace_id else None

    @property
    def parent(self) -> TraceContext | None:
        """Its parent's place in the trace; None where it began one."""
        if self.unread:
            self.read()
        return TraceContext(self.trace_id, self.parent_id, self.sampled) if self.parent_id else None

    def set(self, **attributes: Value) -> None:
        """Adds attributes that are known only now, each as `tiltyard.{name}`."""
        if self.sampled:
            self.attributes += _named(attributes)

    def end(self) -> None:
        """Hands the span over, at its first call."""
        if self.end_ns or not self.sampled:
            return
        self.end_ns = time_ns()
        if recorder is not None:
            recorder.record(self)

    def __enter__(self) -> Self:
        if self.trace_id or self.unread:
            self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)
            self._token = None
        # A cancellation is no Exception.
        if isinstance(error, Exception) and not self.error:
            self.error = type(error).__name__
        self.end()


def _id() -> str:
    """A fresh span id, or half of a trace id."""
    try:
        return _ids.pop()
    except IndexError:
        digits = _random.randbytes(8 * _IDS_AT_ONCE).hex()
        made = (digits[at : at + 16] for at in range(0, len(digits), 16))
        _ids.extend(each for each in made if int(each, 16))
        return _id()


def span(name: str, *, parent: str | None = None, kind: Kind = Kind.INTERNAL, **attributes: Value) -> Span:
    """A span within the current one, or within the `parent` that was carried here; an empty `parent` begins a trace.

    Attributes are told as `tiltyard.{name}`.
    """
    return Span(name, kind, _current.get() if parent is None else parent, _named(attributes))


def _named(attributes: Mapping[str, Value]) -> Attributes:
    return tuple((f"tiltyard.{name}", value) for name, value in attributes.items())


@contextmanager
def untraced() -> Iterator[None]:
    """For what is done every second whether there is work or not: calls made within are not recorded, by nobody."""
    if recorder is None:
        yield
        return
    token = _current.set(Span("untraced", Kind.INTERNAL, f"00-{_id()}{_id()}-{_id()}-00", ()))
    try:
        yield
    finally:
        _current.reset(token)
