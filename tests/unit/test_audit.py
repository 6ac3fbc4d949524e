"""The audit of a log: a small one by hand passes, and every change to it is found at its leaf by the right claim."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.support.told_log import SUBMISSION, TASK, Entry, ToldLog, named
from tiltyard.audit import Audit, Claim, InvalidRecord, Record, audit, read_record, write_record
from tiltyard.audit.record import pack_leaves, unpack_leaves
from tiltyard.curves import SQUARE_ROOT, weight
from tiltyard.identity import Key
from tiltyard.statements import sign_statement
from tiltyard.transparency import Checkpoint, checkpoint_body, leaf_hash, root_hash, sign_note
from tiltyard.type.v1 import envelope_pb2, evaluation_pb2, stake_pb2, task_pb2
from tiltyard.type.v1 import log_pb2 as log_type_pb2

ACCEPTED = evaluation_pb2.ASSIGNMENT_STATE_ACCEPTED


@pytest.fixture
def told() -> ToldLog:
    return ToldLog().tell()


def failed(found: Audit) -> list[Claim]:
    return [check.claim for check in found.checks if not check.passed]


def where(found: Audit) -> Sequence[int | None]:
    return [failure.index for failure in found.failures]


def test_an_honest_log_passes_and_every_claim_was_checked_on_something(told: ToldLog) -> None:
    found = audit(told.record(), shown=[told.board()])
    assert found.passed, [str(failure) for failure in found.failures]
    assert all(check.count for check in found.checks)
    assert found.pending == 0
    assert found.leaderboards == (told.board(),)


def test_every_changed_leaf_is_found(told: ToldLog) -> None:
    honest = told.record()
    for index, leaf in enumerate(honest.leaves):
        changed = bytearray(leaf)
        changed[len(leaf) // 2] ^= 1
        leaves = (*honest.leaves[:index], bytes(changed), *honest.leaves[index + 1 :])
        assert not audit(Record(honest.note, leaves)).passed, index


@pytest.mark.parametrize("change", ["drop", "drop first", "swap", "add", "none"])
def test_the_order_and_number_of_leaves_is_signed(told: ToldLog, change: str) -> None:
    honest = told.record()
    leaves = list(honest.leaves)
    match change:
        case "drop":
            del leaves[-1]
        case "drop first":
            del leaves[0]
        case "swap":
            leaves[-1], leaves[-2] = leaves[-2], leaves[-1]
        case "add":
            leaves.append(leaves[-1])
        case "none":
            leaves = []
    assert Claim.ROOT in failed(audit(Record(honest.note, tuple(leaves))))


def test_any_byte_of_the_two_files_is_signed(told: ToldLog, tmp_path: Path) -> None:
    write_record(told.record(), tmp_path)
    assert audit(read_record(tmp_path)).passed
    checkpoint, leaves = tmp_path / "checkpoint", tmp_path / "leaves"
    note, packed = checkpoint.read_bytes(), leaves.read_bytes()
    for at in range(len(note)):
        # Case, and the bits that base64 does not use, are what a lax reader lets through.
        for flip in (0x01, 0x20):
            checkpoint.write_bytes(note[:at] + bytes([note[at] ^ flip]) + note[at + 1 :])
            assert is_refused(tmp_path), (at, flip)
    for added in (b"\n", b"x", b" ", "\u2014 x AAAA\n".encode()):
        checkpoint.write_bytes(note + added)
        assert is_refused(tmp_path), added
    checkpoint.write_bytes(note)
    for at in [*range(0, len(packed), 83), 0, 1, 2, 3, len(packed) - 1]:
        leaves.write_bytes(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :])
        assert is_refused(tmp_path), at
    for changed in (packed[:-1], packed + b"\0", packed + bytes(4), b""):
        leaves.write_bytes(changed)
        assert is_refused(tmp_path)
    leaves.write_bytes(packed)
    assert audit(read_record(tmp_path)).passed
    (tmp_path / "more").write_bytes(b"")
    assert is_refused(tmp_path)


def test_a_folder_that_holds_something_else_is_refused_in_a_short_line(told: ToldLog, tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"file {number:03}").touch()
    with pytest.raises(InvalidRecord) as refused:
        read_record(tmp_path)
    assert str(refused.value) == f"{tmp_path} is no exported record log: it holds no checkpoint and no leaves"
    write_record(told.record(), tmp_path)
    with pytest.raises(InvalidRecord) as refused:
        read_record(tmp_path)
    assert str(refused.value) == f"{tmp_path} holds file 000 and 999 more, not checkpoint and leaves alone"


def is_refused(folder: Path) -> bool:
    try:
        record = read_record(folder)
    except InvalidRecord:
        return True
    return not audit(record).passed


def test_leaves_are_packed_and_unpacked() -> None:
    leaves = (b"", b"a", b"b" * 300)
    assert unpack_leaves(pack_leaves(leaves)) == leaves
    with pytest.raises(InvalidRecord, match="leaf 2"):
        unpack_leaves(pack_leaves(leaves)[:-1])


def test_a_checkpoint_signed_by_another_key_is_found(told: ToldLog) -> None:
    told.log_key = Key.generate()
    assert failed(audit(told.record())) == [Claim.ROOT]


def test_a_log_of_another_key_is_found_when_the_key_is_pinned(told: ToldLog) -> None:
    key = told.log_key.public_bytes
    assert audit(told.record(), log_key=key).passed
    assert failed(audit(ToldLog().tell().record(), log_key=key)) == [Claim.ROOT]


def test_a_checkpoint_of_another_origin_is_found(told: ToldLog) -> None:
    body = checkpoint_body(Checkpoint("other.test", len(told.leaves), root_hash([leaf_hash(x) for x in told.leaves])))
    note = sign_note(told.log_key, name="tiltyard.test", body=body)
    assert failed(audit(Record(note, tuple(told.leaves)))) == [Claim.ROOT]


def test_a_score_that_is_not_the_median_is_found() -> None:
    told = ToldLog(score=9)
    found = audit(told.tell().record())
    assert Claim.SCORES in failed(found)
    assert found.failures[0].index == len(told.leaves) - 2
    assert "9/10" in found.failures[0].reason
    assert "8/10" in found.failures[0].reason


def test_a_leaderboard_that_shows_something_else_is_found(told: ToldLog) -> None:
    board = told.board()
    board.entries[0].correct = 9
    assert failed(audit(told.record(), shown=[board])) == [Claim.LEADERBOARDS]


@pytest.mark.parametrize(
    ("kind", "claim"),
    [
        ("evaluation_opened", Claim.SCORES),
        ("evaluation_sealed", Claim.SEALS),
        ("draw", Claim.HISTORY),
        ("verdict", Claim.VERDICTS),
        ("participant_registered", Claim.ENVELOPES),
        ("membership_changed", Claim.HISTORY),
        ("assignment_changed", Claim.HISTORY),
        ("submission_committed", Claim.HISTORY),
        ("submission_revealed", Claim.DRAWS),
        ("task_created", Claim.HISTORY),
        ("genesis", Claim.HISTORY),
    ],
)
def test_a_log_without_what_the_rest_rests_on_is_found(told: ToldLog, kind: str, claim: Claim) -> None:
    told.drop(kind)
    assert claim in failed(audit(told.record()))


def wrong_salt(entry: log_type_pb2.LogEntry) -> None:
    entry.evaluation_opened.salt = bytes(32)


def no_signature(entry: log_type_pb2.LogEntry) -> None:
    entry.submission_committed.statement.signature = bytes(64)


def other_seed(entry: log_type_pb2.LogEntry) -> None:
    entry.draw.seed = bytes(32)


def other_pick(entry: log_type_pb2.LogEntry) -> None:
    entry.draw.picks[0].participant = entry.draw.picks[1].participant


def other_order(entry: log_type_pb2.LogEntry) -> None:
    first, second = entry.draw.picks[0], entry.draw.picks[1]
    first.place, second.place = second.place, first.place


def other_anchor(entry: log_type_pb2.LogEntry) -> None:
    entry.draw.anchor = bytes(32)


def heavier(entry: log_type_pb2.LogEntry) -> None:
    entry.draw.picks[0].group_weight = (10**6).to_bytes(16, "big")


def unsigned(entry: log_type_pb2.LogEntry) -> None:
    entry.draw.signed.signature = bytes(96)


def richer(entry: log_type_pb2.LogEntry) -> None:
    entry.verdict.evidence[0].amount_micros += 1


def insufficient(entry: log_type_pb2.LogEntry) -> None:
    entry.verdict.evidence[0].sufficient = False


def refused(entry: log_type_pb2.LogEntry) -> None:
    entry.verdict.eligible = False


def out_of_order(entry: log_type_pb2.LogEntry) -> None:
    entry.ledger_event.sequence = 7


def other_tolerance(entry: log_type_pb2.LogEntry) -> None:
    entry.score_concluded.score.tolerance = 3


def an_outlier(entry: log_type_pb2.LogEntry) -> None:
    entry.score_concluded.score.outliers.append(entry.score_concluded.score.evaluations[0])


def other_config(entry: log_type_pb2.LogEntry) -> None:
    entry.task_created.config.selection.validator_min_stake_micros //= 2


def another_dataset(entry: log_type_pb2.LogEntry) -> None:
    entry.task_created.config.evaluation_dataset.sha256 = bytes(32)


def not_open(entry: log_type_pb2.LogEntry) -> None:
    entry.task_changed.state = task_pb2.TASK_STATE_CLOSED


@pytest.mark.parametrize(
    ("kind", "change", "claim"),
    [
        ("evaluation_opened", wrong_salt, Claim.SEALS),
        ("submission_committed", no_signature, Claim.ENVELOPES),
        ("draw", other_seed, Claim.DRAWS),
        ("draw", other_pick, Claim.DRAWS),
        ("draw", other_order, Claim.DRAWS),
        ("draw", other_anchor, Claim.DRAWS),
        ("draw", heavier, Claim.DRAWS),
        ("draw", unsigned, Claim.DRAWS),
        ("verdict", insufficient, Claim.VERDICTS),
        ("verdict", refused, Claim.VERDICTS),
        ("ledger_event", out_of_order, Claim.LEDGER),
        ("score_concluded", other_tolerance, Claim.SCORES),
        ("score_concluded", an_outlier, Claim.SCORES),
        ("task_changed", not_open, Claim.HISTORY),
    ],
)
def test_a_dishonest_registry_is_found_at_the_leaf(
    told: ToldLog, kind: str, change: Callable[[log_type_pb2.LogEntry], None], claim: Claim
) -> None:
    index = told.edit(kind, change)
    found = audit(told.record())
    assert found.failures[0].claim is claim
    assert found.failures[0].index == index


@pytest.mark.parametrize(
    ("kind", "change", "claim"),
    [
        ("verdict", richer, Claim.VERDICTS),
        ("task_created", other_config, Claim.LEDGER),
        ("task_created", another_dataset, Claim.SCORES),
    ],
)
def test_what_follows_no_more_is_found_further_on(
    told: ToldLog, kind: str, change: Callable[[log_type_pb2.LogEntry], None], claim: Claim
) -> None:
    told.edit(kind, change)
    assert claim in failed(audit(told.record()))


def test_a_pool_other_than_the_ledgers_is_found() -> None:
    told = ToldLog()
    told.begin()
    told.tree.set_weight(0, told.tree.weight(0) + 1)
    told.commit_and_reveal()
    told.draw()
    assert failed(audit(told.record())) == [Claim.POOLS]


def test_a_draw_that_was_never_charged_is_found_and_one_whose_charges_may_still_come_waits(told: ToldLog) -> None:
    entries = [Entry.FromString(leaf) for leaf in told.leaves]
    told.leaves = [leaf for leaf, entry in zip(told.leaves, entries, strict=True) if not entry.ledger_event.draw]
    # The receipt bears no time: any ledger event is later.
    assert failed(audit(told.record())) == [Claim.POOLS]

    told = ToldLog()
    told.begin()
    told.commit_and_reveal()
    told.draw_time_s = 10**6
    told.draw()
    entries = [Entry.FromString(leaf) for leaf in told.leaves]
    told.leaves = [leaf for leaf, entry in zip(told.leaves, entries, strict=True) if not entry.ledger_event.draw]
    found = audit(told.record())
    assert (found.passed, found.pending) == (True, 1)


def waiting_draw() -> tuple[ToldLog, list[Key]]:
    """A log up to a draw that is later than any event of the ledger by now, and who was drawn."""
    told = ToldLog(draw_time_s=10**6)
    told.begin()
    told.commit_and_reveal()
    return told, told.draw()


def is_charge(leaf: bytes) -> bool:
    return Entry.FromString(leaf).ledger_event.kind == stake_pb2.LEDGER_EVENT_KIND_QUOTA_CHARGED


def index_of(told: ToldLog, kind: str) -> int:
    """The last leaf of a kind."""
    return max(at for at, leaf in enumerate(told.leaves) if Entry.FromString(leaf).WhichOneof("entry") == kind)


def since(told: ToldLog, index: int) -> int:
    return Entry.FromString(told.leaves[index]).time.ToNanoseconds()


@pytest.mark.parametrize("kept_back", [1, 3])
def test_charges_that_are_kept_back_wait_since_their_draw_and_belie_a_final_task(kept_back: int) -> None:
    told, picks = waiting_draw()
    told.evaluate(picks)
    charges = [leaf for leaf in told.leaves if is_charge(leaf)]
    for leaf in charges[3 - kept_back :]:
        told.leaves.remove(leaf)
    found = audit(told.record())
    assert (found.passed, found.pending, found.pending_since_ns) == (True, 1, since(told, index_of(told, "draw")))
    told.end()
    final = index_of(told, "task_changed")
    # What comes after that comes too late.
    for more in ([], charges[3 - kept_back :]):
        told.leaves += more
        found = audit(told.record())
        assert [(each.claim, each.index) for each in found.failures] == [(Claim.LEDGER, final)]
        assert (found.pending, found.pending_since_ns) == (0, None)


def test_a_refund_that_is_kept_back_waits_since_the_release_and_belies_a_final_task() -> None:
    told, picks = waiting_draw()
    told.give_up(picks, refunded=1)
    found = audit(told.record())
    released = index_of(told, "assignment_changed")
    assert (found.passed, found.pending, found.pending_since_ns) == (True, 1, since(told, released - 1))
    told.end()
    failure = audit(told.record()).failures[0]
    assert (failure.claim, failure.index) == (Claim.LEDGER, index_of(told, "task_changed"))
    honest, picks = waiting_draw()
    honest.give_up(picks)
    honest.end()
    found = audit(honest.record())
    assert (found.passed, found.pending) == (True, 0), [str(each) for each in found.failures]


def test_a_charge_that_was_given_back_is_charged_no_second_time() -> None:
    told, picks = waiting_draw()
    told.give_up(picks)
    charge = Entry.FromString(next(leaf for leaf in told.leaves if is_charge(leaf))).ledger_event
    told.event(kind=charge.kind, participant=charge.participant, task=TASK, draw=charge.draw)
    assert failed(audit(told.record())) == [Claim.LEDGER]


def test_who_accepts_a_duty_has_joined_by_an_own_word() -> None:
    told, picks = waiting_draw()
    kept = told.leaves
    joins = {
        Entry.FromString(leaf).membership_changed.participant: at
        for at, leaf in enumerate(kept)
        if Entry.FromString(leaf).WhichOneof("entry") == "membership_changed"
    }
    at = joins[named(picks[0])]
    told.leaves = [leaf for index, leaf in enumerate(kept) if index != at]
    found = audit(told.record())
    accepted = next(
        i for i, leaf in enumerate(told.leaves) if Entry.FromString(leaf).assignment_changed.state == ACCEPTED
    )
    assert (found.failures[0].claim, found.failures[0].index) == (Claim.HISTORY, accepted)
    # The registry enters it by what another has signed.
    forged = Entry.FromString(kept[at])
    forged.membership_changed.statement.CopyFrom(
        Entry.FromString(kept[joins[named(picks[1])]]).membership_changed.statement
    )
    told.leaves = [*kept[:at], forged.SerializeToString(deterministic=True), *kept[at + 1 :]]
    failure = audit(told.record()).failures[0]
    assert (failure.claim, failure.index) == (Claim.ENVELOPES, at)


def test_a_model_other_than_the_committed_one_is_found(told: ToldLog) -> None:
    reveal = envelope_pb2.RevealStatement(
        origin="tiltyard.test", submission=SUBMISSION, model_digest=bytes(32), salt=bytes(range(32))
    )
    told.edit(
        "submission_revealed",
        lambda entry: entry.submission_revealed.statement.CopyFrom(sign_statement(told.node, reveal)),
    )
    assert audit(told.record()).failures[0].claim is Claim.COMMITMENTS


def test_a_report_signed_by_somebody_else_is_found(told: ToldLog) -> None:
    def forge(entry: log_type_pb2.LogEntry) -> None:
        report = envelope_pb2.EvaluationReport.FromString(entry.evaluation_opened.report.payload)
        entry.evaluation_opened.report.CopyFrom(sign_statement(Key.generate(), report))

    index = told.edit("evaluation_opened", forge)
    found = audit(told.record())
    assert (found.failures[0].claim, found.failures[0].index) == (Claim.ENVELOPES, index)


def test_a_rejection_that_nobody_found_is_found(told: ToldLog) -> None:
    def reject(entry: log_type_pb2.LogEntry) -> None:
        entry.submission_changed.state = evaluation_pb2.SUBMISSION_STATE_REJECTED
        entry.submission_changed.reason = evaluation_pb2.REJECTION_REASON_CRASHED

    told.edit("submission_changed", reject)
    assert Claim.SCORES in failed(audit(told.record()))


def test_a_final_task_must_have_judged_everything(told: ToldLog) -> None:
    told.end()
    found = audit(told.record())
    assert found.passed, [str(each) for each in found.failures]
    assert found.leaderboards[0].final
    told.leaves[-1] = Entry(
        task_changed=log_type_pb2.TaskChanged(task=TASK, state=task_pb2.TASK_STATE_FINAL, reason="round 2 ranks")
    ).SerializeToString()
    assert failed(audit(told.record())) == [Claim.SCORES]


def test_an_empty_log_is_refused() -> None:
    assert failed(audit(Record("", ()))) == [Claim.ROOT]


def test_a_validator_has_one_vote_under_one_name(told: ToldLog) -> None:
    def alias(entry: log_type_pb2.LogEntry) -> None:
        duty = entry.assignment_changed
        duty.assignment = duty.assignment.replace("/assignments/1-", "/assignments/01-")

    entries = [Entry.FromString(leaf) for leaf in told.leaves]
    offered = next(entry for entry in entries if entry.WhichOneof("entry") == "assignment_changed")
    alias(offered)
    told.write(offered)
    found = audit(told.record())
    assert [(failure.claim, failure.index) for failure in found.failures] == [(Claim.HISTORY, len(told.leaves) - 1)]


def test_a_validator_who_enters_a_pool_twice_is_found_though_the_pool_follows() -> None:
    told = ToldLog()
    told.begin()
    key, stake = told.validators[0], told.stake_of(told.validators[0])
    told.event(
        kind=stake_pb2.LEDGER_EVENT_KIND_CANDIDATE_ADDED,
        participant=named(key),
        task=TASK,
        owner_group=key.id,
        weight=weight(stake, minimum_micros=stake, curve=SQUARE_ROOT),
    )
    index = len(told.leaves) - 1
    told.tree.set_weight(0, weight(2 * stake, minimum_micros=stake, curve=SQUARE_ROOT))
    told.commit_and_reveal()
    told.evaluate(told.draw())
    found = audit(told.record()).failures[0]
    assert (found.claim, found.index) == (Claim.LEDGER, index)


def no_such_time(kind: str, name: str) -> Callable[[log_type_pb2.LogEntry], None]:
    def change(entry: log_type_pb2.LogEntry) -> None:
        told = getattr(entry, kind) if kind else entry
        getattr(told, name).seconds = 10**15

    return change


def no_such_curve(entry: log_type_pb2.LogEntry) -> None:
    entry.task_created.config.selection.curve = 99  # type: ignore[assignment]


def no_such_exponent(entry: log_type_pb2.LogEntry) -> None:
    entry.task_created.config.selection.alpha_millis = 1000


def no_such_outcome(entry: log_type_pb2.LogEntry) -> None:
    entry.score_concluded.score.outcome = 99  # type: ignore[assignment]


def short_salt(entry: log_type_pb2.LogEntry) -> None:
    entry.evaluation_opened.salt = b"x"


@pytest.mark.parametrize(
    ("kind", "change", "claim"),
    [
        ("verdict", no_such_time("verdict", "decide_time"), Claim.VERDICTS),
        ("draw", no_such_time("draw", "draw_time"), Claim.DRAWS),
        ("ledger_event", no_such_time("ledger_event", "time"), Claim.LEDGER),
        ("task_changed", no_such_time("", "time"), Claim.HISTORY),
        ("task_created", no_such_curve, Claim.LEDGER),
        ("task_created", no_such_exponent, Claim.LEDGER),
        ("score_concluded", no_such_outcome, Claim.SCORES),
        ("evaluation_opened", short_salt, Claim.SEALS),
    ],
)
def test_what_there_is_not_is_found_and_ends_no_audit(
    told: ToldLog, kind: str, change: Callable[[log_type_pb2.LogEntry], None], claim: Claim
) -> None:
    told.edit(kind, change)
    found = audit(told.record())
    assert claim in failed(found)
    assert Claim.ENVELOPES not in failed(found)


def test_a_fault_that_there_is_not_is_no_vote() -> None:
    told = ToldLog()
    told.begin()
    told.commit_and_reveal()
    told.evaluate(told.draw(), fault=99)
    found = audit(told.record()).failures[0]
    assert (found.claim, "a fault that there is not" in found.reason) == (Claim.SCORES, True)


@pytest.mark.parametrize("line", ["\u2014 x A\n", "\u2014 x \u00e9\n", "x\n"])
def test_a_note_with_a_line_that_is_no_signature_is_refused(told: ToldLog, line: str) -> None:
    honest = told.record()
    assert failed(audit(Record(honest.note + line, honest.leaves))) == [Claim.ROOT]


def test_a_checkpoint_of_more_leaves_than_there_can_be_is_refused(told: ToldLog) -> None:
    body = f"tiltyard.test\n{'9' * 5000}\n{base64.b64encode(bytes(32)).decode()}\n"
    note = sign_note(told.log_key, name="tiltyard.test", body=body)
    assert failed(audit(Record(note, tuple(told.leaves)))) == [Claim.ROOT]


def test_a_leaderboard_that_shows_no_interval_is_found(told: ToldLog) -> None:
    board = told.board()
    board.entries[0].interval_low = float("nan")
    assert failed(audit(told.record(), shown=[board])) == [Claim.LEADERBOARDS]


@pytest.mark.parametrize("added", [b"\x92\x01\x00", b"\x0a\x00\x0a\x00"])
def test_a_leaf_that_some_read_otherwise_is_refused(told: ToldLog, added: bytes) -> None:
    """A second ledger event, or a second time, which protobuf merges with the first and others take for it."""
    told.write(Entry(ledger_event=stake_pb2.LedgerEvent(sequence=told.events + 1)))
    told.leaves[-1] += added
    found = audit(told.record())
    assert failed(found) == [Claim.ROOT]
    assert "what it says takes" in found.failures[0].reason


def test_what_a_later_registry_says_in_a_leaf_does_not_matter(told: ToldLog) -> None:
    told.leaves[-1] += b"\xa0\x06\x01"
    assert audit(told.record()).passed
