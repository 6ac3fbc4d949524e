"""The audit over the log of a real registry and selector: tasks of each kind pass, and no lie about them does."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.registry_server import ORIGIN, RegistryServer
from tests.support.registry_world import CREATOR, NODES
from tests.support.told_arena import Told, dataset_of, model_of, tell_tasks
from tiltyard.audit import Audit, Claim, Record, audit
from tiltyard.cli.commands import app
from tiltyard.transparency import Checkpoint, checkpoint_body, leaf_hash, root_hash, sign_note
from tiltyard.type.v1 import evaluation_pb2, log_pb2, stake_pb2, task_pb2

Entry = log_pb2.LogEntry


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arena")


@pytest.fixture(scope="module")
def told(folder: Path) -> Told:
    """The story, each of its tasks exported by its creator."""
    key = folder / "creator.pem"
    CREATOR.save(key)

    async def export(server: RegistryServer, task: str) -> None:
        arguments = ["task", "export", task, str(folder / "exports" / task), "--key", str(key)]
        arguments += ["--origin", ORIGIN, "--registry", server.server.address]
        result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert result.exit_code == 0, result.output

    return asyncio.run(tell_tasks(folder, export))


def signed(told: Told, leaves: list[bytes]) -> Record:
    """What a registry shows that has rewritten its log, tree and all."""
    root = root_hash([leaf_hash(leaf) for leaf in leaves])
    note = sign_note(told.log_key, name=ORIGIN, body=checkpoint_body(Checkpoint(ORIGIN, len(leaves), root)))
    return Record(note, tuple(leaves))


def test_every_verdict_score_and_leaderboard_is_made_again_from_the_leaves(told: Told) -> None:
    shown = [board for task, board in told.boards.items() if task != "hidden"]
    found = audit(told.record, shown=shown, log_key=told.log_key.public_bytes)
    assert found.passed, [str(failure) for failure in found.failures]
    assert all(check.count for check in found.checks)
    assert (found.pending, found.hidden) == (0, ("tasks/hidden",))
    assert {board.task for board in found.leaderboards} == {board.task for board in shown}


def test_the_story_is_the_one_that_the_kinds_are_about(told: Told) -> None:
    ranked = {
        task: [(each.submission.rpartition("/")[2], each.correct) for each in board.entries]
        for task, board in told.boards.items()
    }
    assert ranked["dispute"] == [("2", 44), ("1", 40)]
    assert ranked["ladder"] == [("3", 41), ("2", 31), ("4", 20)]
    assert ranked["holdout"] == [("2", 38), ("1", 20)]
    assert ranked["top-k"] == [("2", 36), ("3", 36), ("1", 35)]
    assert (ranked["unpublished"], ranked["regression"], ranked["cancelled"]) == ([("1", 33)], [("1", 25)], [])
    assert {task: board.round for task, board in told.boards.items() if board.round != 1} == {"holdout": 2}
    reasons = [
        evaluation_pb2.RejectionReason.Name(entry.submission_changed.reason).removeprefix("REJECTION_REASON_")
        for _, entry in told.record.of_kind("submission_changed")
        if entry.submission_changed.state == evaluation_pb2.SUBMISSION_STATE_REJECTED
    ]
    assert sorted(reasons) == sorted(
        ["COPY", "NAN_OUTPUT", "AMBIGUOUS", "SHAPE_MISMATCH", "REVEAL_EXPIRED", *["TASK_CANCELLED"] * 3]
    )


# Lies: what the log's keeper writes otherwise, and signs.


def score_of(task: str, number: int, *, round_: int = 1) -> Callable[[Entry], bool]:
    """The leaf that tells a score."""
    return lambda entry: (
        entry.score_concluded.submission == f"tasks/{task}/submissions/{number}"
        and entry.score_concluded.score.round == round_
    )


def change_of(task: str, number: int, state: str) -> Callable[[Entry], bool]:
    """The leaf that ends, or goes on with, a submission."""
    value = evaluation_pb2.SubmissionState.Value(f"SUBMISSION_STATE_{state}")
    return lambda entry: (
        entry.submission_changed.submission == f"tasks/{task}/submissions/{number}"
        and entry.submission_changed.state == value
    )


def task_is(task: str, state: str) -> Callable[[Entry], bool]:
    """The leaf of a task's step."""
    value = task_pb2.TaskState.Value(f"TASK_STATE_{state}")
    return lambda entry: entry.task_changed.task == f"tasks/{task}" and entry.task_changed.state == value


def amendment_of(task: str) -> Callable[[Entry], bool]:
    """The leaf of an amendment."""
    return lambda entry: entry.task_changed.task == f"tasks/{task}" and entry.task_changed.HasField("config")


def opening_in(task: str) -> Callable[[Entry], bool]:
    """The first leaf that lays a report of a task open."""
    return lambda entry: entry.evaluation_opened.evaluation.startswith(f"tasks/{task}/")


def draw_in(task: str, round_: int) -> Callable[[Entry], bool]:
    """The first draw of a task's round."""
    return lambda entry: entry.draw.task == f"tasks/{task}" and entry.draw.round == round_


def more_correct(entry: Entry) -> None:
    entry.score_concluded.score.correct += 1


def salt(entry: Entry) -> None:
    entry.evaluation_opened.salt = bytes(32)


def unsalted(entry: Entry) -> None:
    entry.score_concluded.salt = bytes(32)


def of_another_original(entry: Entry) -> None:
    entry.submission_changed.original = "tasks/dispute/submissions/1"


def no_outlier(entry: Entry) -> None:
    del entry.score_concluded.score.outliers[:]


def for_reason(name: str) -> Callable[[Entry], None]:
    def change(entry: Entry) -> None:
        entry.submission_changed.reason = evaluation_pb2.RejectionReason.Value(f"REJECTION_REASON_{name}")

    return change


def rejected(entry: Entry) -> None:
    entry.submission_changed.state = evaluation_pb2.SUBMISSION_STATE_REJECTED
    for_reason("TASK_CANCELLED")(entry)


def by_round(number: int) -> Callable[[Entry], None]:
    def change(entry: Entry) -> None:
        entry.task_changed.reason = f"round {number} ranks"

    return change


def made_final(entry: Entry) -> None:
    entry.task_changed.state = task_pb2.TASK_STATE_FINAL


def other_anchor(entry: Entry) -> None:
    entry.draw.anchor = bytes(32)


def another_base(entry: Entry) -> None:
    entry.task_changed.config.base_model = f"artifacts/{'0' * 64}"


def easier(entry: Entry) -> None:
    entry.task_changed.config.bound = 1.0


def first(of: str, **values: Any) -> Callable[[Entry], bool]:
    """The first leaf of a kind with these values."""

    def is_it(entry: Entry) -> bool:
        told = getattr(entry, of)
        return entry.WhichOneof("entry") == of and all(getattr(told, name) == each for name, each in values.items())

    return is_it


def event(kind: str) -> Callable[[Entry], bool]:
    """The first ledger event of a kind."""
    return first("ledger_event", kind=stake_pb2.LedgerEventKind.Value(f"LEDGER_EVENT_KIND_{kind}"))


def setting(path: str, value: Any) -> Callable[[Entry], None]:
    """One field gets another value."""

    def change(entry: Entry) -> None:
        *way, last = path.split(".")
        told: Any = entry
        for name in way:
            told = getattr(told, name)
        setattr(told, last, value)

    return change


def unsigned(kind: str, statement: str = "statement") -> Callable[[Entry], None]:
    """An envelope that nobody signed."""
    return setting(f"{kind}.{statement}.signature", bytes(64))


def uninvited(entry: Entry) -> None:
    entry.membership_changed.ClearField("statement")


def later(entry: Entry) -> None:
    entry.outage_ended.back.seconds += 1


def dearer(entry: Entry) -> None:
    entry.ledger_event.amount_micros += 1


ACCEPTED = evaluation_pb2.ASSIGNMENT_STATE_ACCEPTED
LEASE_EXPIRED = evaluation_pb2.VALIDATOR_FAULT_KIND_LEASE_EXPIRED
SOMEBODY = f"participants/{NODES[0].id}"

LIES: dict[str, tuple[Callable[[Entry], bool], Callable[[Entry], None], Claim]] = {
    "the score of a dispute": (score_of("dispute", 1), more_correct, Claim.SCORES),
    "the outlier of a dispute": (score_of("dispute", 1), no_outlier, Claim.SCORES),
    "the original of a copy": (change_of("dispute", 3, "REJECTED"), of_another_original, Claim.HISTORY),
    "a copy that is none": (change_of("dispute", 4, "REJECTED"), for_reason("COPY"), Claim.HISTORY),
    "another fault": (change_of("dispute", 4, "REJECTED"), for_reason("CRASHED"), Claim.SCORES),
    "a fault of the file after the draw": (change_of("dispute", 4, "REJECTED"), for_reason("BAD_FORMAT"), Claim.SCORES),
    "a majority where there is none": (change_of("dispute", 5, "REJECTED"), for_reason("NAN_OUTPUT"), Claim.SCORES),
    "a reveal that was in time": (change_of("dispute", 6, "REJECTED"), for_reason("REVEAL_EXPIRED"), Claim.HISTORY),
    "a task that was not cancelled": (change_of("top-k", 3, "SCORED"), rejected, Claim.HISTORY),
    "a score that was kept back": (score_of("ladder", 3), more_correct, Claim.SCORES),
    "the salt of a score that was kept back": (score_of("ladder", 2), unsalted, Claim.SCORES),
    "a report that was kept back": (opening_in("ladder"), salt, Claim.SEALS),
    "the score of the holdout": (score_of("holdout", 2, round_=2), more_correct, Claim.SCORES),
    "the round that ranks": (task_is("holdout", "FINAL"), by_round(1), Claim.SCORES),
    "the anchor of a draw for the holdout": (draw_in("holdout", 2), other_anchor, Claim.DRAWS),
    "a holdout that never came": (task_is("unpublished", "FINAL"), by_round(2), Claim.SCORES),
    "a result of a cancelled task": (task_is("cancelled", "CANCELLED"), made_final, Claim.HISTORY),
    "a score of a cancelled task": (score_of("cancelled", 1), more_correct, Claim.SCORES),
    "the score of a regression": (score_of("regression", 1), more_correct, Claim.SCORES),
    "a report of a regression": (opening_in("regression"), salt, Claim.SEALS),
    "a score by the k largest outputs": (score_of("top-k", 2), more_correct, Claim.SCORES),
    "another base model": (amendment_of("base-model"), another_base, Claim.HISTORY),
    "another metric": (amendment_of("base-model"), easier, Claim.HISTORY),
    "who has which key": (
        first("participant_registered"),
        setting("participant_registered.participant", SOMEBODY),
        Claim.HISTORY,
    ),
    "who owns whom": (first("owner_bound"), unsigned("owner_bound"), Claim.ENVELOPES),
    "a word for somebody": (first("endorsement_changed"), unsigned("endorsement_changed"), Claim.ENVELOPES),
    "a verdict": (first("verdict", eligible=True), setting("verdict.eligible", False), Claim.VERDICTS),
    "whose task it is": (first("task_created"), setting("task_created.creator", SOMEBODY), Claim.VERDICTS),
    "a join without a word": (first("membership_changed"), uninvited, Claim.HISTORY),
    "another role": (first("membership_changed"), setting("membership_changed.role", 3), Claim.ENVELOPES),
    "a commit": (first("submission_committed"), unsigned("submission_committed"), Claim.ENVELOPES),
    "a reveal": (first("submission_revealed"), unsigned("submission_revealed"), Claim.ENVELOPES),
    "a lease": (first("assignment_changed", state=ACCEPTED), setting("assignment_changed.position", 5), Claim.HISTORY),
    "a seal": (first("evaluation_sealed"), unsigned("evaluation_sealed"), Claim.ENVELOPES),
    "a report": (first("evaluation_opened"), unsigned("evaluation_opened", "report"), Claim.ENVELOPES),
    "a fault": (first("validator_fault"), setting("validator_fault.kind", LEASE_EXPIRED), Claim.HISTORY),
    "the fate of a holdout": (first("holdout_changed"), setting("holdout_changed.accepted", False), Claim.HISTORY),
    "an outage": (first("outage_ended"), later, Claim.HISTORY),
    "what a fault costs": (event("SLASHED"), dearer, Claim.LEDGER),
    "what somebody is slashed for": (event("SLASHED"), setting("ledger_event.reference", "it"), Claim.LEDGER),
    "a charge": (event("QUOTA_CHARGED"), setting("ledger_event.participant", SOMEBODY), Claim.LEDGER),
    "a refund": (event("QUOTA_REFUNDED"), setting("ledger_event.participant", SOMEBODY), Claim.LEDGER),
    "a weight": (event("CANDIDATE_ADDED"), setting("ledger_event.weight", 7), Claim.LEDGER),
}
"""What is written otherwise: the leaf, how, and the claim that finds it."""


def test_there_is_a_lie_about_every_kind_of_leaf(told: Told) -> None:
    lied_about = {
        next(entry for entry in told.record.entries if wanted(entry)).WhichOneof("entry")
        for wanted, _, _ in LIES.values()
    }
    kinds = {field.name for field in Entry.DESCRIPTOR.oneofs_by_name["entry"].fields}
    # The genesis is believed, unless its key is pinned: whoever lies there lies about another arena.
    assert lied_about == kinds - {"genesis"}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_any_kind_of_task_is_found_at_its_leaf(told: Told, lie: str) -> None:
    wanted, change, claim = LIES[lie]
    index, entry = next((at, each) for at, each in enumerate(told.record.entries) if wanted(each))
    leaves = list(told.record.leaves)
    told_otherwise = Entry.FromString(leaves[index])
    change(told_otherwise)
    assert told_otherwise != entry
    leaves[index] = told_otherwise.SerializeToString(deterministic=True)
    found = audit(signed(told, leaves))
    assert (found.failures[0].claim, found.failures[0].index) == (claim, index), found.failures[0]


@pytest.mark.parametrize(
    ("kind", "of"),
    [
        ("validator_fault", "tasks/dispute/submissions/1/"),
        ("submission_revealed", "tasks/dispute/submissions/3"),
        ("holdout_changed", "tasks/holdout"),
        ("evaluation_opened", "tasks/ladder/submissions/4/"),
        ("score_concluded", "tasks/ladder/submissions/2"),
        ("evaluation_opened", "tasks/cancelled/submissions/1/"),
    ],
)
def test_a_leaf_of_any_kind_of_task_that_is_left_out_is_missed(told: Told, kind: str, of: str) -> None:
    def speaks_of_it(entry: Entry) -> bool:
        return entry.WhichOneof("entry") == kind and of in str(getattr(entry, kind))

    kept = [
        leaf for leaf, entry in zip(told.record.leaves, told.record.entries, strict=True) if not speaks_of_it(entry)
    ]
    assert len(kept) < len(told.record.leaves)
    assert not audit(signed(told, kept)).passed


def test_a_state_that_a_score_kept_back_belies_is_found_when_it_is_opened(told: Told) -> None:
    leaves = list(told.record.leaves)
    scored, opened = change_of("ladder", 1, "SCORED"), score_of("ladder", 1)
    index = next(at for at, each in enumerate(told.record.entries) if scored(each))
    entry = Entry.FromString(leaves[index])
    entry.submission_changed.state = evaluation_pb2.SUBMISSION_STATE_REJECTED
    for_reason("CRASHED")(entry)
    leaves[index] = entry.SerializeToString(deterministic=True)
    failure = audit(signed(told, leaves)).failures[0]
    assert (failure.claim, failure.index) == (
        Claim.SCORES,
        next(at for at, each in enumerate(told.record.entries) if opened(each)),
    )


def test_a_ranking_that_breaks_a_tie_otherwise_is_found(told: Told) -> None:
    board = type(told.boards["top-k"])()
    board.CopyFrom(told.boards["top-k"])
    first, second = board.entries[0], board.entries[1]
    assert first.correct == second.correct
    first.rank, second.rank = second.rank, first.rank
    found: Audit = audit(told.record, shown=[board])
    assert [failure.claim for failure in found.failures] == [Claim.LEADERBOARDS]


# Exports


def verify(folder: Path) -> tuple[int, dict[str, Any]]:
    """`tiltyard log verify` without any server; its status and what it says."""
    result = CliRunner().invoke(app, ["log", "verify", str(folder), "--json"])
    return result.exit_code, json.loads(result.stdout)


MODELS = {
    "dispute": ["disputed", "copied", "fault", "ambiguous", "unfit"],
    "ladder": ["ladder 30", "ladder 31", "ladder 41", "ladder disputed"],
    "hidden": [],
    "holdout": ["holdout 45", "holdout 40"],
    "unpublished": ["unpublished"],
    "cancelled": [],
    "regression": ["regression"],
    "top-k": [f"top-k {node.id}" for node in NODES],
    "base-model": ["tuned", "base"],
}


@pytest.mark.parametrize("task", MODELS)
def test_an_export_of_any_kind_of_task_is_verified_elsewhere(told: Told, folder: Path, task: str) -> None:
    exported = folder / "exports" / task
    status, said = verify(exported)
    assert (status, said["verified"], said["problems"]) == (0, True, [])
    assert said["hidden"] == ["tasks/hidden"]
    files = {file.name for file in (exported / "artifacts").iterdir()}
    odd = {"unfit": 2, "regression": 1}
    contents = [model_of(name, outputs=odd.get(name, 3)) for name in MODELS[task]]
    contents.append(dataset_of(folder, task, regression=task == "regression"))
    if task == "holdout":
        contents.append(dataset_of(folder, "holdout of holdout"))
    assert files == {hashlib.sha256(content).hexdigest() for content in contents}
    board = exported / "leaderboards" / f"{task}.json"
    assert board.exists() is (task != "hidden")
    _check_that_changes_are_found(exported, board if told.boards[task].entries and task != "hidden" else None)


def _check_that_changes_are_found(exported: Path, board: Path | None) -> None:
    artifact = next((exported / "artifacts").iterdir())
    content = artifact.read_bytes()
    artifact.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    status, said = verify(exported)
    artifact.write_bytes(content)
    assert (status, len(said["problems"])) == (1, 1)
    assert artifact.name in said["problems"][0]
    if board is not None:
        shown = board.read_text()
        board.write_text(shown.replace('"rank": 1', '"rank": 2'))
        assert board.read_text() != shown
        status, said = verify(exported)
        board.write_text(shown)
        assert status == 1
