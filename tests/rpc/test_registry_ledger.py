"""The selector's ledger as the record log follows it: over a real selector, and over one that has lost events."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from services.registry import record_log
from services.registry.changes import ChangeBoard
from services.registry.peers import SelectorPeer
from services.registry.record_log import RecordLog
from services.registry.store import SqlStore
from services.runtime.errors import FailedPrecondition
from tests.support.registry_fakes import SettableClock
from tests.support.registry_world import CREATOR, NODES, ORIGIN, VALIDATORS, key_of, open_database
from tests.support.selector_server import selecting


async def bind(selector: SelectorPeer, *numbers: int) -> None:
    """One event for each: this validator has the owner that they all have."""
    for number in numbers:
        await selector.merge_owner_groups(VALIDATORS[number].id, owner=CREATOR.id)


async def test_a_selector_that_has_lost_events_is_found_out_however_many_it_has_made_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr(record_log._DIVERGED, "set", told.append)
    clock = SettableClock()
    database = open_database(tmp_path, clock)
    store = SqlStore(database, ChangeBoard(), clock)
    # Up to here the second is a backup of the first.
    async with selecting(tmp_path / "newest", clock) as newest, selecting(tmp_path / "backup", clock) as restored:
        followed = RecordLog(store, newest, clock, origin=ORIGIN, key=key_of("log"))
        misled = RecordLog(store, restored, clock, origin=ORIGIN, key=key_of("log"))
        deposits = 1 + len(NODES) + len(VALIDATORS)
        assert await followed.take_ledger_events() == deposits
        assert await misled.take_ledger_events() == 0
        await bind(newest, 0, 1)
        assert await followed.take_ledger_events() == 2
        assert set(told) == {0}

        # Two events behind, one, none, and further on than the record log.
        for made in ((), (2,), (3,), (4,)):
            await bind(restored, *made)
            with pytest.raises(FailedPrecondition, match=f"does not hold event {deposits + 2}") as refused:
                await misled.take_ledger_events()
            assert refused.value.reason == "LEDGER_DIVERGED"
            assert told.pop() == 1
        assert await store.read(lambda tx: tx.log_size()) == deposits + 2

        # The ledger that it was is followed again.
        await bind(newest, 5)
        assert await followed.take_ledger_events() == 1
        assert await followed.take_ledger_events() == 0
        assert set(told) == {0}
    await database.close()


async def test_a_ledger_is_followed_on_from_where_an_earlier_version_has_come(tmp_path: Path) -> None:
    clock = SettableClock()
    async with selecting(tmp_path, clock) as selector:
        for made in ((), (0,)):
            await bind(selector, *made)
            database = open_database(tmp_path, clock)
            store = SqlStore(database, ChangeBoard(), clock)
            assert await RecordLog(store, selector, clock, origin=ORIGIN, key=key_of("log")).take_ledger_events() > 0
            await database.close()
            with closing(sqlite3.connect(tmp_path / "registry.db")) as earlier, earlier:
                earlier.execute("UPDATE counters SET ledger_digest = NULL")
