"""Weight functions: vectors, an independent reading of the square root, and what diminishing returns mean."""

import json
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltyard.curves import SQUARE_ROOT, Curve, CurveKind, best_split, weight
from tiltyard.odds import inclusion_probabilities

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "curves.json").read_text())
MINIMUM = 1_000_000
LOG = Curve(CurveKind.LOG)
LOGISTIC = Curve(CurveKind.LOGISTIC)
CONCAVE = [*(Curve(CurveKind.POWER, alpha) for alpha in (1, 250, 500, 900, 999)), LOG]

_STAKES = st.integers(0, 2**62)
_MINIMA = st.integers(1, 2**45)


@pytest.mark.parametrize("case", VECTORS["weights"], ids=lambda case: f"{case['curve']}-{case['alpha_millis']}")
def test_weights_of_the_vectors(case: dict[str, Any]) -> None:
    curve = Curve(CurveKind(case["curve"]), case["alpha_millis"])
    stake, minimum = int(case["stake_micros"]), int(case["minimum_micros"])
    assert weight(stake, minimum_micros=minimum, curve=curve) == int(case["weight"])


@given(stake=_STAKES, minimum=_MINIMA)
def test_the_square_root_is_that_of_integers(stake: int, minimum: int) -> None:
    assert weight(stake, minimum_micros=minimum, curve=SQUARE_ROOT) == isqrt((stake << 64) // minimum)


@given(stake=_STAKES, more=st.integers(0, 2**61), minimum=_MINIMA)
@pytest.mark.parametrize("curve", [*CONCAVE, LOGISTIC])
def test_weight_never_falls(curve: Curve, stake: int, more: int, minimum: int) -> None:
    own = weight(stake, minimum_micros=minimum, curve=curve)
    assert weight(stake + more, minimum_micros=minimum, curve=curve) >= own


def _steps(stake: int, minimum: int, curve: Curve) -> tuple[int, int]:
    """What the next minimum-stake unit adds, and the one after it."""
    now, then, later = (weight(stake + unit * minimum, minimum_micros=minimum, curve=curve) for unit in range(3))
    return then - now, later - then


@given(stake=_STAKES, minimum=_MINIMA)
@pytest.mark.parametrize("curve", CONCAVE)
def test_each_further_unit_adds_no_more_than_the_one_before(curve: Curve, stake: int, minimum: int) -> None:
    one, next_one = _steps(stake, minimum, curve)
    assert next_one <= one + 1


@given(beyond=_STAKES, minimum=_MINIMA)
def test_each_further_unit_adds_no_more_from_twice_the_minimum_on_with_the_logistic(beyond: int, minimum: int) -> None:
    one, next_one = _steps(2 * minimum + beyond, minimum, LOGISTIC)
    assert next_one <= one + 1


@given(above=_STAKES, minimum=_MINIMA)
@pytest.mark.parametrize("curve", CONCAVE)
def test_doubling_a_stake_never_doubles_its_weight(curve: Curve, above: int, minimum: int) -> None:
    stake = minimum + above
    own = weight(stake, minimum_micros=minimum, curve=curve)
    assert weight(2 * stake, minimum_micros=minimum, curve=curve) < 2 * own


@given(above=_STAKES, minimum=_MINIMA)
def test_doubling_a_stake_never_doubles_its_weight_from_twice_the_minimum_on_with_the_logistic(
    above: int, minimum: int
) -> None:
    stake = 2 * minimum + above
    own = weight(stake, minimum_micros=minimum, curve=LOGISTIC)
    assert weight(2 * stake, minimum_micros=minimum, curve=LOGISTIC) < 2 * own


@pytest.mark.parametrize("picks", [1, 3])
@pytest.mark.parametrize("curve", [SQUARE_ROOT, Curve(CurveKind.POWER, 250), Curve(CurveKind.POWER, 900), LOG])
def test_chance_rises_with_each_further_minimum_and_each_adds_less(curve: Curve, picks: int) -> None:
    """The table of the arena's promise: stakes of 1, 2, 3 ... 20 times the minimum, among fixed others."""
    others = [weight(stake * MINIMUM, minimum_micros=MINIMUM, curve=curve) for stake in (1, 4, 9, 16, 25)]
    chances = [
        inclusion_probabilities([weight(stake * MINIMUM, minimum_micros=MINIMUM, curve=curve), *others], picks)[0]
        for stake in range(1, 21)
    ]
    steps = [later - earlier for earlier, later in pairwise(chances)]
    assert len(steps) == 19
    assert all(step > 0 for step in steps)
    assert all(later < earlier for earlier, later in pairwise(steps))


def test_the_minimum_weighs_one_by_a_power_and_nothing_weighs_nothing() -> None:
    assert weight(MINIMUM, minimum_micros=MINIMUM, curve=SQUARE_ROOT) == 2**32
    assert weight(4 * MINIMUM, minimum_micros=MINIMUM, curve=SQUARE_ROOT) == 2 * 2**32
    assert weight(2 * MINIMUM, minimum_micros=MINIMUM, curve=LOGISTIC) == 2**31
    for curve in (SQUARE_ROOT, LOG, LOGISTIC):
        assert weight(0, minimum_micros=MINIMUM, curve=curve) == 0


@pytest.mark.parametrize("alpha_millis", [0, -1, 1000])
def test_an_exponent_out_of_range_is_refused(alpha_millis: int) -> None:
    with pytest.raises(ValueError, match="1 to 999"):
        Curve(CurveKind.POWER, alpha_millis)


@pytest.mark.parametrize(("stake", "minimum"), [(-1, 1), (1, 0), (1, -1)])
def test_a_negative_stake_and_no_minimum_are_refused(stake: int, minimum: int) -> None:
    with pytest.raises(ValueError, match=" or more"):
        weight(stake, minimum_micros=minimum, curve=SQUARE_ROOT)


@pytest.mark.parametrize(
    ("curve", "parts", "gain"), [(SQUARE_ROOT, 100, 10.0), (LOG, 100, 15.02), (LOGISTIC, 36, 29.73)]
)
def test_the_best_split_of_a_hundred_minima(curve: Curve, parts: int, gain: float) -> None:
    split = best_split(100 * MINIMUM, minimum_micros=MINIMUM, curve=curve)
    assert split.parts == parts
    assert split.gain == pytest.approx(gain, abs=0.01)


@pytest.mark.parametrize("curve", [SQUARE_ROOT, LOG, LOGISTIC])
def test_the_best_split_is_the_best_of_all(curve: Curve) -> None:
    for times in (1, 2, 3, 7, 25):
        stake = times * MINIMUM
        whole = weight(stake, minimum_micros=MINIMUM, curve=curve)
        gains = [
            parts * weight(stake // parts, minimum_micros=MINIMUM, curve=curve) / whole for parts in range(1, times + 1)
        ]
        assert best_split(stake, minimum_micros=MINIMUM, curve=curve).gain == pytest.approx(max(gains), rel=1e-6)
