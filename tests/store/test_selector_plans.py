"""What a draw, an estimate or a stake asks is answered from an index, however large the pool is."""

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import pytest
from sqlalchemy import BigInteger, Boolean, Integer, LargeBinary, Table, create_engine, event, insert
from sqlalchemy.engine import Connection
from sqlmodel import Session

from services.runtime.auth import utc_now
from services.runtime.engines import migrate
from services.selector.pool_trees import PoolTrees
from services.selector.records import Accounts, EventKind
from services.selector.rows import SelectorRow
from services.selector.stakes import Stakes
from services.selector.store import SqlTransaction
from services.selector.transaction import Store
from tests.support.postgres_server import PostgresServer
from tests.support.query_plans import Plans, Step

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


POOL = 3000


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('plans') / 'selector.db'}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.database()
    migrate(url, "services.selector.migrations")
    return url


@pytest.fixture(scope="module")
def plans(url: str) -> Iterator[Plans]:
    """Of a database with one large pool, as far as its planner can tell."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for table in SelectorRow.metadata.sorted_tables:
            if table.name not in ("pools", "accounts"):
                connection.execute(insert(table), [_row(table, number) for number in range(POOL)])
        connection.exec_driver_sql("ANALYZE")
    engine.dispose()
    found = Plans(url)
    yield found
    found.close()


def _row(table: Table, number: int) -> dict[str, Any]:
    values = {BigInteger: number, Integer: number, LargeBinary: bytes(16), Boolean: True}
    row = {
        column.name: None if column.nullable else values.get(type(column.type), f"f{number:039x}")
        for column in table.columns
    }
    same = {"task": "t", "rate_window": 1, "kind": EventKind.DEPOSITED.value, "fault": ""}
    return row | {name: value for name, value in same.items() if name in row}


def ask(connection: Connection, question: Callable[[SqlTransaction], Any]) -> Any:
    with Session(bind=connection) as session:
        return question(SqlTransaction(session))


def whole(steps: Sequence[Step]) -> list[Step]:
    """The steps that read a whole table or a whole pool: an index by the task alone."""
    return [
        step
        for step in steps
        if step.whole_table
        or step.whole_index
        or step.rows > POOL / 10
        or (step.text.endswith("(task=?)") and "pools" not in step.text)
    ]


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_reads_no_whole_table_and_no_whole_pool(plans: Plans, name: str) -> None:
    steps = plans.of(lambda connection: ask(connection, QUESTIONS[name]))
    assert steps
    assert not whole(steps), steps


def test_a_question_that_reads_a_whole_pool_would_be_found(plans: Plans) -> None:
    for table in ("leaves", "candidates", "seats", "quota_uses"):
        question = f"SELECT * FROM {table} WHERE task = 't'"
        steps = plans.of(lambda connection, question=question: connection.exec_driver_sql(question))
        assert whole(steps), steps


async def test_a_page_of_stakes_is_read_in_as_many_questions_as_one_of_them(url: str) -> None:
    asked: list[str] = []
    engine = create_engine(url)
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
    engine.dispose()
    assert [stake.unbondings[0].amount_micros for stake in page] == [2] * 20
    assert len(asked) == 2 * questions
