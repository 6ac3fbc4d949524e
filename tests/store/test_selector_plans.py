"""What a draw, an estimate or a stake asks is answered from an index on SQLite, however large the pool is."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlmodel import Session

from services.runtime.auth import utc_now
from services.runtime.engines import migrate
from services.selector.pool_trees import PoolTrees
from services.selector.records import Accounts
from services.selector.stakes import Stakes
from services.selector.store import SqlTransaction
from services.selector.transaction import Store

QUESTIONS: dict[str, Callable[[SqlTransaction], Any]] = {
    "who can be picked by way of leaves": lambda tx: tx.seated("t", leaf_indices=[1, 2, 3], version=5),
    "the leaf of a group": lambda tx: tx.leaf("t", "g"),
    "a candidate": lambda tx: tx.candidate("t", "p"),
    "all candidacies of somebody": lambda tx: tx.candidacies("p"),
    "uses of quotas": lambda tx: tx.quota_used("t", window=1, owner_groups=["g", "h"]),
    "a charge": lambda tx: tx.charge("d", "p"),
    "draws": lambda tx: tx.draws(["d", "e"]),
    "owner groups": lambda tx: tx.owner_groups(["p", "q"]),
    "members of a group": lambda tx: tx.owner_group_members("g"),
    "a pool": lambda tx: tx.pool("t"),
    "accounts": lambda tx: tx.accounts("p"),
    "unbonding stake": lambda tx: tx.unbondings("p"),
    "the last event": lambda tx: tx.last_sequence(),
    "events": lambda tx: tx.list_events(start=5, limit=10),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path_factory.mktemp('plans') / 'selector.db'}"
    migrate(url, "services.selector.migrations")
    engine = create_engine(url)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_reads_no_whole_table_and_no_whole_pool(engine: Engine, name: str) -> None:
    asked: list[tuple[str, Any]] = []
    with engine.connect() as connection, Session(bind=connection) as session:

        def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
            asked.append((statement, parameters))

        event.listen(connection, "before_cursor_execute", note)
        QUESTIONS[name](SqlTransaction(session))
        event.remove(connection, "before_cursor_execute", note)
        steps = [
            row.detail
            for statement, parameters in asked
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]
    assert steps
    tables = [step for step in steps if step.startswith(("SCAN", "SEARCH"))]
    # By the task alone is the whole pool; a table of pools has one row of it.
    whole = [step for step in tables if step.startswith("SCAN") or (step.endswith("(task=?)") and "pools" not in step)]
    assert not whole, steps


async def test_a_page_of_stakes_is_read_in_as_many_questions_as_one_of_them(engine: Engine) -> None:
    asked: list[str] = []
    with engine.connect() as connection, Session(bind=connection) as session:
        transaction = SqlTransaction(session)
        for number in range(20):
            transaction.put_accounts(Accounts(f"{number:040x}", unbonding_micros=2))
            transaction.add_unbonding(f"{number:040x}", 2, utc_now())
        session.flush()

        class Reader:
            async def read(self, work: Callable[[Any], Any]) -> Any:
                return work(transaction)

        stakes = Stakes(cast(Store, Reader()), PoolTrees(), clock=utc_now, unbonding_time=timedelta(0))
        event.listen(connection, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]))
        page = await stakes.list(after="", limit=20)
        questions = len(asked)
        await stakes.list(after=f"{18:040x}", limit=20)
    assert [stake.unbondings[0].amount_micros for stake in page] == [2] * 20
    assert len(asked) == 2 * questions
