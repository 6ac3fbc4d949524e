"""What dishonest validators can do to scores, by the pure rules: draws, quorum, dispute and conclusion, no services.

Each of 1,000 seeded submissions is judged by a draw of k = 3 out of 30 equal validators, of whom 10 (a third of the
weight) are dishonest in one way or another. In other pools the same third is in the hands of two, or of two thirds.
"""

import hashlib
import math
import random
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import pytest

from tiltyard.collusion import capture
from tiltyard.scoring import Conclusion, Counts, NeedMore, Outcome, Report, conclude, quorum
from tiltyard.sortition import draw
from tiltyard.sumtree import SumTree

VALIDATORS, DISHONEST, K, ROWS, TOLERANCE = 30, 10, 3, 10_000, 20
SUBMISSIONS = 1_000


@dataclass(frozen=True)
class Pool:
    """Validators with their weights, the dishonest ones first."""

    weights: tuple[int, ...]
    dishonest: int

    @cached_property
    def ids(self) -> list[str]:
        return [f"{index:040x}" for index in range(len(self.weights))]

    @cached_property
    def liars(self) -> frozenset[str]:
        return frozenset(self.ids[: self.dishonest])

    @cached_property
    def tree(self) -> SumTree:
        return SumTree(zip(self.ids, self.weights, strict=True))

    def order(self, seed: bytes) -> list[str]:
        return [self.ids[place.leaf_index] for place in draw(seed, self.tree)]


ONE = 1 << 32
EQUAL = Pool((ONE,) * VALIDATORS, DISHONEST)
FEW_HEAVY = Pool((5 * ONE,) * 2 + (ONE,) * 20, 2)
MANY_LIGHT = Pool((ONE // 2,) * 20 + (2 * ONE,) * 10, 20)


@dataclass(frozen=True)
class Judged:
    """What became of one submission: the truth, what was counted by whom, who failed otherwise, the conclusion."""

    pool: Pool
    truth: int
    counted: dict[str, int]
    failed: frozenset[str]
    result: Conclusion | None
    """None where too few reported."""

    @property
    def honest_majority(self) -> bool:
        return 2 * sum(validator not in self.pool.liars for validator in self.counted) > len(self.counted)


def count_of(validator: str, truth: int, behaviour: str, dice: random.Random, *, lies: bool) -> int | None:
    """What a validator reports of a model with `truth` right rows; None for nothing at all."""
    if not lies:
        # Honest machines differ on rows that are too close to call.
        return truth + dice.randint(-TOLERANCE // 2, TOLERANCE // 2)
    if behaviour == "mixed":
        behaviour = ("constant", "random", "never opening", "always declining")[int(validator, 16) % 4]
    if behaviour == "constant":
        return ROWS
    return dice.randint(0, ROWS) if behaviour == "random" else None


def judge(number: int, behaviour: str, pool: Pool = EQUAL) -> Judged:
    """Round 1 of a submission: who declines or never opens is replaced by the next of the order."""
    seed = hashlib.sha256(f"{behaviour} {number}".encode()).digest()
    dice = random.Random(seed)
    truth = dice.randint(1_000, 9_000)
    order = iter(pool.order(seed))
    reports: list[Report] = []
    failed: set[str] = set()

    def call_in(wanted: int) -> None:
        for validator in order:
            count = count_of(validator, truth, behaviour, dice, lies=validator in pool.liars)
            if count is None:
                failed.add(validator)
                continue
            reports.append(Report(validator, Counts(count, ROWS)))
            if len(reports) == wanted:
                return

    call_in(K)
    result = conclude(reports, K, TOLERANCE, disputed=False) if len(reports) >= quorum(K) else None
    if isinstance(result, NeedMore):
        call_in(len(reports) + result.reserves_wanted)
        result = conclude(reports, K, TOLERANCE, disputed=True)
        assert isinstance(result, Conclusion)
    counted = {report.validator: report.counts.correct for report in reports if report.counts}
    return Judged(pool, truth, counted, frozenset(failed), result)


def drawn_liars(places: int, liars: int) -> float:
    """The hypergeometric chance that exactly `liars` of so many drawn are dishonest."""
    honest = math.comb(VALIDATORS - DISHONEST, places - liars)
    return math.comb(DISHONEST, liars) * honest / math.comb(VALIDATORS, places)


def chance_without_honest_majority() -> float:
    """All of the first k, who then agree; or some of them, and half or more of all 3k + 1 after the dispute."""
    chance = drawn_liars(K, K)
    more = 2 * K + 1
    for first in range(1, K):
        for later in range(more + 1):
            if 2 * (first + later) >= K + more:
                left = VALIDATORS - K
                reserves = math.comb(DISHONEST - first, later) * math.comb(left - (DISHONEST - first), more - later)
                chance += drawn_liars(K, first) * reserves / math.comb(left, more)
    return chance


def check(judged: list[Judged]) -> None:
    """Wherever honest validators are the majority, the score is right, and who deviates is named."""
    for each in judged:
        if not each.honest_majority:
            continue
        assert each.result is not None
        assert each.result.outcome is Outcome.SCORED
        assert abs(each.result.correct - each.truth) <= TOLERANCE
        # Whoever is further off than the tolerance is named, nobody else is, and who does not report is known.
        off = {v for v, count in each.counted.items() if abs(count - each.result.correct) > TOLERANCE}
        assert set(each.result.outliers) == off <= each.pool.liars
        assert each.failed <= each.pool.liars


@pytest.mark.parametrize("behaviour", ["constant", "random", "never opening", "always declining", "mixed"])
def test_wherever_honest_validators_are_the_majority_the_score_is_within_tolerance(behaviour: str) -> None:
    judged = [judge(number, behaviour) for number in range(SUBMISSIONS)]
    check(judged)
    without = sum(not each.honest_majority for each in judged)
    expected = chance_without_honest_majority() * SUBMISSIONS
    spread = math.sqrt(expected * (1 - expected / SUBMISSIONS))
    if behaviour == "constant":
        # They agree with each other, so that this is exactly the case that was computed.
        assert abs(without - expected) < 4 * spread, (without, expected)
        assert without > 0
    else:
        assert without <= expected + 4 * spread


@pytest.mark.parametrize(
    ("pool", "least", "most"),
    [(FEW_HEAVY, 0.0, 0.0), (MANY_LIGHT, 0.26, 0.36)],
    ids=["few and heavy", "many and light"],
)
def test_the_same_holds_however_the_third_of_the_weight_is_spread(pool: Pool, least: float, most: float) -> None:
    assert 3 * sum(pool.weights[: pool.dishonest]) == sum(pool.weights)
    judged = [judge(number, behaviour, pool) for behaviour in ("constant", "mixed") for number in range(SUBMISSIONS)]
    check(judged)
    # docs/threat-model.md tells of both; those who agree on one lie come first.
    assert least <= sum(not each.honest_majority for each in judged[:SUBMISSIONS]) / SUBMISSIONS <= most
    assert any(each.result is not None and each.result.outliers for each in judged)


def test_what_is_told_of_capture_is_this_bound() -> None:
    told = capture(K, pool=VALIDATORS, colluding=DISHONEST)
    assert math.isclose(told.lost, chance_without_honest_majority(), rel_tol=1e-12)
    judged = [judge(number, "constant") for number in range(SUBMISSIONS)]
    for chance, outcome in ((told.decided, Outcome.SCORED), (told.blocked, Outcome.AMBIGUOUS)):
        found = sum(
            each.result is not None and each.result.outcome is outcome and not each.honest_majority for each in judged
        )
        assert abs(found - chance * SUBMISSIONS) < 4 * math.sqrt(chance * SUBMISSIONS), (outcome, found)


def test_more_judges_leave_colluders_less() -> None:
    lost = [capture(k, pool=30, colluding=10).lost for k in (1, 3, 5, 7, 9)]
    assert lost == sorted(lost, reverse=True)
    # From seven on, a dispute calls in so many that ten are never half of them.
    assert capture(7, pool=30, colluding=10).lost < 0.001
    assert capture(3, pool=3, colluding=2).decided == 1.0
    assert capture(1, pool=5, colluding=0).lost == 0.0
    with pytest.raises(ValueError, match="is no draw"):
        capture(3, pool=2, colluding=1)


def test_the_draws_are_hypergeometric() -> None:
    drawn = [0] * (K + 1)
    for number in range(4 * SUBMISSIONS):
        seed = hashlib.sha256(f"draw {number}".encode()).digest()
        first = [EQUAL.ids[place.leaf_index] for place in islice(draw(seed, EQUAL.tree), K)]
        drawn[sum(validator in EQUAL.liars for validator in first)] += 1
    chi2 = sum(
        (found - expected) ** 2 / expected
        for liars, found in enumerate(drawn)
        if (expected := drawn_liars(K, liars) * 4 * SUBMISSIONS)
    )
    # The 99.9 % point for three degrees of freedom.
    assert chi2 < 16.27


def test_a_constant_majority_wins_only_where_the_bound_says_so() -> None:
    judged = [judge(number, "constant") for number in range(SUBMISSIONS)]
    wrong = [
        each
        for each in judged
        if each.result is None
        or each.result.outcome is not Outcome.SCORED
        or abs(each.result.correct - each.truth) > TOLERANCE
    ]
    assert wrong
    assert not any(each.honest_majority for each in wrong)
