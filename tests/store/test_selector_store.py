"""The selector's domain over a real database: what survives, what is rolled back, and what the events add up to."""

import asyncio
import hashlib
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from math import isqrt
from pathlib import Path

import pytest
from sqlalchemy import LargeBinary, MetaData, String, create_engine, inspect

from services.runtime.database import Database
from services.runtime.errors import ArenaError
from services.selector import migrations
from services.selector.convert.pool import policy_message
from services.selector.convert.receipts import ReceiptSigner
from services.selector.convert.stake import list_ledger_events_response
from services.selector.draws import DrawOrder, Draws
from services.selector.eligibility import Applicant, Eligibility, Facts
from services.selector.pool_trees import PoolTrees, at_version
from services.selector.pools import Pools
from services.selector.records import (
    Deposit,
    Draw,
    EventKind,
    Evidence,
    EvidenceKind,
    LedgerEvent,
    Policy,
    Pool,
    Role,
    Settlement,
)
from services.selector.rows import SelectorRow
from services.selector.stakes import Stakes
from services.selector.store import SqlStore
from services.selector.transaction import Transaction
from tiltyard.audit.ledger import Ledger
from tiltyard.bls import BlsKey
from tiltyard.faults import COST_MILLIS, Fault, cost_micros
from tiltyard.odds import inclusion_probabilities
from tiltyard.sortition import SQUARE_ROOT, weight

NOW = datetime(2030, 1, 1, 12, 30, 15, 123456, UTC)
MINIMUM = 100
POLICY = Policy(
    curve=SQUARE_ROOT,
    validator_min_stake_micros=MINIMUM,
    training_node_min_stake_micros=MINIMUM // 10,
    window=timedelta(hours=24),
    limit=1000,
    reference_stake_micros=10 * MINIMUM,
)


def someone(number: int) -> str:
    return f"{number:040x}"


CREATOR = someone(10**6)
SUBMITTER = someone(10**6 + 1)


@dataclass
class Selector:
    """The domain over one store."""

    store: SqlStore
    trees: PoolTrees
    stakes: Stakes
    pools: Pools
    draws: Draws
    reference: int = 0

    async def deposit(self, participant: str, micros: int, account: str = "") -> None:
        self.reference += 1
        await self.stakes.deposit(Deposit(str(self.reference), participant, micros, account or participant))

    async def admit(self, participant: str, *, task: str = "t", role: Role = Role.VALIDATOR, owner: str = "") -> None:
        await self.pools.add(Applicant(task, participant, role, Facts()), owner=owner)

    async def open(self, task: str = "t") -> Pool:
        return await self.pools.open(task=task, policy=POLICY, open_time=NOW, creator=CREATOR)

    def order(self, number: int, **changes: object) -> DrawOrder:
        fields = {
            "task": "t",
            "submission": f"tasks/t/submissions/{number}",
            "round": 1,
            "anchor": number.to_bytes(32, "big"),
            "reveal_salt": bytes(32),
            "validators": 2,
            "submitter": SUBMITTER,
            "paused": frozenset(),
        }
        return DrawOrder(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = Database.open(database_url, migrations="services.selector.migrations")
    yield opened
    await opened.close()


def domain(database: Database) -> Selector:
    store, trees = SqlStore(database), PoolTrees()
    clock: Callable[[], datetime] = lambda: NOW  # noqa: E731 - a clock that stands still
    eligibility = Eligibility(store, clock=clock, task_creator_min_stake_micros=5 * MINIMUM)
    return Selector(
        store,
        trees,
        Stakes(store, trees, clock=clock, unbonding_time=timedelta(0)),
        Pools(store, trees, eligibility, clock=clock),
        Draws(store, trees, ReceiptSigner(BlsKey(bytes(32))), clock=clock),
    )


@pytest.fixture
def selector(database: Database) -> Selector:
    return domain(database)


def test_the_migrations_make_the_tables_of_the_rows(database_url: str, database: Database) -> None:
    engine = create_engine(database_url)
    inspector = inspect(engine)
    for table in SelectorRow.metadata.sorted_tables:
        key = inspector.get_pk_constraint(table.name)["constrained_columns"]
        made = {
            column["name"]: (str(column["type"]), column["nullable"], column["name"] in key)
            for column in inspector.get_columns(table.name)
        }
        wanted = {
            column.name: (
                str(column.type.compile(engine.dialect)).replace("TEXT", "VARCHAR"),
                bool(column.nullable),
                column.primary_key,
            )
            for column in table.columns
        }
        made = {name: (kind.replace("TEXT", "VARCHAR"), *rest) for name, (kind, *rest) in made.items()}
        assert made == wanted, table.name
    engine.dispose()


async def test_what_the_first_tables_held_is_there_after_the_migrations(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "first/versions").mkdir(parents=True)
    (first,) = (Path(migrations.__path__[0]) / "versions").glob("0001_*.py")
    shutil.copy(first, tmp_path / "first/versions")
    await Database.open(database_url, migrations=tmp_path / "first").close()
    engine = create_engine(database_url)
    with engine.begin() as connection:
        tables = MetaData()
        tables.reflect(connection)
        for number, settlement in enumerate(("open", "charged", "refunded", "open")):
            draw = {
                column.name: b"\0" * 16 if isinstance(column.type, LargeBinary) else 500
                for column in tables.tables["draws"].columns
                if not isinstance(column.type, String)
            }
            texts = {
                "draw": str(number),
                "task": "t",
                "submission": str(number),
                "curve": "power",
                "submitter": SUBMITTER,
            }
            connection.execute(tables.tables["draws"].insert().values(**draw, **texts, places="[]"))
            charge = {"draw": str(number), "participant": someone(number % 3), "task": "t", "rate_window": 4}
            connection.execute(tables.tables["charges"].insert().values(**charge, settlement=settlement))
            event = dict.fromkeys(
                ("participant", "task", "draw", "owner_group", "reference", "funding_account", "fault"), ""
            )
            numbers = {"sequence": number + 1, "time_us": 0, "amount_micros": 0, "weight": b"\0" * 16}
            connection.execute(tables.tables["ledger_events"].insert().values(**event, **numbers, kind="quota_charged"))
    engine.dispose()
    database = Database.open(database_url, migrations="services.selector.migrations")

    def look(transaction: Transaction) -> None:
        used = transaction.quota_used("t", window=4, owner_groups=[someone(number) for number in range(4)])
        assert [used[someone(number)] for number in range(4)] == [2, 1, 0, 0]
        assert transaction.quota_used("t", window=3, owner_groups=[someone(0)]) == {someone(0): 0}
        charge = transaction.charge("2", someone(2))
        assert charge is not None
        assert charge.settlement is Settlement.REFUNDED
        assert list(transaction.draws([str(number) for number in range(9)])) == ["0", "1", "2", "3"]
        assert [event.sequence for event in transaction.list_events(start=1, limit=9)] == [1, 2, 3, 4]

    await SqlStore(database).read(look)
    await database.close()


async def test_what_is_put_comes_back(selector: Selector) -> None:
    await selector.open()
    for number in range(3):
        await selector.deposit(someone(number), 250)
        await selector.admit(someone(number))
    drawn = await selector.draws.draw(selector.order(1))

    def look(transaction: Transaction) -> None:
        assert transaction.draws([drawn.draw, "none"]) == {drawn.draw: drawn}
        candidate = transaction.candidate("t", someone(1))
        assert candidate is not None
        assert candidate.verdict.evidence == (Evidence(EvidenceKind.STAKE, True, 250, MINIMUM),)
        assert candidate.verdict.decide_time == NOW
        pool = transaction.pool("t")
        assert pool is not None
        assert (pool.policy, pool.open_time, pool.creator) == (POLICY, NOW, CREATOR)
        assert pool.root == at_version(transaction, "t", pool.version).root() == drawn.pool_root

    await selector.store.read(look)


async def test_a_remembered_tree_that_ran_ahead_is_built_again(selector: Selector) -> None:
    pool = await selector.open()
    for number in range(5):
        await selector.deposit(someone(number), 100 + number)
        await selector.admit(someone(number))

    class DiskIsFullError(Exception):
        pass

    def fail_after_the_change(transaction: Transaction) -> None:
        newest = transaction.pool("t")
        assert newest is not None
        selector.trees.change_leaf(transaction, newest, someone(3), 10**6)
        raise DiskIsFullError

    with pytest.raises(DiskIsFullError):
        await selector.store.write(fail_after_the_change)
    # The version that was rolled back is used again, for another change.
    await selector.deposit(someone(7), 900)
    await selector.admit(someone(7))
    drawn = await selector.draws.draw(selector.order(1, validators=6))

    def truth(transaction: Transaction) -> bytes:
        newest = transaction.pool("t")
        assert newest is not None
        return at_version(transaction, pool.task, newest.version).root()

    assert drawn.pool_root == await selector.store.read(truth)
    assert sum(place.owner_group == someone(7) for place in drawn.places) == 1


async def test_another_process_over_the_same_database_draws_the_same(selector: Selector, database: Database) -> None:
    await selector.open()
    for number in range(8):
        await selector.deposit(someone(number), 100 + number)
        await selector.admit(someone(number))
    first = await selector.draws.draw(selector.order(1))
    other = domain(database)
    assert await other.draws.draw(selector.order(1)) == first
    extended = await other.draws.extend(first.draw, picks=8, paused=frozenset())
    assert extended.places[: len(first.places)] == first.places
    assert await selector.draws.get(first.draw) == extended


async def test_trees_remembered_twice_follow_each_others_changes(selector: Selector, database: Database) -> None:
    other = domain(database)
    await selector.open()
    for number in range(12):
        one = selector if number % 2 else other
        await selector.deposit(someone(number), 100 + number)
        await one.admit(someone(number))
        if number > 1:
            mine = await selector.draws.draw(selector.order(number))
            twin = await other.draws.draw(selector.order(number, round=2))
            assert mine.pool_root == twin.pool_root
            assert [place.participant for place in mine.places] == [place.participant for place in twin.places]


async def test_a_failed_change_leaves_no_event_and_no_gap(selector: Selector) -> None:
    await selector.deposit(someone(1), 5)
    with pytest.raises(ArenaError):
        await selector.stakes.request_withdrawal(someone(1), 6)
    with pytest.raises(ArenaError):
        await selector.stakes.deposit(Deposit("1", someone(2), 5, "x"))
    await selector.deposit(someone(2), 5)
    page = await selector.stakes.list_events(start=1, limit=10)
    assert [(event.sequence, event.participant) for event in page.events] == [(1, someone(1)), (2, someone(2))]
    assert page.next_sequence == 3


async def test_a_chain_of_funding_accounts_is_one_group_named_by_its_smallest_id(selector: Selector) -> None:
    await selector.open()
    for number in (9, 5, 7, 3):
        await selector.deposit(someone(number), 100, account=f"account {number}")
        await selector.admit(someone(number))
    await selector.deposit(someone(9), 1, account="account 7")
    await selector.deposit(someone(3), 1, account="account 5")
    assert await _groups(selector, 3, 5, 7, 9) == [3, 3, 7, 7]
    await selector.deposit(someone(7), 1, account="account 3")
    assert await _groups(selector, 3, 5, 7, 9) == [3, 3, 3, 3]
    await selector.deposit(someone(100), 100)
    await selector.admit(someone(100))
    drawn = await selector.draws.draw(selector.order(1))
    assert {place.owner_group for place in drawn.picks} == {someone(3), someone(100)}
    assert next(place for place in drawn.picks if len(place.members) > 1).members == tuple(map(someone, (3, 5, 7, 9)))
    # The stakes of all four, each of 100 at the time it was locked.
    assert drawn.pool_weight == 2 * 2**32 + 2**32


class HashSigner:
    """Sigmas that are as random as those of BLS, and made a thousand times faster."""

    async def sign_anchor(self, anchor: bytes) -> bytes:
        return hashlib.sha512(anchor).digest() + hashlib.sha256(anchor).digest()


async def test_draws_of_the_selector_fit_the_exact_chances_of_owner_groups(selector: Selector) -> None:
    """Groups of one to three members, by funding account and by owner: each is drawn by the sum of its stakes."""
    draws = Draws(selector.store, selector.trees, HashSigner(), clock=lambda: NOW)
    unlimited = replace(POLICY, limit=2**31 - 1)
    await selector.pools.open(task="t", policy=unlimited, open_time=NOW, creator=CREATOR)
    members = {0: [1, 2, 3], 1: [4, 5], 2: [6], 3: [7, 8], 4: [9], 5: [10], 6: [11]}
    for group, people in members.items():
        for number in people:
            account = f"account {group}" if group != 3 else ""
            await selector.deposit(someone(number), 100 * (1 + number), account=account)
            await selector.admit(someone(number), owner=someone(10**6 + 2) if group == 3 else "")
    group_of = {someone(number): group for group, people in members.items() for number in people}
    runs, picks = 4000, 3
    seen: Counter[int] = Counter()
    picked: Counter[str] = Counter()
    for first in range(1, runs + 1, 64):
        numbers = range(first, min(first + 64, runs + 1))
        made = await asyncio.gather(*(draws.draw(selector.order(number, validators=picks)) for number in numbers))
        for drawn in made:
            groups = {group_of[place.participant] for place in drawn.picks}
            assert len(groups) == picks
            seen.update(groups)
            picked.update(place.participant for place in drawn.picks)
    stakes = [sum(100 * (1 + number) for number in people) for people in members.values()]
    weights = [weight(stake, minimum_micros=MINIMUM, curve=SQUARE_ROOT) for stake in stakes]
    for group, chance in enumerate(inclusion_probabilities(weights, picks)):
        # One degree of freedom; 0.001 for all seven together.
        assert (seen[group] - runs * chance) ** 2 / (runs * chance * (1 - chance)) < 14.4
        for number in members[group]:
            each = chance / len(members[group])
            assert (picked[someone(number)] - runs * each) ** 2 / (runs * each * (1 - each)) < 16


async def _groups(selector: Selector, *numbers: int) -> list[int]:
    stakes = [await selector.stakes.get(someone(number)) for number in numbers]
    return [int(stake.owner_group, 16) for stake in stakes]


async def test_a_stake_that_is_topped_up_weighs_more_only_after_it_has_come_in_again(selector: Selector) -> None:
    await selector.open()
    await selector.deposit(someone(1), 100)
    await selector.admit(someone(1))
    await selector.deposit(someone(1), 300)
    await selector.admit(someone(1))
    assert (await selector.stakes.get(someone(1))).accounts.locked_micros == 100
    assert await selector.pools.remove(task="t", participant=someone(1)) == 100
    await selector.admit(someone(1))
    assert (await selector.stakes.get(someone(1))).accounts.locked_micros == 400


async def test_the_pool_can_be_recomputed_from_the_events(selector: Selector) -> None:
    """A random history; then accounts, weights and quotas are added up from the events alone."""
    chance = random.Random(7)
    people = [someone(number) for number in range(12)]
    draws: list[Draw] = []
    for task in ("t", "u"):
        await selector.open(task)
    for step in range(400):
        person, task = chance.choice(people), chance.choice(("t", "u"))
        try:
            match chance.randrange(9):
                case 0 | 1:
                    await selector.deposit(person, chance.randrange(1, 500), account=f"a{chance.randrange(40)}")
                case 2:
                    await selector.stakes.request_withdrawal(person, chance.randrange(1, 300))
                case 3:
                    await selector.stakes.withdraw(person)
                case 4:
                    await selector.stakes.slash(person, fault=chance.choice(list(Fault)), evidence=str(step))
                case 5 | 6:
                    role = chance.choice((Role.VALIDATOR, Role.VALIDATOR, Role.TRAINING_NODE))
                    await selector.admit(person, task=task, role=role)
                case 7:
                    if step % 20 == 0:
                        await selector.pools.merge_owner_groups(person, owner=chance.choice(people))
                case 8:
                    if chance.random() < 0.5:
                        await selector.pools.remove(task=task, participant=person)
                    else:
                        drawn = await selector.draws.draw(selector.order(step + 1, validators=1))
                        draws.append(drawn)
                        if chance.random() < 0.5:
                            await selector.draws.settle(
                                drawn.draw, participant=drawn.picks[0].participant, settlement=Settlement.REFUNDED
                            )
        except ArenaError:
            continue  # the random step was not allowed
    page = await selector.stakes.list_events(start=1, limit=10_000)
    kinds = {event.kind for event in page.events}
    assert kinds == set(EventKind) - {EventKind.POOL_CLOSED}
    books = {person: Books() for person in people}
    weights: dict[tuple[str, str], int] = {}
    uses: dict[str, int] = {}
    for event in page.events:
        _follow(event, books[event.participant] if event.participant in books else Books(), weights, uses)

    # An outsider rebuilds the tree of every draw from the record log, where each event's message is a leaf.
    ledger = Ledger(lambda task: policy_message(POLICY))
    for message in list_ledger_events_response(page).events:
        ledger.take(message)
    assert len(draws) > 10
    for drawn in draws:
        pool = ledger.drawn[f"draws/{drawn.draw}"]
        assert (pool.root, pool.weight, pool.size) == (drawn.pool_root, drawn.pool_weight, drawn.pool_size)

    def compare(transaction: Transaction) -> None:
        for person in people:
            accounts = transaction.accounts(person)
            assert books[person] == Books(
                accounts.available_micros,
                accounts.locked_micros,
                accounts.unbonding_micros,
                accounts.slashed_micros,
                outside=books[person].outside,
            )
            # Every micro-unit that came in lies on exactly one account, or went out again.
            assert books[person].sum() == 0
            locked = sum(candidate.locked_micros for candidate in transaction.candidacies(person))
            assert accounts.locked_micros == locked
            assert sum(waiting.amount_micros for waiting in transaction.unbondings(person)) == (
                accounts.unbonding_micros
            )
            for candidate in transaction.candidacies(person):
                assert candidate.weight == weights[candidate.task, person]
        for task in ("t", "u"):
            pool = transaction.pool(task)
            assert pool is not None
            tree = at_version(transaction, task, pool.version)
            assert tree.root() == pool.root
            for index in range(len(tree)):
                seated = transaction.seated(task, leaf_indices=[index], version=pool.version)[index]
                assert {transaction.owner_group(member) for member in seated} <= {tree.identifier(index)}
                assert bool(seated) == (tree.weight(index) > 0)
                if len(seated) == 1:
                    assert tree.weight(index) == weights[task, seated[0]]
        groups = {transaction.owner_group(person) for person in people}
        used = transaction.quota_used("t", window=0, owner_groups=groups)
        assert sum(used.values()) == sum(uses.values()) > 0

    await selector.store.read(compare)


async def test_a_closed_pool_gives_everybody_back_what_it_holds_and_other_pools_hold_theirs(selector: Selector) -> None:
    for task in ("t", "u"):
        await selector.open(task)
    for number in (3, 1, 2):
        await selector.deposit(someone(number), 3 * MINIMUM)
        await selector.admit(someone(number))
    await selector.deposit(someone(4), 3 * MINIMUM)
    await selector.admit(someone(4), role=Role.TRAINING_NODE)
    await selector.admit(someone(4), task="u")
    await selector.deposit(someone(5), 3 * MINIMUM)
    await selector.admit(someone(5))
    await selector.pools.remove(task="t", participant=someone(5))
    await selector.stakes.slash(someone(2), fault=Fault.CONTRADICTION, evidence="all of it")
    before = (await selector.stakes.list_events(start=1, limit=1000)).next_sequence
    held = await selector.stakes.get(someone(4))

    await selector.pools.close("t")
    events = (await selector.stakes.list_events(start=before, limit=1000)).events
    of_node = POLICY.training_node_min_stake_micros
    assert [(event.kind, event.participant, event.amount_micros) for event in events] == [
        (EventKind.UNLOCKED, someone(1), 3 * MINIMUM),
        (EventKind.UNLOCKED, someone(3), 3 * MINIMUM),
        (EventKind.UNLOCKED, someone(4), of_node),
        (EventKind.POOL_CLOSED, "", 0),
    ]
    assert [event.sequence for event in events] == list(range(before, before + 4))
    node = (await selector.stakes.get(someone(4))).accounts
    assert (node.available_micros, node.locked_micros) == (of_node, held.accounts.locked_micros - of_node)
    assert node.locked_micros > 0
    for number, available in ((1, 3 * MINIMUM), (2, 0), (3, 3 * MINIMUM), (5, 3 * MINIMUM)):
        accounts = (await selector.stakes.get(someone(number))).accounts
        assert (accounts.available_micros, accounts.locked_micros) == (available, 0)
    # Nothing is kept of its tree, and all of the other's.

    def kept(transaction: Transaction) -> list[int]:
        return [len(list(transaction.leaf_changes(task, after=0, upto=1000))) for task in ("t", "u")]

    assert await selector.store.read(kept) == [0, 1]
    # Whoever was in it is free for the other.
    await selector.admit(someone(1), task="u")
    assert (await selector.stakes.get(someone(1))).accounts.locked_micros == 3 * MINIMUM


@dataclass
class Books:
    """One participant's accounts as the events tell them; `outside` is where deposits come from and withdrawals go."""

    available: int = 0
    locked: int = 0
    unbonding: int = 0
    slashed: int = 0
    outside: int = 0

    def move(self, amount: int, source: str, target: str) -> None:
        setattr(self, source, getattr(self, source) - amount)
        setattr(self, target, getattr(self, target) + amount)
        assert min(self.available, self.locked, self.unbonding, self.slashed) >= 0

    def slash(self, amount: int) -> None:
        """From available, locked and unbonding stake, in this order."""
        for source in ("available", "locked", "unbonding"):
            taken = min(amount, getattr(self, source))
            self.move(taken, source, "slashed")
            amount -= taken
        assert amount == 0

    def sum(self) -> int:
        return self.available + self.locked + self.unbonding + self.slashed + self.outside


_MOVES = {
    EventKind.DEPOSITED: ("outside", "available"),
    EventKind.LOCKED: ("available", "locked"),
    EventKind.UNLOCKED: ("locked", "available"),
    EventKind.WITHDRAWAL_REQUESTED: ("available", "unbonding"),
    EventKind.WITHDRAWN: ("unbonding", "outside"),
}


def _follow(event: LedgerEvent, books: Books, weights: dict[tuple[str, str], int], uses: dict[str, int]) -> None:
    if event.kind in _MOVES:
        books.move(event.amount_micros, *_MOVES[event.kind])
    match event.kind:
        case EventKind.SLASHED:
            assert event.fault is not None
            books.slash(event.amount_micros)
        case EventKind.CANDIDATE_ADDED | EventKind.WEIGHT_CHANGED | EventKind.CANDIDATE_REMOVED:
            weights[event.task, event.participant] = event.weight
        case EventKind.QUOTA_CHARGED:
            uses[event.participant] = uses.get(event.participant, 0) + 1
        case EventKind.QUOTA_REFUNDED:
            uses[event.participant] -= 1


async def test_the_largest_stake_there_can_be_is_kept_weighed_and_taken(selector: Selector) -> None:
    await selector.open()
    whale, other = someone(1), someone(2)
    await selector.deposit(whale, 2**63 - 1 - MINIMUM)
    await selector.deposit(other, MINIMUM)
    with pytest.raises(ArenaError, match="LEDGER_FULL"):
        await selector.deposit(other, 1)
    await selector.admit(whale)
    await selector.admit(other)
    drawn = await selector.draws.draw(selector.order(1))
    assert drawn.pool_weight == isqrt(((2**63 - 1 - MINIMUM) << 64) // MINIMUM) + 2**32
    slashed = await selector.stakes.slash(whale, fault=Fault.SEAL_MISSING, evidence="e")
    assert slashed.slashed_micros == -(-(2**63 - 1 - MINIMUM) // 1000)
    slashed = await selector.stakes.slash(whale, fault=Fault.CONTRADICTION, evidence="f")
    assert slashed.stake.accounts.slashed_micros == 2**63 - 1 - MINIMUM
    # What was taken stays on the ledger: there is still no room.
    with pytest.raises(ArenaError, match="LEDGER_FULL"):
        await selector.deposit(other, 1)


def test_the_table_of_faults_is_whole_and_no_stake_is_too_small_to_be_slashed() -> None:
    assert set(COST_MILLIS) == set(Fault)
    for fault, millis in COST_MILLIS.items():
        assert 1 <= millis <= 1000
        assert cost_micros(fault, stake_micros=0) == 0
        assert cost_micros(fault, stake_micros=1) == 1
        assert cost_micros(fault, stake_micros=2**63 - 1) <= 2**63 - 1
    assert cost_micros(Fault.CONTRADICTION, stake_micros=2**63 - 1) == 2**63 - 1
    assert cost_micros(Fault.REPORT_OUTSIDE_TOLERANCE, stake_micros=1001) == 51
