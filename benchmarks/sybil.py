"""What splitting a stake gains, computed from the curve and measured by draws, with and without one funding account.

The pools that are drawn from are the selector's own: each part is deposited from its funding account and comes in as a
validator of its own. `python -m benchmarks.sybil` prints the tables of docs/sybil.md; `--write` puts them there. Seeds
are fixed: the same numbers come out every time.
"""

import asyncio
import hashlib
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from services.runtime.database import Database
from services.selector.eligibility import Applicant, Eligibility, Facts
from services.selector.pool_trees import PoolTrees, at_version
from services.selector.pools import Pools, find_pool
from services.selector.records import Deposit, Policy, Role
from services.selector.stakes import Stakes
from services.selector.store import SqlStore
from services.selector.transaction import Transaction
from tiltyard.curves import SQUARE_ROOT, Curve, CurveKind, best_split
from tiltyard.sortition import SumTree, draw

_CURVES = {
    "power(1/2)": SQUARE_ROOT,
    "power(1/4)": Curve(CurveKind.POWER, 250),
    "power(3/4)": Curve(CurveKind.POWER, 750),
    "log": Curve(CurveKind.LOG),
    "logistic": Curve(CurveKind.LOGISTIC),
}
_TIMES = (2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
_IN_BENCH = (2, 10, 100, 1000)
_MINIMUM = 1_000_000
_DRAWS = 80_000
_OTHERS = 19  # together they weigh 19 times what the stake weighs in one piece, which so wins one draw in twenty
_DOC = Path(__file__).parents[1] / "docs" / "sybil.md"
_BEGIN, _END = "<!-- tables: python -m benchmarks.sybil --write -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Gain:
    """What the best split of a stake gains: times as much weight, and wins for each win of the others, as counted."""

    times: int
    parts: int
    computed: float
    apart: float
    apart_error: float
    together: float
    together_error: float


@dataclass(frozen=True)
class _Entrant:
    """A validator that comes into a pool, and the account that its stake is paid from."""

    micros: int
    account: str


class _Arena:
    """The part of a selector that makes pools of deposits."""

    def __init__(self, database: Database) -> None:
        self._store, self._trees, self._now = SqlStore(database), PoolTrees(), datetime(2030, 1, 1, tzinfo=UTC)
        self._stakes = Stakes(self._store, self._trees, clock=self._clock, unbonding_time=timedelta(0))
        eligibility = Eligibility(self._store, clock=self._clock, task_creator_min_stake_micros=_MINIMUM)
        self._pools = Pools(self._store, self._trees, eligibility, clock=self._clock)
        self._numbers = iter(range(1, 10**9))

    def _clock(self) -> datetime:
        return self._now

    async def pool(self, curve: Curve, entrants: Sequence[_Entrant]) -> tuple[SumTree, list[str]]:
        """A pool that the entrants have come into, in order, and the owner group of each."""
        task = f"t{next(self._numbers)}"
        policy = Policy(curve, _MINIMUM, _MINIMUM, timedelta(days=1), 100, 10 * _MINIMUM)
        await self._pools.open(task=task, policy=policy, open_time=self._now, creator=_someone(0))
        people = [_someone(next(self._numbers)) for _ in entrants]
        # All are paid before one comes in: a group is whole then, and has its place among the leaves from the start.
        await asyncio.gather(
            *(
                self._stakes.deposit(Deposit(f"to {person}", person, each.micros, f"{task} {each.account}"))
                for person, each in zip(people, entrants, strict=True)
            )
        )
        applicants = (Applicant(task, person, Role.VALIDATOR, Facts()) for person in people)
        admitted = await asyncio.gather(*(self._pools.add(each, owner="") for each in applicants))

        def look(transaction: Transaction) -> SumTree:
            return at_version(transaction, task, find_pool(transaction, task).version)

        return await self._store.read(look), [admission.owner_group for admission in admitted]


@asynccontextmanager
async def _arena() -> AsyncIterator[_Arena]:
    with tempfile.TemporaryDirectory() as folder:
        database = Database.open(f"sqlite:///{folder}/selector.db", migrations="services.selector.migrations")
        try:
            yield _Arena(database)
        finally:
            await database.close()


def _someone(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:40]


async def measure(arena: _Arena, curve: Curve, times: int) -> Gain:
    """Draws of one: the stake in one piece, in parts, and in parts with one funding account, among the same others."""
    stake = times * _MINIMUM
    split = best_split(stake, minimum_micros=_MINIMUM, curve=curve)
    part, left_over = divmod(stake, split.parts)
    parts = [part + (number < left_over) for number in range(split.parts)]

    async def odds(own: list[_Entrant], how: str) -> tuple[float, float]:
        others = [_Entrant(stake, f"other {number}") for number in range(_OTHERS)]
        tree, groups = await arena.pool(curve, [*own, *others])
        return _odds(tree, set(groups[: len(own)]), f"{curve} {times} {how}")

    unsplit, unsplit_error = await odds([_Entrant(stake, "own")], "whole")
    apart, apart_error = await odds([_Entrant(each, f"own {number}") for number, each in enumerate(parts)], "apart")
    together, together_error = await odds([_Entrant(each, "own") for each in parts], "together")
    return Gain(
        times,
        split.parts,
        split.gain,
        apart / unsplit,
        apart / unsplit * (apart_error**2 + unsplit_error**2) ** 0.5,
        together / unsplit,
        together / unsplit * (together_error**2 + unsplit_error**2) ** 0.5,
    )


def _odds(tree: SumTree, own_groups: set[str], label: str) -> tuple[float, float]:
    """Wins for each win of the others, counted over draws of one, with the relative standard error."""
    won = 0
    for run in range(_DRAWS):
        seed = hashlib.sha256(f"{label} {run}".encode()).digest()
        won += tree.identifier(next(islice(draw(seed, tree), 1)).leaf_index) in own_groups
    lost = _DRAWS - won
    return won / lost, (1 / won + 1 / lost) ** 0.5


async def _measured(sizes: Sequence[int]) -> list[tuple[str, Gain]]:
    """The gains by each curve and of each size, with the curve's name."""
    async with _arena() as arena:
        return [(name, await measure(arena, curve, times)) for name, curve in _CURVES.items() for times in sizes]


def run() -> list[dict[str, Any]]:
    """For the benchmark's table: measured gains beside the computed ones."""
    return [row for name, gain in asyncio.run(_measured(_IN_BENCH)) for row in _rows(name, gain)]


def _rows(name: str, gain: Gain) -> Iterator[dict[str, Any]]:
    for how, measured, computed in (("apart", gain.apart, gain.computed), ("one account", gain.together, 1.0)):
        yield {
            "name": f"{gain.times} minima by {name} in {gain.parts}, {how}",
            "ours": measured,
            "unit": "x",
            "against": "computed from the curve",
            "theirs": computed,
            "ratio": measured / computed,
            "goal": None,
        }


def tables() -> Iterator[str]:
    """The tables in Markdown, line by line."""
    measured = asyncio.run(_measured(_TIMES))
    for name in _CURVES:
        yield f"### {name}"
        yield ""
        yield "| stake / minimum | best parts | gain, computed | gain, by draws | one funding account, by draws |"
        yield "|---:|---:|---:|---:|---:|"
        for gain in (gain for curve, gain in measured if curve == name):
            yield (
                f"| {gain.times} | {gain.parts} | {gain.computed:.2f} | {gain.apart:.2f} ± {gain.apart_error:.2f} "
                f"| {gain.together:.2f} ± {gain.together_error:.2f} |"
            )
        yield ""


def main(write: bool) -> None:
    """Prints the tables, or puts them into the document."""
    text = "\n".join(tables())
    if not write:
        print(text)
        return
    before, _, rest = _DOC.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    _DOC.write_text(f"{before}{_BEGIN}\n\n{text}\n{_END}{after}")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
