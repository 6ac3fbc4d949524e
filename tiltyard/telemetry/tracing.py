"""Which trace the work at hand belongs to: W3C trace contexts, and spans that cost nothing until somebody records them.

A trace outlives a call where its context is kept beside the work: `carried()` is what to write down with it, and
`span(name, parent=...)` takes it up again, in another process and after a restart. Nothing here knows OpenTelemetry:
`tiltyard.telemetry` installs the recorder that does.
"""

import functools
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from enum import IntEnum
from types import TracebackType
from typing import NamedTuple, Protocol, Self

Value = str | int | float | bool
Attributes = tuple[tuple[str, Value], ...]

# https://www.w3.org/TR/trace-context/#traceparent-header, version 00; ids of zeros are invalid.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


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

    @property
    def traceparent(self) -> str:
        """As the header has it."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


# What TraceContext(...) does, without a function of Python's between.
_context: Callable[[tuple[str, str, bool]], TraceContext] = functools.partial(tuple.__new__, TraceContext)


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

_current: ContextVar[TraceContext | None] = ContextVar("tiltyard_trace", default=None)

current: Callable[[], TraceContext | None] = _current.get
"""The innermost span that surrounds the caller; None outside of any, and while nobody records."""

enter: Callable[[TraceContext], object] = _current.set
"""Makes this the current span of a task that is its own, whose context nobody needs to reset."""

# Of its own: what seeds the shared one must not make two processes choose the same ids.
_random = random.Random()  # noqa: S311
# To write one number in hex takes as long as all else about a span: ids are made many at a time.
_IDS_AT_ONCE = 256
_ids: list[str] = []


def _forget_ids() -> None:
    _random.seed()
    _ids.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_ids)


def install(new: Recorder | None) -> None:
    """Records spans from now on, or with None no longer."""
    global recorder
    recorder = new


def carried() -> str:
    """The traceparent to keep beside work that somebody else will go on with; empty where there is none."""
    context = _current.get()
    return context.traceparent if context is not None else ""


def parse(traceparent: str) -> TraceContext | None:
    """The context in a traceparent; None for anything else, since a trace is never worth refusing a call."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    trace_id, span_id, flags = found.groups()
    return _context((trace_id, span_id, flags == "01" or bool(int(flags, 16) & 1)))


class Span:
    """A stretch of work, from `with` to its end. Times are nanoseconds since 1970; `error` is the error's type.

    Within it, `current()` is its context. An exception that leaves it is its error, a cancellation is not.
    """

    __slots__ = ("_token", "attributes", "context", "end_ns", "error", "kind", "name", "parent", "start_ns")

    def __init__(self, name: str, kind: Kind, parent: TraceContext | None, attributes: Attributes) -> None:
        self.name = name
        self.kind = kind
        self.parent = parent
        self.attributes = attributes
        self.error = ""
        self.end_ns = 0
        self._token: Token[TraceContext | None] | None = None
        # Every call passes here, mostly through cold memory: each function or object more costs it a microsecond.
        if recorder is None:
            self.context = None
        elif parent is None:
            trace_id = _id() + _id()
            self.context = _context((trace_id, _id(), recorder.samples(trace_id, name, None)))
        elif parent.sampled if recorder.follows_parents else recorder.samples(parent.trace_id, name, parent):
            try:
                span_id = _ids.pop()
            except IndexError:
                span_id = _id()
            self.context = _context((parent.trace_id, span_id, True))
        else:
            # Nothing will point at this span: those below it go on with its parent's id.
            self.context = _context((parent.trace_id, parent.span_id, False))
        self.start_ns = time.time_ns()

    def set(self, **attributes: Value) -> None:
        """Adds attributes that are known only now, each as `tiltyard.{name}`."""
        if self.context is not None and self.context.sampled:
            self.attributes += _named(attributes)

    def end(self) -> None:
        """Hands the span over, at its first call."""
        if self.end_ns or self.context is None or not self.context.sampled:
            return
        self.end_ns = time.time_ns()
        if recorder is not None:
            recorder.record(self)

    def __enter__(self) -> Self:
        if self.context is not None:
            self._token = _current.set(self.context)
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
    context = _current.get() if parent is None else parse(parent)
    return Span(name, kind, context, _named(attributes))


def _named(attributes: Mapping[str, Value]) -> Attributes:
    return tuple((f"tiltyard.{name}", value) for name, value in attributes.items())


@contextmanager
def untraced() -> Iterator[None]:
    """For what is done every second whether there is work or not: calls made within are not recorded, by nobody."""
    if recorder is None:
        yield
        return
    token = _current.set(TraceContext(_id() + _id(), _id(), False))
    try:
        yield
    finally:
        _current.reset(token)
