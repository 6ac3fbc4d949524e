"""The audit over the log of a real registry and selector: tasks of each kind pass, and no lie about them does."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.registry_server import ORIGIN, RegistryServer
from tests.support.registry_world import CREATOR, NODES
from tests.support.told_arena import Told, dataset_of, model_of, tell_tasks
from tests.support.told_lies import LIES, change_of, event, for_reason, score_of
from tiltyard.audit import Audit, Claim, Record, audit
from tiltyard.cli.commands import app
from tiltyard.transparency import Checkpoint, checkpoint_body, leaf_hash, root_hash, sign_note
from tiltyard.type.v1 import evaluation_pb2, log_pb2, task_pb2

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
    assert (found.pending, found.pending_since_ns, found.hidden) == (0, None, ("tasks/hidden",))
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
    failures = audit(signed(told, leaves)).failures
    assert (claim, index) in {(each.claim, each.index) for each in failures}, failures[0]


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


def test_every_final_task_whose_ledger_events_are_kept_back_is_found(told: Told) -> None:
    first_charge = next(at for at, entry in enumerate(told.record.entries) if event("QUOTA_CHARGED")(entry))
    kept = [
        (leaf, entry)
        for at, (leaf, entry) in enumerate(zip(told.record.leaves, told.record.entries, strict=True))
        if at < first_charge or entry.WhichOneof("entry") != "ledger_event"
    ]
    final = [at for at, (_, entry) in enumerate(kept) if entry.task_changed.state == task_pb2.TASK_STATE_FINAL]
    found = audit(signed(told, [leaf for leaf, _ in kept]))
    assert [each.index for each in found.failures if each.claim is Claim.LEDGER] == final
    assert len(final) == 7
    # Of the others it is told since when.
    assert found.pending
    assert found.pending_since_ns


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


def test_what_an_interrupted_export_leaves_is_named_and_is_no_lie(told: Told, folder: Path) -> None:
    artifacts = folder / "exports" / "top-k" / "artifacts"
    whole = next(artifacts.iterdir())
    part, unknown = artifacts / f"{whole.name}.part", artifacts / f"{'0' * 64}.part"
    part.write_bytes(whole.read_bytes()[:10])
    try:
        status, said = verify(artifacts.parent)
        assert (status, said["problems"], said["unfinished"]) == (0, [], [str(part)])
        unknown.write_bytes(b"")
        status, said = verify(artifacts.parent)
        assert (status, said["unfinished"]) == (1, [str(part)])
        assert str(unknown) in said["problems"][0]
    finally:
        part.unlink()
        unknown.unlink(missing_ok=True)


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
