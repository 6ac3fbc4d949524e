"""Holds the state tables of registry and selector against what their logs say, row by row."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tiltyard.audit.ledger import Ledger
from tiltyard.audit.record import Record
from tiltyard.audit.replay import Replay
from tiltyard.statements import open_statement
from tiltyard.sumtree import SumTree
from tiltyard.transparency import leaf_hash
from tiltyard.type.v1 import envelope_pb2, evaluation_pb2, participation_pb2, stake_pb2, task_pb2

_CURVES = {"POWER": task_pb2.CURVE_POWER, "LOG": task_pb2.CURVE_LOG, "LOGISTIC": task_pb2.CURVE_LOGISTIC}


def registry_differences(record: Record, database: Path) -> list[str]:
    """Where the registry's tables hold something else than its log, one line each."""
    replay = Replay()
    endorsed: set[tuple[str, str, str]] = set()
    for index, leaf in enumerate(record.leaves):
        entry = record.entries[index]
        replay.take(index, leaf_hash(leaf), entry)
        if entry.WhichOneof("entry") == "endorsement_changed":
            said, _ = open_statement(entry.endorsement_changed.statement, envelope_pb2.EndorsementStatement)
            word = (_last(said.endorser), _last(said.subject), said.field)
            (endorsed.discard if said.revoke else endorsed.add)(word)
    story = replay.reading.story
    with closing(_open(database)) as tables:
        kept = {
            "participants": dict(_rows(tables, "SELECT id, display_name FROM participants")),
            "owners": dict(_rows(tables, "SELECT id, owner FROM participants WHERE owner IS NOT NULL")),
            "endorsements": set(_rows(tables, "SELECT endorser, subject, field FROM endorsements")),
            "tasks": {
                name: (creator, state, task_pb2.TaskConfig.FromString(config))
                for name, creator, state, config in _rows(tables, "SELECT id, creator, state, config FROM tasks")
            },
            "members": {
                (task, participant): (role, state)
                for task, participant, role, state in _rows(
                    tables, "SELECT task, participant, role, state FROM members"
                )
                # Not decided yet: the decision is what the log will hold. A creator's part is in the task's own leaf.
                if state != "PENDING" and role != "TASK_CREATOR"
            },
            "submissions": {
                f"tasks/{task}/submissions/{number}": (participant, commitment, state)
                for task, number, participant, commitment, state in _rows(
                    tables, "SELECT task, number, participant, commitment, state FROM submissions"
                )
            },
            "assignments": {
                f"tasks/{task}/submissions/{number}/assignments/{round_}-{validator}": state
                for task, number, round_, validator, state in _rows(
                    tables, "SELECT task, number, round, validator, state FROM assignments"
                )
            },
            "seals": {
                f"tasks/{task}/submissions/{number}/assignments/{round_}-{validator}": seal
                for task, number, round_, validator, seal in _rows(
                    tables, "SELECT task, number, round, validator, seal FROM evaluations"
                )
            },
            "draws": set(_rows(tables, "SELECT draw FROM draw_receipts")),
        }
    said_by_log: dict[str, Any] = {
        "participants": {_last(name): shown for name, shown in story.participants.items()},
        "owners": {_last(name): _last(owner) for name, owner in story.owners.items()},
        "endorsements": endorsed,
        "tasks": {
            _last(name): (_last(task.creator), _short(task_pb2.TaskState.Name(task.state), "TASK_STATE_"), task.config)
            for name, task in story.tasks.items()
        },
        "members": {
            (_last(task), _last(participant)): (
                _short(participation_pb2.Role.Name(role), "ROLE_"),  # type: ignore[arg-type]
                _short(participation_pb2.MembershipState.Name(state), "MEMBERSHIP_STATE_"),  # type: ignore[arg-type]
            )
            for (task, participant), (role, state) in story.members.items()
        },
        "submissions": {
            name: (
                _last(each.commit.participant),
                each.commit.commitment,
                _short(evaluation_pb2.SubmissionState.Name(each.state), "SUBMISSION_STATE_"),
            )
            for name, each in story.submissions.items()
        },
        "assignments": {
            name: _short(evaluation_pb2.AssignmentState.Name(duty.state), "ASSIGNMENT_STATE_")  # type: ignore[arg-type]
            for name, duty in story.duties.items()
        },
        "seals": {seal.assignment: seal.seal for seal in story.seals.values()},
        "draws": {(_last(receipt.draw),) for receipt in story.draws.values()},
    }
    return [line for what in kept for line in _compared(what, kept[what], said_by_log[what])]


def selector_differences(events: Sequence[stake_pb2.LedgerEvent], database: Path) -> list[str]:
    """Where the selector's tables hold something else than follows from its ledger's events, one line each."""
    with closing(_open(database)) as tables:
        pools = {
            f"tasks/{row[0]}": row[1:]
            for row in _rows(
                tables, "SELECT task, curve, alpha_millis, validator_min_stake_micros, root, leaf_count FROM pools"
            )
        }
        accounts = {
            participant: amounts
            for participant, *amounts in _rows(
                tables, "SELECT participant, available_micros, locked_micros, unbonding_micros FROM accounts"
            )
            if any(amounts)
        }

    def selection(task: str) -> task_pb2.SelectionPolicy | None:
        if task not in pools:
            return None
        curve, alpha_millis, minimum, *_ = pools[task]
        return task_pb2.SelectionPolicy(
            curve=_CURVES[curve.upper()], alpha_millis=alpha_millis, validator_min_stake_micros=minimum
        )

    ledger = Ledger(selection)
    for event in events:
        ledger.take(event)
    balances = {
        _last(participant): [account.available, sum(account.locked.values()), account.unbonding]
        for participant, account in ledger._accounts.items()
    }
    told = {participant: amounts for participant, amounts in balances.items() if any(amounts)}
    # A pool that nobody has joined has no root yet.
    roots = {task: (bytes(row[3]) or SumTree().root(), int(row[4])) for task, row in pools.items()}
    expected = {}
    for task, pool in ledger._pools.items():
        state = pool.state()
        expected[task] = (state.root, state.size)
    return [*_compared("accounts", accounts, told), *_compared("pools", roots, expected)]


def _open(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{database}?mode=ro", uri=True)


def _rows(tables: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
    return tables.execute(query).fetchall()


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _short(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)


def _compared(what: str, kept: Any, said: Any) -> list[str]:
    if isinstance(kept, set):
        return [f"{what}: {each} is in one of table and log only" for each in kept ^ said]
    return [
        f"{what} {key}: the table holds {kept.get(key)!r}, the log {said.get(key)!r}"
        for key in {*kept, *said}
        if kept.get(key) != said.get(key)
    ]
