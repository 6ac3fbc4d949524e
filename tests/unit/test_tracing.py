"""Trace contexts and spans: what is carried, what is recorded, and what costs nothing."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from tiltyard.telemetry import tracing
from tiltyard.telemetry.tracing import Span, TraceContext

CARRIED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Kept:
    """A recorder that keeps what it is given; roots are recorded where `sampling`."""

    follows_parents = True

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.sampling = True

    def samples(self, trace_id: str, name: str, parent: TraceContext | None) -> bool:
        return parent.sampled if parent else self.sampling

    def record(self, span: Span) -> None:
        self.spans.append(span)


@pytest.fixture
def kept() -> Iterator[Kept]:
    recorder = Kept()
    tracing.install(recorder)
    yield recorder
    tracing.install(None)


def test_without_a_recorder_nothing_is_carried() -> None:
    with tracing.span("work", parent=CARRIED) as span:
        span.set(rows=3)
        assert (tracing.current(), tracing.carried()) == (None, "")
    assert span.attributes == ()


def test_spans_nest_and_end_inside_out(kept: Kept) -> None:
    with tracing.span("outer") as outer, tracing.span("inner", task="t") as inner:
        assert tracing.current() is inner
    assert tracing.current() is None
    assert [span.name for span in kept.spans] == ["inner", "outer"]
    assert inner.context is not None
    assert outer.context is not None
    assert (inner.parent, inner.context.trace_id) == (outer.context, outer.context.trace_id)
    assert inner.context.span_id != outer.context.span_id
    assert inner.attributes == (("tiltyard.task", "t"),)
    assert 0 < outer.start_ns <= inner.start_ns <= inner.end_ns <= outer.end_ns


def test_what_was_carried_is_taken_up_elsewhere(kept: Kept) -> None:
    with tracing.span("call"):
        kept_beside_the_work = tracing.carried()
    with tracing.span("unrelated"), tracing.span("work", parent=kept_beside_the_work) as work:
        pass
    call = kept.spans[0]
    assert work.parent == call.context
    assert work.context is not None
    assert call.context is not None
    assert work.context.trace_id == call.context.trace_id


@pytest.mark.parametrize("parent", ["", "nonsense", CARRIED.replace("00-", "01-", 1), CARRIED[:-1], CARRIED.upper()])
def test_what_is_no_context_begins_a_trace(kept: Kept, parent: str) -> None:
    with tracing.span("surroundings"), tracing.span("work", parent=parent) as work:
        pass
    assert work.parent is None


@pytest.mark.parametrize(
    "parent", [f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01"]
)
def test_ids_of_zeros_are_no_context(parent: str) -> None:
    assert tracing.parse(parent) is None


def test_a_context_reads_as_it_was_written() -> None:
    context = tracing.parse(CARRIED)
    assert context == TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", True)
    unsampled = tracing.parse(CARRIED[:-2] + "00")
    assert unsampled is not None
    assert not unsampled.sampled


def test_a_trace_that_is_not_sampled_goes_on_unrecorded(kept: Kept) -> None:
    kept.sampling = False
    with tracing.span("outer"), tracing.span("inner") as inner:
        assert tracing.carried().endswith("-00")
    with tracing.untraced():
        kept.sampling = True
        with tracing.span("a question asked every second"):
            assert tracing.carried().endswith("-00")
    assert kept.spans == []
    assert inner.end_ns == 0


def test_a_traceparent_is_read_once_and_after_the_end_too(kept: Kept) -> None:
    with tracing.span("work", parent=CARRIED) as work:
        pass
    assert (work.unread, work.trace_id) == (CARRIED, "")
    assert work.parent == tracing.parse(CARRIED)
    place = work.context
    work.read()
    assert place is not None
    assert work.context == place
    assert kept.spans == [work]


@pytest.mark.parametrize(("flags", "recorded"), [("00", False), ("01", True), ("02", False), ("ff", True)])
def test_a_trace_is_recorded_where_the_last_bit_of_its_flags_says_so(kept: Kept, flags: str, recorded: bool) -> None:
    with tracing.span("work", parent=CARRIED[:-2] + flags):
        assert tracing.carried().endswith("-01" if recorded else "-00")
    assert bool(kept.spans) == recorded


def test_an_exception_is_the_spans_error_and_a_cancellation_is_not(kept: Kept) -> None:
    with pytest.raises(ValueError, match="no"), tracing.span("wrong"):
        raise ValueError("no")
    with pytest.raises(asyncio.CancelledError), tracing.span("stopped"):
        raise asyncio.CancelledError
    assert [(span.name, span.error) for span in kept.spans] == [("wrong", "ValueError"), ("stopped", "")]


def test_a_span_is_recorded_once(kept: Kept) -> None:
    with tracing.span("once") as span:
        span.end()
        span.end()
    assert kept.spans == [span]


def test_no_two_spans_have_one_id(kept: Kept) -> None:
    for _ in range(1000):
        with tracing.span("outer"), tracing.span("inner"):
            pass
    contexts = [span.context for span in kept.spans if span.context]
    assert len({context.span_id for context in contexts}) == 2000
    assert len({context.trace_id for context in contexts}) == 1000
    assert all(tracing.parse(span.traceparent) == span.context for span in kept.spans)


def test_a_forked_process_chooses_ids_of_its_own(kept: Kept) -> None:
    with tracing.span("before"):
        pass
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        with tracing.span("child") as span:
            os.write(tell, span.traceparent.encode())
        os._exit(0)
    os.waitpid(child, 0)
    with os.fdopen(told, "rb") as pipe:
        os.close(tell)
        theirs = tracing.parse(pipe.read().decode())
    with tracing.span("parent") as ours:
        pass
    assert theirs is not None
    assert ours.context is not None
    assert ours.context.span_id != theirs.span_id
    assert ours.context.trace_id != theirs.trace_id
