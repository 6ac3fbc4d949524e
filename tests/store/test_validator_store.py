"""Runs come back from the database as they went in, also into a process that comes later."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from services.runtime.database import Database
from services.validator import migrations
from services.validator.runs import Fault, Finding, Run, RunState, SealedReport
from services.validator.store import DatabaseRunStore
from tiltyard.counting import Counts

NOW = datetime(2030, 1, 1, 12, 30, 15, 123456, tzinfo=UTC)


def run(assignment: str, **fields) -> Run:
    return Run(assignment, "t", RunState.FETCHING, NOW, **fields)


@pytest.fixture
async def store(tmp_path):
    database = Database.open(f"sqlite:///{tmp_path}/runs.db", migrations=migrations)
    yield DatabaseRunStore(database)
    await database.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"state": RunState.EVALUATING},
        {"finding": Finding(counts=Counts(2**40, 2**41, 0, -5), detail="")},
        {"finding": Finding(fault=Fault.NAN_OUTPUT, detail="row 3"), "detail": "row 3"},
        {"sealed": SealedReport(report=b"\0report", salt=bytes(32), seal=b"seal")},
        {"state": RunState.FAILED, "detail": "why", "end_time": NOW + timedelta(microseconds=1)},
    ],
)
async def test_a_run_comes_back_as_it_was_saved(store, changes):
    added = await store.add(run("a"))
    assert added == run("a", number=added.number)
    changed = replace(added, **changes)
    await store.save(changed)
    assert await store.get("a") == changed


async def test_another_process_finds_what_was_acknowledged(tmp_path):
    url = f"sqlite:///{tmp_path}/runs.db"
    first, second = (Database.open(url, migrations=migrations) for _ in range(2))
    added = await DatabaseRunStore(first).add(run("a"))
    assert await DatabaseRunStore(second).get("a") == added
    await first.close()
    await second.close()


async def test_one_assignment_has_one_run(store):
    await store.add(run("a"))
    with pytest.raises(Exception, match="UNIQUE"):
        await store.add(run("a"))
    assert await store.get("b") is None


async def test_history_is_paged_newest_first(store):
    added = [await store.add(run(name)) for name in "abcde"]
    await store.save(replace(added[1], state=RunState.OPENED))
    await store.save(replace(added[2], state=RunState.FAILED))
    first = await store.page(below=None, size=2)
    rest = await store.page(below=first[-1].number, size=10)
    assert [each.assignment for each in (*first, *rest)] == list("edcba")
    assert [each.assignment for each in await store.unfinished()] == ["a", "d", "e"]
    assert await store.count_ended() == 2
