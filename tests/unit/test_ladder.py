"""The Ladder's rule, and what an attacker gains against it and against scores that are shown in full."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltyard.ladder import climbed, rounded, shown

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "ladder.json").read_text())["cases"]
MICROS = 1_000_000

steps = st.integers(1, MICROS)
scores = st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
def test_vectors(case: dict[str, Any]) -> None:
    best = None
    for correct, expected in zip(case["correct"], case["best"], strict=True):
        moved = climbed(best, correct, case["total"], case["step_micros"])
        best = best if moved is None else moved
        assert best == expected
    assert shown(best or 0, case["total"], case["step_micros"]) == case["shown"]


@given(scores, steps)
def test_what_is_rounded_is_off_by_half_a_step_at_most(score: tuple[int, int], step: int) -> None:
    correct, total = score
    off = Fraction(rounded(correct, total, step) * step, MICROS) - Fraction(correct, total)
    assert -Fraction(step, 2 * MICROS) < off <= Fraction(step, 2 * MICROS)


@given(scores, steps, st.integers(0, 100))
def test_the_best_moves_only_when_beaten_by_more_than_a_step(score: tuple[int, int], step: int, best: int) -> None:
    correct, total = score
    moved = climbed(best, correct, total, step)
    beaten = Fraction(correct, total) > Fraction((best + 1) * step, MICROS)
    assert (moved is not None) == beaten
    assert moved is None or moved > best
    assert climbed(None, correct, total, step) == rounded(correct, total, step)


@given(st.integers(0, 200), st.integers(1, 10_000), steps)
def test_what_is_shown_is_a_count_of_rows_and_follows_from_the_steps_alone(best: int, total: int, step: int) -> None:
    rows = shown(best, total, step)
    assert 0 <= rows <= total
    exact = min(Fraction(total), Fraction(best * step * total, MICROS))
    assert abs(rows - exact) <= Fraction(1, 2)


@pytest.mark.parametrize(
    ("correct", "total", "step"), [(-1, 9, 1), (10, 9, 1), (0, 0, 1), (1, 9, 0), (1, 9, MICROS + 1)]
)
def test_what_is_no_score_or_step_is_refused(correct: int, total: int, step: int) -> None:
    with pytest.raises(ValueError, match=r"proportion|step"):
        climbed(0, correct, total, step)


# The boosting attack that Blum and Hardt show: guess at random, and let the guesses vote by how far each scored from
# chance. It needs to know the guesses row by row, so here the attacker has the rows and lacks their labels only.

ROWS, HOLDOUT_ROWS, SUBMISSIONS = 1_000, 4_000, 1_000


class Full:
    """Every score, exact."""

    def __call__(self, correct: int) -> int | None:
        return correct


class Ladder:
    """The public best, in rows, each time."""

    def __init__(self, step_micros: int) -> None:
        self._step_micros = step_micros
        self.best: int | None = None

    def __call__(self, correct: int) -> int | None:
        moved = climbed(self.best, correct, ROWS, self._step_micros)
        self.best = self.best if moved is None else moved
        return None if moved is None else shown(moved, ROWS, self._step_micros)


def attack(answer: Callable[[int], int | None], seed: int) -> tuple[float, float]:
    """Accuracy on the public set and on the holdout of what the attacker ends with."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, ROWS + HOLDOUT_ROWS)
    vote = np.zeros(ROWS + HOLDOUT_ROWS)
    for _ in range(SUBMISSIONS):
        guess = rng.integers(0, 2, ROWS + HOLDOUT_ROWS)
        told = answer(int((guess[:ROWS] == labels[:ROWS]).sum()))
        if told is not None:
            vote += (told - ROWS // 2) * (2 * guess - 1)
    final = np.where(vote == 0, rng.integers(0, 2, ROWS + HOLDOUT_ROWS), vote > 0)
    right = final == labels
    return float(right[:ROWS].mean()), float(right[ROWS:].mean())


def test_an_adaptive_attacker_overfits_full_scores_and_gains_next_to_nothing_by_the_ladder() -> None:
    full = np.array([attack(Full(), seed) for seed in range(3)])
    ladder = np.array([attack(Ladder(10_000), seed) for seed in range(3)])
    # There is nothing to learn: the truth is 0.5 on both sets. FULL gives the public set away.
    assert full[:, 0].min() > 0.8
    assert ladder[:, 0].max() < 0.6
    # The holdout is not fooled by either.
    assert np.abs(full[:, 1] - 0.5).max() < 0.03
    assert np.abs(ladder[:, 1] - 0.5).max() < 0.03


def test_many_nodes_of_one_attacker_are_many_ladders() -> None:
    """What docs/ladder.md says is not proved: every node has a ladder of its own, whose first rung shows its score."""
    one = attack(Ladder(10_000), 7)[0]
    ladders = iter([Ladder(10_000) for _ in range(SUBMISSIONS)])
    many = attack(lambda correct: next(ladders)(correct), 7)[0]
    assert many > one + 0.2
