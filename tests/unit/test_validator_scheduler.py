"""Duties against a registry that refuses, goes away, takes back and comes late; time is the test's."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from safetensors.numpy import save

from services.runtime.errors import AlreadyExists, DiskFull, FailedPrecondition, InvalidArgument, Unavailable
from services.validator import duties, patience
from services.validator.assignments import Assignment, AssignmentState, DigestMismatch, Lease, Order
from services.validator.cache import Cache
from services.validator.duties import Means
from services.validator.evaluation import CannotEvaluate
from services.validator.runs import ENDED_RUNS, Finding, Run, RunState, SealedReport
from services.validator.scheduler import Scheduler
from services.validator.slots import FairSlots
from tiltyard.counting import Counts
from tiltyard.modelspec import Linear, ModelSpec, tensor_shapes

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SPEC = ModelSpec((4,), 2, Linear())
ORDER = Order("d" * 64, 10, "e" * 64, 10, SPEC, max_cpu_s=1, max_memory_bytes=1)
FOUND = Finding(counts=Counts(1, 2, 0, 3), prediction_blocks=(b"b",))
MODEL = save({name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(SPEC).items()})


class MemoryStore:
    def __init__(self, *runs):
        self.runs = {run.assignment: run for run in runs}
        self.changed = asyncio.Condition()
        self.full_for = lambda run: False
        self.refused = []
        self.away = []

    async def add(self, run):
        await self.save(replace(run, number=len(self.runs) + 1))
        return self.runs[run.assignment]

    async def save(self, run):
        if self.full_for(run):
            self.refused.append(run)
            raise DiskFull("the disk is full", resource="database")
        async with self.changed:
            self.runs[run.assignment] = run
            self.changed.notify_all()

    async def get(self, assignment):
        if self.away:
            raise self.away.pop()
        return self.runs.get(assignment)

    async def unfinished(self):
        return [run for run in self.runs.values() if run.state not in ENDED_RUNS]

    async def page(self, *, below, size):
        raise NotImplementedError

    async def count_ended(self):
        raise NotImplementedError

    async def until(self, name, *states):
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: name in self.runs and self.runs[name].state in states)
        return self.runs[name]


class Registry:
    """Answers as told: `refusals[method]` are raised one after another before it does its duty."""

    def __init__(self):
        self.known: dict[str, Assignment] = {}
        self.refusals: dict[str, list[Exception]] = {}
        self.calls: list[tuple] = []
        self.updates: asyncio.Queue = asyncio.Queue()
        self.cursors: list[str] = []
        self.handed_in: list[bytes] = []
        self.lease_s = 60.0
        self.open_at_once = True
        self.order: Order | None = ORDER
        self._called_now = asyncio.Event()

    async def until_called(self, method, times=1):
        async with asyncio.timeout(10):
            while sum(call[0] == method for call in self.calls) < times:
                await self._called_now.wait()

    def offer(self, name, task="t", state=AssignmentState.OFFERED, **fields):
        self.say(Assignment(name, task, state, **fields))

    def say(self, assignment):
        self.known[assignment.name] = assignment
        self.updates.put_nowait(assignment)

    def change(self, name, **fields):
        self.say(replace(self.known[name], **fields))

    def _called(self, method, *arguments):
        self.calls.append((method, *arguments))
        self._called_now.set()
        self._called_now = asyncio.Event()
        if self.refusals.get(method):
            raise self.refusals[method].pop(0)

    async def watch(self, cursor):
        self.cursors.append(cursor)
        self._called("watch")
        while True:
            update = await self.updates.get()
            if isinstance(update, Exception):
                raise update
            yield update, f"{cursor}+"

    async def assignments(self, submission=""):
        self._called("assignments", submission)
        return [each for each in self.known.values() if each.name.startswith(submission)]

    async def accept(self, assignment, lease_holder):
        self._called("accept", assignment)
        return Lease("token", self.lease_s, self.order, "" if self.order else "not understood")

    async def renew(self, assignment, token):
        self._called("renew", assignment)
        return self.lease_s

    async def decline(self, assignment, token, reason):
        self._called("decline", assignment, reason)

    async def fetch(self, digest, size_bytes, destination):
        self._called("fetch", digest)
        destination.write_bytes(MODEL)

    async def seal(self, statement, token):
        self._called("seal", statement)
        name = statement.decode().removeprefix("seal of ")
        self.change(name, state=AssignmentState.SEALED, opening=self.open_at_once)

    async def open(self, report, salt, hashes):
        self._called("open", report, salt)
        self.handed_in.append(hashes)


class PlainNotary:
    def report(self, assignment, order, finding):
        return f"report on {assignment}".encode()

    def seal(self, assignment, report, salt):
        return f"seal of {assignment}".encode()


class Attempts:
    """Each attempt takes until it is let go, where `hold` is set."""

    def __init__(self):
        self.hold: asyncio.Event | None = None
        self.error: Exception | None = None
        self.began = asyncio.Event()

    async def attempt(self, job, progress):
        self.began.set()
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        return FOUND


class Nodes:
    """The nodes' own servers; without a finding nobody may ask them."""

    def __init__(self):
        self.finding = None
        self.asked = []

    def may_ask(self, order):
        return self.finding is not None

    async def evaluate(self, order, dataset, progress):
        self.asked.append(order)
        if isinstance(self.finding, Exception):
            raise self.finding
        return self.finding


class Arena:
    def __init__(self, folder, *runs, stop_after=0, concurrency=1, leases=8):
        self.registry, self.store, self.attempts, self.nodes = Registry(), MemoryStore(*runs), Attempts(), Nodes()
        self.drained = asyncio.Event()
        self.now = NOW
        self.means = Means(
            registry=self.registry,
            notary=PlainNotary(),
            store=self.store,
            cache=Cache(folder, max_bytes=1 << 20),
            attempts=self.attempts,
            nodes=self.nodes,
            leases=FairSlots(leases),
            evaluations=FairSlots(concurrency),
            lease_holder=bytes(32),
            clock=lambda: self.now,
        )
        self.scheduler = Scheduler(self.means, stop_after=stop_after, on_drained=self.drained.set)

    async def __aenter__(self):
        self._work = asyncio.create_task(self.scheduler.run())
        return self

    async def __aexit__(self, *_):
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)

    def calls(self, method):
        return [call for call in self.registry.calls if call[0] == method]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.002)


def run(state, **fields):
    return Run("a", "t", state, NOW, number=1, **fields)


SEALED_REPORT = SealedReport(report=b"report on a", salt=b"s" * 32, seal=b"seal of a")


async def test_an_offer_is_accepted_evaluated_sealed_and_opened(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.registry.offer("a")
        ended = await arena.store.until("a", *ENDED_RUNS)
    assert ended.state is RunState.OPENED
    assert ended.finding == FOUND
    assert ended.sealed.report == b"report on a"
    assert [call[0] for call in arena.registry.calls if call[0] not in ("watch", "assignments", "fetch")] == [
        "accept",
        "seal",
        "open",
    ]
    assert arena.calls("open") == [("open", b"report on a", ended.sealed.salt)]
    # Up to two megabytes a run, which nobody needs any more.
    assert (arena.registry.handed_in, ended.sealed.hashes) == ([b"b"], b"")


async def test_a_registry_that_is_away_is_waited_for_at_every_step(tmp_path):
    arena = Arena(tmp_path)
    away = Unavailable("UNAVAILABLE", "connection refused")
    for method in ("assignments", "watch", "accept", "fetch", "seal", "open"):
        arena.registry.refusals[method] = [away, away, away]
    async with arena:
        arena.registry.offer("a")
        assert (await arena.store.until("a", *ENDED_RUNS)).state is RunState.OPENED
    assert len(arena.calls("accept")) == len(arena.calls("seal")) == len(arena.calls("open")) == 4


async def test_the_watch_resumes_at_its_cursor_and_begins_anew_when_that_is_refused(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.registry.offer("a")
        await arena.store.until("a", *ENDED_RUNS)
        arena.registry.updates.put_nowait(Unavailable("UNAVAILABLE", "gone"))
        arena.registry.offer("b")
        await arena.store.until("b", *ENDED_RUNS)
        arena.registry.refusals["watch"] = [InvalidArgument.field("cursor", "is of another log")]
        arena.registry.updates.put_nowait(Unavailable("UNAVAILABLE", "gone"))
        arena.registry.offer("c")
        await arena.store.until("c", *ENDED_RUNS)
    assert arena.registry.cursors == ["", "+", "++", ""]


async def test_news_are_not_passed_over_while_the_database_is_away(tmp_path):
    async with Arena(tmp_path) as arena:
        await arena.registry.until_called("watch")
        arena.store.away = [Unavailable("DATABASE_UNAVAILABLE", "the database cannot be used at present")] * 3
        arena.registry.offer("a")
        assert (await arena.store.until("a", *ENDED_RUNS)).state is RunState.OPENED


async def test_a_lease_that_another_process_holds_is_left_alone(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.registry.refusals["accept"] = [AlreadyExists("LEASE_HELD", "held by another")]
        arena.registry.offer("a")
        arena.registry.offer("b")
        await arena.store.until("b", *ENDED_RUNS)
    assert set(arena.store.runs) == {"b"}


@pytest.mark.parametrize(
    ("state", "ended"), [(AssignmentState.RELEASED, RunState.RELEASED), (AssignmentState.EXPIRED, RunState.FAILED)]
)
async def test_an_assignment_that_ends_in_mid_evaluation_frees_the_place(tmp_path, state, ended):
    async with Arena(tmp_path) as arena:
        arena.attempts.hold = asyncio.Event()
        arena.registry.offer("a")
        arena.registry.offer("b")
        await arena.attempts.began.wait()
        arena.registry.change("a", state=state)
        assert (await arena.store.until("a", *ENDED_RUNS)).state is ended
        arena.attempts.hold.set()
        assert (await arena.store.until("b", *ENDED_RUNS)).state is RunState.OPENED
    assert len(arena.calls("seal")) == 1


async def test_the_lease_is_renewed_while_work_goes_on(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.registry.lease_s = 0.15
        arena.attempts.hold = asyncio.Event()
        arena.registry.offer("a")
        await arena.registry.until_called("renew", 3)
        arena.attempts.hold.set()
        assert (await arena.store.until("a", *ENDED_RUNS)).state is RunState.OPENED


async def test_what_has_not_had_its_turn_when_its_round_is_about_to_end_is_given_back(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.registry.lease_s = 0.3
        arena.attempts.hold = asyncio.Event()
        arena.registry.offer("a")
        await arena.attempts.began.wait()
        arena.registry.offer("b")
        await arena.registry.until_called("accept", 2)
        # No lease is prolonged beyond the end of its round.
        arena.registry.lease_s = 0.1
        waited = await arena.store.until("b", *ENDED_RUNS)
        assert (waited.state, waited.detail) == (RunState.FAILED, arena.calls("decline")[0][2])
        arena.attempts.hold.set()
        assert (await arena.store.until("a", *ENDED_RUNS)).state is RunState.OPENED
    assert [call[1] for call in arena.calls("decline")] == ["b"]


async def test_a_lost_lease_ends_the_run(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.registry.lease_s = 0.15
        arena.registry.refusals["renew"] = [FailedPrecondition("LEASE_LOST", "passed to a reserve")]
        arena.attempts.hold = asyncio.Event()
        arena.registry.offer("a")
        ended = await arena.store.until("a", *ENDED_RUNS)
    assert (ended.state, ended.detail) == (RunState.FAILED, "the lease was lost: passed to a reserve")
    assert arena.calls("seal") == []


@pytest.mark.parametrize(
    ("where", "error", "text"),
    [
        ("fetch", DigestMismatch("the bytes received are not those of artifacts/d"), "not those"),
        ("fetch", OSError(28, "No space left on device"), "No space left"),
        ("attempt", CannotEvaluate("no model server stays alive"), "stays alive"),
        ("attempt", CannotEvaluate("its server:\n\tgone\x00 away \x1b[2J"), "its server: gone away [2J"),
        ("order", None, "not understood"),
        ("metric", None, "metric is not counted"),
    ],
)
async def test_own_trouble_is_declined_with_its_reason_and_no_report(tmp_path, where, error, text):
    async with Arena(tmp_path) as arena:
        if where == "fetch":
            arena.registry.refusals["fetch"] = [error]
        elif where == "attempt":
            arena.attempts.error = error
        else:
            arena.registry.order = None if where == "order" else replace(ORDER, metric=None)
        arena.registry.offer("a")
        ended = await arena.store.until("a", *ENDED_RUNS)
        ((_, name, reason),) = arena.calls("decline")
        assert (ended.state, ended.finding, name) == (RunState.FAILED, None, "a")
        assert text in reason
        assert text in ended.detail
        arena.attempts.error, arena.registry.order = None, ORDER
        arena.registry.offer("b")
        assert (await arena.store.until("b", *ENDED_RUNS)).state is RunState.OPENED


@pytest.mark.parametrize("where", ["attempt", "cache"])
async def test_what_cannot_be_evaluated_here_is_asked_of_the_nodes_own_server_where_that_is_allowed(tmp_path, where):
    async with Arena(tmp_path) as arena:
        arena.nodes.finding = replace(FOUND, node_endpoint=True)
        if where == "attempt":
            arena.attempts.error = CannotEvaluate("no onnxruntime")
        else:
            arena.registry.order = replace(ORDER, model_bytes=1 << 20)
        arena.registry.offer("a")
        ended = await arena.store.until("a", *ENDED_RUNS)
        assert (ended.state, ended.finding.node_endpoint) == (RunState.OPENED, True)
        assert ended.finding.counts == FOUND.counts
        assert ("no onnxruntime" if where == "attempt" else "bytes are needed") in ended.finding.detail
        assert arena.nodes.asked == [arena.registry.order]
        # Its model was never fetched where it has no room.
        assert [digest for _, digest in arena.calls("fetch")].count(ORDER.model_digest) == (where == "attempt")


async def test_a_model_that_can_be_evaluated_here_is_never_asked_of_the_node(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.nodes.finding = replace(FOUND, node_endpoint=True)
        arena.registry.offer("a")
        ended = await arena.store.until("a", *ENDED_RUNS)
    assert (ended.state, ended.finding, arena.nodes.asked) == (RunState.OPENED, FOUND, [])


async def test_when_the_nodes_server_fails_too_both_reasons_are_given_back(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.attempts.error = CannotEvaluate("no onnxruntime")
        arena.nodes.finding = CannotEvaluate("the node's own endpoint: refused")
        arena.registry.offer("a")
        assert (await arena.store.until("a", *ENDED_RUNS)).state is RunState.FAILED
        ((_, _, reason),) = arena.calls("decline")
    assert reason == "no onnxruntime; the node's own endpoint: refused"


async def test_an_error_nobody_thought_of_ends_its_run_and_no_other(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.attempts.error = KeyError("bug")
        arena.registry.offer("a")
        ended = await arena.store.until("a", *ENDED_RUNS)
        assert (ended.state, ended.detail) == (RunState.FAILED, "internal error: KeyError")
        assert arena.calls("decline") == [("decline", "a", "internal error: KeyError")]
        arena.attempts.error = None
        arena.registry.offer("b")
        assert (await arena.store.until("b", *ENDED_RUNS)).state is RunState.OPENED


@pytest.fixture
def hurried(monkeypatch):
    """A full disk is tried again at once."""
    monkeypatch.setattr(DiskFull, "RETRY_AFTER_S", 0.001)


async def until_refused(arena, times):
    async with asyncio.timeout(10):
        while len(arena.store.refused) < times:  # noqa: ASYNC110 -- the store has no event for what it refuses
            await asyncio.sleep(0.001)


async def test_a_full_disk_gives_a_new_assignment_back_at_once(tmp_path, hurried):
    async with Arena(tmp_path, stop_after=1) as arena:
        arena.store.full_for = lambda run: run.state is RunState.FETCHING
        ended = arena.scheduler.news()
        arena.registry.offer("a")
        await asyncio.wait_for(ended.wait(), 10)
        arena.store.full_for = lambda run: False
        arena.registry.offer("b")
        assert (await arena.store.until("b", *ENDED_RUNS)).state is RunState.OPENED
    assert set(arena.store.runs) == {"b"}
    assert arena.calls("decline") == [("decline", "a", "DISK_FULL: the disk is full")]


async def test_a_report_waits_for_room_under_its_lease_and_is_sealed_only_then(tmp_path, hurried):
    async with Arena(tmp_path) as arena:
        arena.registry.lease_s = 0.15
        arena.store.full_for = lambda run: run.sealed is not None
        arena.registry.offer("a")
        await until_refused(arena, 3)
        await arena.registry.until_called("renew", 2)
        assert arena.calls("seal") == []
        arena.store.full_for = lambda run: False
        assert (await arena.store.until("a", *ENDED_RUNS)).state is RunState.OPENED
    assert len(arena.calls("fetch")) == 2


async def test_a_full_disk_keeps_no_report_from_being_opened(tmp_path, hurried):
    async with Arena(tmp_path) as arena:
        arena.store.full_for = lambda run: run.state in (RunState.SEALED, RunState.OPENED)
        arena.registry.offer("a")
        await arena.registry.until_called("open")
        await until_refused(arena, 3)
        arena.store.full_for = lambda run: False
        assert (await arena.store.until("a", *ENDED_RUNS)).state is RunState.OPENED


async def test_a_report_that_is_asked_for_too_early_waits(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.registry.refusals["open"] = [FailedPrecondition("NOT_OPENING", "not yet")]
        arena.registry.offer("a")
        await arena.store.until("a", RunState.SEALED)
        await arena.registry.until_called("open")
        arena.registry.change("a", opening=True)
        assert (await arena.store.until("a", *ENDED_RUNS)).state is RunState.OPENED


async def test_a_report_opened_too_late_is_a_failure(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.registry.refusals["open"] = [FailedPrecondition("OPENING_EXPIRED", "too late")]
        arena.registry.offer("a")
        ended = await arena.store.until("a", *ENDED_RUNS)
    assert ended.state is RunState.FAILED
    assert "too late" in ended.detail
    assert ended.finding == FOUND


@pytest.mark.parametrize(
    ("stored", "known", "expected", "calls"),
    [
        # Cut off at each step; what the registry says decides how it goes on.
        (run(RunState.FETCHING), AssignmentState.ACCEPTED, RunState.OPENED, ["accept", "seal", "open"]),
        (run(RunState.EVALUATING, sealed=SEALED_REPORT), AssignmentState.ACCEPTED, RunState.OPENED, None),
        (run(RunState.EVALUATING, sealed=SEALED_REPORT), AssignmentState.SEALED, RunState.OPENED, ["open"]),
        (run(RunState.SEALED, sealed=SEALED_REPORT), AssignmentState.SEALED, RunState.OPENED, ["open"]),
        (run(RunState.SEALED, sealed=SEALED_REPORT), AssignmentState.OPENED, RunState.OPENED, []),
        (run(RunState.SEALED, sealed=SEALED_REPORT), AssignmentState.RELEASED, RunState.RELEASED, []),
        (run(RunState.SEALED, sealed=SEALED_REPORT), AssignmentState.EXPIRED, RunState.FAILED, []),
        (run(RunState.FETCHING), AssignmentState.EXPIRED, RunState.FAILED, []),
        (run(RunState.FETCHING), AssignmentState.SEALED, RunState.FAILED, []),
        (run(RunState.FETCHING), None, RunState.FAILED, []),
    ],
)
async def test_a_start_takes_up_what_was_left(tmp_path, stored, known, expected, calls):
    arena = Arena(tmp_path, stored)
    if known is not None:
        arena.registry.known["a"] = Assignment("a", "t", known, opening=known is AssignmentState.SEALED)
    async with arena:
        ended = await arena.store.until("a", *ENDED_RUNS)
        assert ended.state is expected
    made = [call[0] for call in arena.registry.calls if call[0] in ("accept", "seal", "open")]
    if calls is None:
        # The stored report is sealed, not another one.
        assert made == ["accept", "seal", "open"]
        assert arena.calls("open") == [("open", SEALED_REPORT.report, SEALED_REPORT.salt)]
        assert arena.calls("fetch") == []
    else:
        assert made == calls


async def test_a_run_that_has_ended_is_not_begun_again(tmp_path):
    arena = Arena(tmp_path, run(RunState.FAILED))
    arena.registry.known["a"] = Assignment("a", "t", AssignmentState.ACCEPTED)
    async with arena:
        arena.registry.offer("b")
        await arena.store.until("b", *ENDED_RUNS)
    assert [call[1] for call in arena.calls("accept")] == ["b"]


async def test_a_drain_ends_what_runs_and_gives_back_what_waits(tmp_path):
    async with Arena(tmp_path, leases=1) as arena:
        arena.attempts.hold = asyncio.Event()
        for name in "abc":
            arena.registry.offer(name)
        await arena.attempts.began.wait()
        arena.scheduler.drain()
        arena.registry.offer("d")
        await arena.registry.until_called("decline", 3)
        arena.attempts.hold.set()
        await asyncio.wait_for(arena.drained.wait(), 10)
    assert {name: run.state for name, run in arena.store.runs.items()} == {"a": RunState.OPENED}
    assert {call[1] for call in arena.calls("decline")} == {"b", "c", "d"}


async def test_a_drain_gives_back_what_is_leased_and_has_not_begun(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.attempts.hold = asyncio.Event()
        arena.registry.offer("a")
        await asyncio.wait_for(arena.attempts.began.wait(), 10)
        arena.registry.offer("b")
        await arena.registry.until_called("accept", times=2)
        arena.scheduler.drain()
        arena.attempts.hold.set()
        await asyncio.wait_for(arena.drained.wait(), 10)
        assert (await arena.store.until("a", *ENDED_RUNS)).state is RunState.OPENED
        assert [name for _, name, _ in arena.calls("decline")] == ["b"]
        assert (await arena.store.until("b", *ENDED_RUNS)).detail == "the validator takes no further assignments"


async def test_a_drain_does_not_keep_what_is_leased_until_what_runs_has_ended(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.registry.lease_s = 0.15
        arena.attempts.hold = asyncio.Event()
        arena.registry.offer("a")
        await asyncio.wait_for(arena.attempts.began.wait(), 10)
        arena.registry.offer("b")
        await arena.registry.until_called("accept", times=2)
        arena.scheduler.drain()
        assert (await arena.store.until("b", *ENDED_RUNS)).detail == "the validator takes no further assignments"
        assert [name for _, name, _ in arena.calls("decline")] == ["b"]
        arena.attempts.hold.set()
        await asyncio.wait_for(arena.drained.wait(), 10)
    assert arena.store.runs["a"].state is RunState.OPENED


async def test_a_drain_gives_back_a_lease_of_which_no_run_was_stored(tmp_path):
    arena = Arena(tmp_path)
    arena.registry.known["a"] = Assignment("a", "t", AssignmentState.ACCEPTED)
    arena.scheduler.drain()
    async with arena, asyncio.timeout(10):
        await arena.drained.wait()
    assert [call[:2] for call in arena.registry.calls if call[1:2] == ("a",)] == [("accept", "a"), ("decline", "a")]
    assert arena.store.runs == {}


async def test_a_drain_gives_back_a_lease_that_waits_for_its_turn_with_its_token(tmp_path):
    arena = Arena(tmp_path, run(RunState.FETCHING), leases=1)
    for name in "ab":
        arena.registry.known[name] = Assignment(name, "t", AssignmentState.ACCEPTED)
    arena.attempts.hold = asyncio.Event()
    async with arena:
        await asyncio.wait_for(arena.attempts.began.wait(), 10)
        arena.scheduler.drain()
        await arena.registry.until_called("decline")
        arena.attempts.hold.set()
        await asyncio.wait_for(arena.drained.wait(), 10)
    assert [call[:2] for call in arena.registry.calls if call[1:2] == ("b",)] == [("accept", "b"), ("decline", "b")]


async def test_an_idle_drain_is_over_at_once(tmp_path):
    async with Arena(tmp_path) as arena:
        arena.scheduler.drain()
        await asyncio.wait_for(arena.drained.wait(), 10)


async def test_stop_after_begins_no_more_runs_than_that_and_gives_the_others_back_at_once(tmp_path):
    async with Arena(tmp_path, stop_after=2, concurrency=4) as arena:
        arena.attempts.hold = asyncio.Event()
        arena.registry.refusals["accept"] = [AlreadyExists("LEASE_HELD", "held by another")]
        ended = arena.scheduler.news()
        arena.registry.offer("a")
        await asyncio.wait_for(ended.wait(), 10)
        # The place of what was refused is another's.
        for name in "bcde":
            arena.registry.offer(name)
        await arena.registry.until_called("decline", 2)
        arena.attempts.hold.set()
        await asyncio.wait_for(arena.drained.wait(), 10)
    assert {call[1] for call in arena.calls("decline")} == {"d", "e"}
    assert {name: run.state for name, run in arena.store.runs.items()} == {"b": RunState.OPENED, "c": RunState.OPENED}


async def test_a_drain_does_not_wait_for_a_registry_that_never_asks(tmp_path, monkeypatch):
    monkeypatch.setattr(duties, "_OVERDUE_S", 0.01)
    async with Arena(tmp_path) as arena:
        arena.registry.open_at_once = False
        arena.registry.offer("a", deadline=NOW - timedelta(minutes=5))
        await arena.store.until("a", RunState.SEALED)
        arena.scheduler.drain()
        await asyncio.wait_for(arena.drained.wait(), 10)
    assert "did not ask" in arena.store.runs["a"].detail


async def test_news_that_the_watch_lost_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(duties, "_OVERDUE_S", 0.01)
    name = "tasks/t/submissions/1/assignments/1-a"
    async with Arena(tmp_path) as arena:
        arena.registry.open_at_once = False
        arena.registry.offer(name, deadline=NOW - timedelta(minutes=5))
        await arena.store.until(name, RunState.SEALED)
        arena.registry.known[name] = replace(arena.registry.known[name], opening=True)
        assert (await arena.store.until(name, *ENDED_RUNS)).state is RunState.OPENED
    # Of one submission, not of all that there ever were.
    assert {call[1] for call in arena.calls("assignments")[1:]} == {"tasks/t/submissions/1"}
