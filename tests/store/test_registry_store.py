"""The registry's store: one suite that every database has to pass."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy.exc import IntegrityError

from services.registry import entries
from services.registry.changes import ChangeBoard
from services.registry.listing import Listing
from services.registry.record_log import read_nodes
from services.registry.records import (
    Artifact,
    ArtifactUse,
    Assignment,
    Counts,
    Endorsement,
    Evaluation,
    Evidence,
    Finding,
    Member,
    Participant,
    Round,
    Score,
    Submission,
    Task,
    ValidatorFault,
    Verdict,
)
from services.registry.states import (
    ArtifactPurpose,
    AssignmentState,
    EvaluationVerdict,
    HoldoutState,
    MembershipState,
    ModelFormat,
    RejectionReason,
    Role,
    RoundState,
    SubmissionState,
    TaskState,
    ValidatorFaultKind,
)
from services.registry.store import SqlStore
from services.registry.transaction import Writing
from services.runtime.database import Database
from tests.support.registry_fakes import START, SettableClock
from tests.support.registry_world import task_config
from tiltyard.identity import Envelope
from tiltyard.transparency import inclusion_proof as prove
from tiltyard.transparency import leaf_hash, root_hash, verify_inclusion

ADA, BOB, CY = ("a" * 40, "b" * 40, "c" * 40)
ENVELOPE = Envelope("application/vnd.tiltyard.join.v1+protobuf", b"payload", b"s" * 64, b"k" * 32)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


class Opened:
    """A database with the store over it; `again` opens it anew, as the next process does."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.clock = SettableClock()
        self.open()

    def open(self) -> None:
        self.database = Database.open(self.url, migrations="services.registry.migrations", clock=self.clock)
        self.changes = ChangeBoard()
        self.store = SqlStore(self.database, self.changes, self.clock)

    async def again(self) -> SqlStore:
        await self.database.close()
        self.open()
        return self.store


@pytest.fixture
async def opened(database_url: str) -> AsyncIterator[Opened]:
    opened = Opened(database_url)
    yield opened
    await opened.database.close()


@pytest.fixture
def store(opened: Opened) -> SqlStore:
    return opened.store


def participant(participant: str, *, owner: str | None = None) -> Participant:
    return Participant(participant, f"name of {participant[0]}", participant[0].encode() * 32, owner, START)


def task(name: str = "t", **changes: object) -> Task:
    plain = Task(
        id=name, creator=ADA, config=task_config(), state=TaskState.PREPARING, create_time=START, update_time=START
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def submission(number: int = 1, **changes: object) -> Submission:
    plain = Submission(
        task="t",
        number=number,
        participant=BOB,
        state=SubmissionState.COMMITTED,
        commitment=b"c" * 32,
        commit_time=START + number * MINUTE,
        deadline=START + HOUR,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def assignment(validator: str = CY, **changes: object) -> Assignment:
    plain = Assignment(
        task="t",
        number=1,
        round=1,
        validator=validator,
        state=AssignmentState.OFFERED,
        position=0,
        create_time=START,
        update_time=START,
        deadline=START + MINUTE,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def evaluation(validator: str = CY, **changes: object) -> Evaluation:
    plain = Evaluation("t", 1, 1, validator, seal=b"e" * 32, statement=ENVELOPE, seal_time=START)
    return replace(plain, **changes)  # type: ignore[arg-type]


async def test_every_record_reads_back_equal_from_the_next_process(opened: Opened) -> None:
    full_task = task(
        state=TaskState.CLOSED,
        state_reason="why",
        evaluation_rows=7,
        holdout=HoldoutState.ACCEPTED,
        holdout_rows=8,
        holdout_leaf=b"h" * 32,
        ranking_round=2,
        open_time=START + MINUTE,
        close_time=START + HOUR,
        pool_open=True,
    )
    member = Member(
        "t", CY, Role.VALIDATOR, MembershipState.PAUSED, ENVELOPE, START, 5, (1 << 64) - 1, "group", removed=True
    )
    verdict = Verdict(
        "t",
        CY,
        Role.VALIDATOR,
        False,
        (Evidence("STAKE", False, 1, 2), Evidence("TRACK_RECORD", True, references=("x",))),
        "no",
        START,
    )
    score = Score(1, "SCORED", 5, 7, "", 1, (ADA, CY), (ADA,))
    full_submission = submission(
        state=SubmissionState.REJECTED,
        reason=RejectionReason.COPY,
        detail="copied",
        original=9,
        model_digest=b"d" * 32,
        size_bytes=1 << 40,
        format=ModelFormat.ONNX,
        model_index=2,
        salt=b"s" * 32,
        reveal_leaf=b"r" * 32,
        structure_checked=True,
        scores={1: score, 2: Score(2, "FAULT", fault="CRASHED")},
        public_best=93,
        hidden=True,
        score_salt=b"s" * 32,
        draws={1: "d-1", 2: "d-2"},
        reveal_time=START + MINUTE,
        end_time=START + HOUR,
        deadline=None,
    )
    round_ = Round("t", 1, 1, RoundState.OPENING, START + HOUR, "d-1", 4, True, 3, True, "waits")
    duty = assignment(
        state=AssignmentState.SEALED,
        opening=True,
        lease_token="token",
        lease_holder=b"l" * 32,
        settled=True,
        refund=True,
    )
    counted = evaluation(
        report=ENVELOPE,
        salt=b"s" * 32,
        finding=Finding(Counts(1, 2, 3, -4), None, node_endpoint=True),
        open_time=START + MINUTE,
        verdict=EvaluationVerdict.OUTLIER,
        disclosed=True,
    )
    faulty = evaluation(ADA, finding=Finding(None, "CRASHED"))
    fault = ValidatorFault("t", 1, 1, CY, ValidatorFaultKind.OUTLIER, START)
    artifact = Artifact("f" * 64, 1 << 41, START)
    use = ArtifactUse("f" * 64, "t", ArtifactPurpose.MODEL, BOB, START, 1)

    def put(tx: Writing) -> None:
        tx.put_participant(participant(BOB, owner=ADA))
        tx.put_endorsement(Endorsement(ADA, BOB, "vision", START))
        tx.put_task(full_task)
        tx.put_member(member)
        tx.put_verdict(verdict)
        tx.put_submission(full_submission)
        tx.put_round(round_)
        tx.put_assignment(duty)
        tx.put_evaluation(counted)
        tx.put_evaluation(faulty)
        tx.put_draw_receipt("d-1", b"receipt")
        tx.put_artifact(artifact)
        tx.put_artifact_use(use)
        tx.set_ledger_position(12, b"d" * 32)
        tx.put_prediction_hashes("ab", 1, b"h" * 32)
        tx.put_prediction_hashes("ab", 1, b"h" * 32)
        tx.put_validator_fault(fault, costs_stake=True)
        tx.put_validator_fault(replace(fault, validator=ADA), costs_stake=False)
        tx.set_alive_time(START + HOUR)

    await opened.store.write(put)
    store = await opened.again()
    kept = await store.read(lambda tx: tx.task("t"))
    assert kept is not None
    assert kept == replace(full_task, revision=kept.revision)
    assert await store.read(lambda tx: tx.participant(BOB)) == participant(BOB, owner=ADA)
    assert await store.read(lambda tx: tx.endorsements(BOB)) == [Endorsement(ADA, BOB, "vision", START)]
    assert await store.read(lambda tx: tx.member("t", CY)) == member
    assert await store.read(lambda tx: tx.verdicts("t", after=0, limit=9)) == [(1, verdict)]
    assert await store.read(lambda tx: tx.submission("t", 1)) == full_submission
    assert await store.read(lambda tx: tx.round("t", 1, 1)) == round_
    kept_duty = await store.read(lambda tx: tx.assignment("t", 1, 1, CY))
    assert kept_duty is not None
    assert kept_duty == replace(duty, sequence=kept_duty.sequence)
    assert await store.read(lambda tx: tx.evaluations("t", 1)) == [faulty, counted]
    assert await store.read(lambda tx: tx.draw_receipt("d-1")) == b"receipt"
    assert await store.read(lambda tx: tx.artifact("f" * 64)) == artifact
    assert await store.read(lambda tx: tx.artifact_uses("f" * 64)) == [use]
    assert await store.read(lambda tx: (tx.ledger_position(), tx.ledger_digest())) == (12, b"d" * 32)
    assert await store.read(lambda tx: tx.prediction_hashes("ab", 1)) == b"h" * 32
    faults = await store.read(lambda tx: tx.validator_faults(Listing(), task="t"))
    assert [found for _, found in faults] == [fault, replace(fault, validator=ADA)]
    assert await store.read(lambda tx: tx.faults_unslashed(limit=9)) == [(1, fault)]
    await store.write(lambda tx: tx.note_slashed(1))
    assert await store.read(lambda tx: tx.faults_unslashed(limit=9)) == []
    assert await store.read(lambda tx: tx.alive_time()) == START + HOUR


async def test_what_is_not_there_reads_as_nothing(store: SqlStore) -> None:
    def read(tx: Writing) -> None:
        assert tx.participant(ADA) is None
        assert tx.task("t") is None
        assert tx.member("t", ADA) is None
        assert tx.submission("t", 1) is None
        assert tx.round("t", 1, 1) is None
        assert tx.assignment("t", 1, 1, ADA) is None
        assert tx.evaluation("t", 1, 1, ADA) is None
        assert tx.draw_receipt("d") is None
        assert tx.artifact("f" * 64) is None
        assert tx.next_deadline() is None
        assert (tx.ledger_position(), tx.log_size(), tx.assignment_sequence()) == (0, 0, 0)
        with pytest.raises(LookupError):
            tx.next_submission_number("t")

    await store.write(read)


async def test_a_failing_work_leaves_neither_state_nor_leaf(store: SqlStore) -> None:
    def half(tx: Writing) -> None:
        tx.put_participant(participant(ADA))
        tx.append(entries.ParticipantRegistered(ADA, b"k" * 32, "Ada"))
        raise RuntimeError("died")

    def whole(tx: Writing) -> None:
        tx.put_participant(participant(BOB))
        tx.append(entries.ParticipantRegistered(BOB, b"k" * 32, "Bob"))

    outcomes = await asyncio.gather(store.write(whole), store.write(half), store.write(whole), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), RuntimeError, type(None)]
    assert await store.read(lambda tx: tx.participant(ADA)) is None
    leaves = await store.read(lambda tx: tx.leaves(start=0, limit=9))
    assert [leaf.index for leaf in leaves] == [0, 1]
    assert await store.read(lambda tx: tx.log_root()) == (2, root_hash([leaf.hash for leaf in leaves]))


async def test_the_log_is_one_tree_over_processes(opened: Opened) -> None:
    store = opened.store
    for number in range(21):
        opened.clock.advance(seconds=1)
        name = f"number {number}"
        leaf = await store.write(lambda tx, name=name: tx.append(entries.ParticipantRegistered(ADA, b"k" * 32, name)))
        assert leaf.index == number
        assert leaf.hash == leaf_hash(leaf.entry)
        if number % 7 == 3:
            store = await opened.again()
    leaves = await store.read(lambda tx: tx.leaves(start=0, limit=99))
    size, root = await store.read(lambda tx: tx.log_root())
    assert (size, root) == (21, root_hash([leaf_hash(leaf.entry) for leaf in leaves]))
    for index in range(21):
        path = await store.read(lambda tx, index=index: read_nodes(tx, lambda node: prove(index, 21, node)))
        assert verify_inclusion(leaf=leaves[index].hash, index=index, size=21, path=path, root=root)
    with pytest.raises(LookupError):
        await store.read(lambda tx: tx.log_nodes([(3, 2)]))
    assert [leaf.index for leaf in await store.read(lambda tx: tx.leaves(start=19, limit=99))] == [19, 20]


async def test_several_leaves_of_one_work_follow_each_other(store: SqlStore) -> None:
    def work(tx: Writing) -> list[int]:
        leaves = [tx.append(entries.ParticipantRegistered(ADA, b"k" * 32, f"{n}")) for n in range(5)]
        assert tx.log_size() == 5
        assert tx.log_root() == (5, root_hash([leaf.hash for leaf in leaves]))
        assert [leaf.hash for leaf in tx.leaves(start=0, limit=9)] == [leaf.hash for leaf in leaves]
        return [leaf.index for leaf in leaves]

    assert await store.write(work) == [0, 1, 2, 3, 4]


async def test_counters_of_a_task_are_its_own(store: SqlStore) -> None:
    def put(tx: Writing) -> int:
        stale = tx.put_task(task())
        node = Member("t", BOB, Role.TRAINING_NODE, MembershipState.PENDING, ENVELOPE, START)
        tx.put_member(node)
        tx.put_member(replace(node, state=MembershipState.ACTIVE))
        tx.put_member(Member("t", CY, Role.VALIDATOR, MembershipState.ACTIVE, ENVELOPE, START))
        assert [tx.next_submission_number("t"), tx.next_submission_number("t")] == [1, 2]
        # A record from before must not turn the counters back.
        return tx.put_task(replace(stale, state=TaskState.OPEN)).revision

    revision = await store.write(put)
    found = await store.read(lambda tx: tx.task("t"))
    assert found is not None
    assert (found.training_nodes, found.validators, found.submissions) == (1, 1, 2)
    paused = Member("t", CY, Role.VALIDATOR, MembershipState.PAUSED, ENVELOPE, START)
    await store.write(lambda tx: tx.put_member(paused))
    found = await store.read(lambda tx: tx.task("t"))
    assert found is not None
    assert (found.validators, found.revision) == (0, revision + 1)


async def test_changes_wake_those_who_wait_after_the_commit(opened: Opened) -> None:
    async def woken_by(topic: str, work: object) -> bool:
        waiting = asyncio.ensure_future(opened.changes.wait(topic, 30))
        await asyncio.sleep(0)
        await opened.store.write(work)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        done = waiting.done()
        waiting.cancel()
        return done

    assert await woken_by("tasks/t", lambda tx: tx.put_task(task()))
    assert await woken_by("tasks/t", lambda tx: tx.put_submission(submission()))
    assert await woken_by("tasks/t", lambda tx: tx.touch_task("t"))
    assert not await woken_by("tasks/t", lambda tx: tx.put_task(task("other")))
    assert await woken_by(f"validators/{CY}", lambda tx: tx.put_assignment(assignment()))
    assert not await woken_by(f"validators/{ADA}", lambda tx: tx.put_assignment(assignment()))

    def fails(tx: Writing) -> None:
        tx.touch_task("t")
        raise RuntimeError("died")

    waiting = asyncio.ensure_future(opened.changes.wait("tasks/t", 30))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError):
        await opened.store.write(fails)
    assert not waiting.done()
    waiting.cancel()


async def test_assignments_are_sequenced_over_all_puts(store: SqlStore) -> None:
    def put(tx: Writing) -> list[int]:
        first = tx.put_assignment(assignment(CY, position=1))
        second = tx.put_assignment(assignment(ADA, position=0))
        third = tx.put_assignment(replace(first, state=AssignmentState.ACCEPTED))
        return [first.sequence, second.sequence, third.sequence]

    assert await store.write(put) == [1, 2, 3]
    assert await store.read(lambda tx: tx.assignment_sequence()) == 3

    def read(tx: Writing) -> None:
        assert [a.validator for a in tx.assignments("t", 1)] == [ADA, CY]
        assert not tx.assignments("t", 1, 2)
        assert [a.sequence for a in tx.assignments_of(CY, after=0, limit=9)] == [3]
        assert not tx.assignments_of(CY, after=3, limit=9)
        assert [a.state for a in tx.assignments_unended_of(CY)] == [AssignmentState.ACCEPTED]
        assert [a.validator for a in tx.assignments_due(START + MINUTE)] == [ADA, CY]
        assert not tx.assignments_due(START + MINUTE - timedelta(microseconds=1))
        assert not tx.assignments_unsettled()

    await store.write(read)
    ended = assignment(CY, state=AssignmentState.OPENED, deadline=None)
    await store.write(lambda tx: tx.put_assignment(ended))
    assert [a.validator for a in await store.read(lambda tx: tx.assignments_unsettled())] == [CY]
    await store.write(lambda tx: tx.put_assignment(replace(ended, settled=True)))
    assert not await store.read(lambda tx: tx.assignments_unsettled())
    assert not await store.read(lambda tx: tx.assignments_unended_of(CY))


async def test_the_daily_count_leaves_out_what_the_platform_is_to_blame_for(store: SqlStore) -> None:
    def put(tx: Writing) -> None:
        tx.put_task(task())
        tx.put_submission(submission(1))
        tx.put_submission(submission(2, state=SubmissionState.REJECTED, reason=RejectionReason.REVEAL_EXPIRED))
        tx.put_submission(submission(3, state=SubmissionState.REJECTED, reason=RejectionReason.VALIDATORS_UNAVAILABLE))
        tx.put_submission(submission(4, participant=CY))

    await store.write(put)
    assert await store.read(lambda tx: tx.count_submissions("t", BOB, since=START)) == 2
    assert await store.read(lambda tx: tx.oldest_submission_since("t", BOB, since=START)) == START + MINUTE
    assert await store.read(lambda tx: tx.count_submissions("t", BOB, since=START + 2 * MINUTE)) == 1
    assert await store.read(lambda tx: tx.oldest_submission_since("t", BOB, since=START + HOUR)) is None


async def test_submissions_are_found_by_state_participant_and_digest(store: SqlStore) -> None:
    def put(tx: Writing) -> None:
        tx.put_task(task())
        for number in (3, 1, 2):
            changes = {"state": SubmissionState.REVEALED, "model_digest": b"d" * 32} if number > 1 else {}
            tx.put_submission(submission(number, participant=CY if number == 3 else BOB, **changes))

    await store.write(put)

    def read(tx: Writing) -> None:
        assert [s.number for s in tx.submissions("t")] == [1, 2, 3]
        assert [s.number for s in tx.submissions("t", limit=2)] == [1, 2]
        assert [s.number for s in tx.submissions("t", state=SubmissionState.REVEALED, participant=CY)] == [3]
        assert [s.number for s in tx.submissions_in(SubmissionState.REVEALED)] == [2, 3]
        assert [s.number for s in tx.submissions_with_digest("t", b"d" * 32)] == [2, 3]
        assert not tx.submissions_with_digest("other", b"d" * 32)

    await store.write(read)


async def test_the_track_record_is_of_other_owner_groups_tasks(store: SqlStore) -> None:
    def put(tx: Writing) -> None:
        tx.put_participant(participant(ADA, owner="d" * 40))
        tx.put_participant(participant(CY, owner="d" * 40))
        tx.put_task(task("t", creator=ADA))
        tx.put_task(task("u", creator=BOB))
        for name in ("t", "u"):
            tx.put_submission(replace(submission(1, state=SubmissionState.SCORED, participant=CY), task=name))
            tx.put_submission(replace(submission(2, participant=CY), task=name))
            tx.put_evaluation(replace(evaluation(CY, verdict=EvaluationVerdict.AGREED), task=name, number=3))
            tx.put_evaluation(replace(evaluation(CY, verdict=EvaluationVerdict.OUTLIER), task=name, number=4))

    await store.write(put)
    record = await store.read(lambda tx: tx.track_record(CY, outside_owner_group_of=CY))
    assert record == ["tasks/u/submissions/1", f"tasks/u/submissions/3/evaluations/1-{CY}"]
    everywhere = await store.read(lambda tx: tx.track_record(CY, outside_owner_group_of="e" * 40))
    assert len(everywhere) == 4


async def test_the_next_deadline_is_the_earliest_of_all(store: SqlStore) -> None:
    async def after(work: object) -> timedelta | None:
        await store.write(work)  # type: ignore[arg-type]
        deadline = await store.read(lambda tx: tx.next_deadline())
        return None if deadline is None else deadline - START

    assert await after(lambda tx: tx.put_task(task(state=TaskState.OPEN))) == timedelta(days=7)
    assert await after(lambda tx: tx.put_round(Round("t", 1, 1, RoundState.WAITING, START + 24 * HOUR))) == 24 * HOUR
    assert await after(lambda tx: tx.put_submission(submission())) == HOUR
    assert await after(lambda tx: tx.put_assignment(assignment())) == MINUTE
    assert await after(lambda tx: tx.put_assignment(assignment(state=AssignmentState.EXPIRED))) == HOUR
    ended = submission(state=SubmissionState.EVALUATING, structure_checked=True)
    assert await after(lambda tx: tx.put_submission(ended)) == 24 * HOUR
    concluded = Round("t", 1, 1, RoundState.CONCLUDED, START + 24 * HOUR)
    assert await after(lambda tx: tx.put_round(concluded)) == timedelta(days=7)
    assert not await store.read(lambda tx: tx.rounds_unconcluded())
    closed = task(state=TaskState.CLOSED, holdout=HoldoutState.EXPECTED, close_time=START)
    assert await after(lambda tx: tx.put_task(closed)) == timedelta(days=1)
    assert await after(lambda tx: tx.put_task(task(state=TaskState.FINAL, pool_open=True))) is None
    assert [one.id for one in await store.read(lambda tx: tx.tasks_ended_with_pool())] == ["t"]


async def test_endorsements_are_deleted_once(store: SqlStore) -> None:
    await store.write(lambda tx: tx.put_endorsement(Endorsement(ADA, BOB, "vision", START)))
    assert await store.write(lambda tx: tx.delete_endorsement(ADA, BOB, "vision"))
    assert not await store.write(lambda tx: tx.delete_endorsement(ADA, BOB, "vision"))
    assert not await store.read(lambda tx: tx.endorsements(BOB))


async def in_one_commit(store: SqlStore, *works: Callable[[Writing], object]) -> list[object]:
    """What became of each, written in one group behind a work that holds the writer."""
    begun, go_on = threading.Event(), threading.Event()

    def hold(_: Writing) -> None:
        begun.set()
        go_on.wait(10)

    held = asyncio.create_task(store.write(hold))
    await asyncio.to_thread(begun.wait, 10)
    queued = [asyncio.create_task(store.write(work)) for work in works]
    await asyncio.sleep(0)
    go_on.set()
    await held
    return await asyncio.gather(*queued, return_exceptions=True)


@pytest.mark.parametrize("lists", [False, True])
async def test_a_work_that_fails_leaves_nothing_of_itself_in_the_commit_of_its_neighbours(
    store: SqlStore, lists: bool
) -> None:
    def put(number: int) -> Callable[[Writing], list[str]]:
        def work(tx: Writing) -> list[str]:
            tx.put_participant(participant(f"{number}" * 40))
            tx.append(entries.ParticipantRegistered(f"{number}" * 40, b"k" * 32, "somebody"))
            # A list makes rows be written before it is read, inside the work's own savepoint.
            return [one.id[0] for _, one in tx.participants(Listing())] if lists else []

        return work

    def fail(tx: Writing) -> None:
        put(2)(tx)
        raise LookupError("no")

    outcomes = await in_one_commit(store, put(1), fail, put(3))
    assert isinstance(outcomes[1], LookupError)
    assert [outcomes[0], outcomes[2]] == ([["1"], ["1", "3"]] if lists else [[], []])
    kept = await store.read(lambda tx: [one.id[0] for _, one in tx.participants(Listing())])
    assert kept == ["1", "3"]
    leaves = await store.read(lambda tx: tx.leaves(start=0, limit=9))
    assert [leaf.index for leaf in leaves] == [0, 1]
    assert await store.read(lambda tx: tx.log_root()) == (2, root_hash([leaf.hash for leaf in leaves]))


async def test_what_does_not_fit_the_database_fails_alone(store: SqlStore) -> None:
    def put(duty: Assignment) -> Callable[[Writing], None]:
        def work(tx: Writing) -> None:
            tx.put_assignment(duty)

        return work

    unfit = assignment(ADA, position=None)
    outcomes = await in_one_commit(store, put(assignment(BOB)), put(unfit), put(assignment(CY)))
    assert isinstance(outcomes[1], IntegrityError)
    assert [outcomes[0], outcomes[2]] == [None, None]
    kept = await store.read(lambda tx: tx.assignments("t", 1))
    assert sorted(duty.validator for duty in kept) == sorted((BOB, CY))
