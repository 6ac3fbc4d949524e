"""What reports amount to, by vectors and by properties."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltyard.scoring import (
    Conclusion,
    Counts,
    NeedMore,
    Outcome,
    Report,
    conclude,
    lower_median,
    quorum,
    tolerance,
    wilson_interval,
)

TOTAL = 100
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "scoring.json").read_text())["cases"]
FAULTS = ("NAN_OUTPUT", "BAD_FORMAT", "SHAPE_MISMATCH", "TOO_SLOW", "OUT_OF_MEMORY", "CRASHED")


def read_report(fields: dict[str, Any]) -> Report:
    counts = None
    if "correct" in fields:
        counts = Counts(fields["correct"], fields["total"], fields["ambiguous"])
    return Report(fields["validator"], counts, fields.get("fault"), fields.get("node_endpoint", False))


def read_result(fields: dict[str, Any]) -> NeedMore | Conclusion:
    if "reserves_wanted" in fields:
        return NeedMore(**fields)
    return Conclusion(**{**fields, "outcome": Outcome(fields["outcome"]), "outliers": tuple(fields["outliers"])})


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
def test_vectors(case: dict[str, Any]) -> None:
    reports = [read_report(fields) for fields in case["reports"]]
    found = conclude(reports, case["k"], case["task_tolerance"], case["disputed"])
    assert found == read_result(case["expected"])


@pytest.mark.parametrize(("k", "expected"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 4), (6, 4), (99, 66)])
def test_quorum_is_two_thirds_rounded_up(k: int, expected: int) -> None:
    assert quorum(k) == expected


def test_lower_median_takes_the_lower_of_two_middle_values() -> None:
    assert lower_median([4, 1, 3, 2]) == 2
    assert lower_median([5, 1, 3]) == 3
    with pytest.raises(ValueError, match="no values"):
        lower_median([])


def test_fewer_than_the_quorum_conclude_nothing() -> None:
    votes = [Report("a", Counts(1, 2)), Report("b", Counts(1, 2), node_endpoint=True)]
    with pytest.raises(ValueError, match="quorum of 2"):
        conclude(votes, 3, 0, disputed=True)


def test_a_report_says_counts_or_a_fault() -> None:
    with pytest.raises(ValueError, match="either"):
        Report("a")
    with pytest.raises(ValueError, match="either"):
        Report("a", Counts(1, 2), "CRASHED")


def reports_strategy(minimum: int) -> st.SearchStrategy[list[Report]]:
    counts = st.builds(Counts, st.integers(0, TOTAL), st.just(TOTAL), st.integers(0, 5))
    finding = st.one_of(st.tuples(counts, st.none()), st.tuples(st.none(), st.sampled_from(FAULTS)))
    return st.lists(finding, min_size=minimum, max_size=12).map(
        lambda found: [Report(f"v{index}", *pair) for index, pair in enumerate(found)]
    )


@given(reports_strategy(3), st.integers(0, 20), st.randoms(use_true_random=False))
def test_the_order_of_reports_decides_nothing(reports: list[Report], allowed: int, random: Any) -> None:
    shuffled = list(reports)
    random.shuffle(shuffled)
    one, other = (conclude(order, 3, allowed, disputed=True) for order in (reports, shuffled))
    assert isinstance(one, Conclusion)
    assert isinstance(other, Conclusion)
    assert (one.outcome, one.correct, one.fault, set(one.outliers)) == (
        other.outcome,
        other.correct,
        other.fault,
        set(other.outliers),
    )


@given(reports_strategy(3), st.integers(0, 20))
def test_a_score_is_some_validators_count_and_outliers_are_fewer_than_half(reports: list[Report], allowed: int) -> None:
    found = conclude(reports, 3, allowed, disputed=True)
    assert isinstance(found, Conclusion)
    assert 2 * len(found.outliers) < len(reports)
    if found.outcome is Outcome.SCORED:
        assert found.correct in {report.counts.correct for report in reports if report.counts}
        agreed = [report for report in reports if report.validator not in found.outliers]
        assert all(r.counts and abs(r.counts.correct - found.correct) <= found.tolerance for r in agreed)
    else:
        assert (found.correct, found.total) == (0, 0)


@given(st.integers(0, TOTAL), st.integers(2, 7), reports_strategy(0))
def test_a_minority_cannot_move_an_honest_score(honest: int, size: int, liars: list[Report]) -> None:
    votes = [Report(f"h{index}", Counts(honest, TOTAL)) for index in range(size)]
    found = conclude(votes + liars[: size - 1], 3, 0, disputed=True)
    assert isinstance(found, Conclusion)
    assert (found.outcome, found.correct, found.tolerance) == (Outcome.SCORED, honest, 0)
    assert not any(name.startswith("h") for name in found.outliers)


@given(reports_strategy(3), st.integers(0, 20))
def test_only_disagreement_calls_in_reserves(reports: list[Report], allowed: int) -> None:
    first, last = conclude(reports, 3, allowed, disputed=False), conclude(reports, 3, allowed, disputed=True)
    assert isinstance(last, Conclusion)
    agreed = last.outcome is not Outcome.AMBIGUOUS and not last.outliers
    assert first == (last if agreed else NeedMore(7))


@given(reports_strategy(1), st.integers(0, 20))
def test_tolerance_is_never_below_the_tasks(reports: list[Report], allowed: int) -> None:
    assert tolerance(allowed, reports) >= allowed


def test_wilson_interval_of_published_values() -> None:
    # Newcombe 1998, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_of_no_proportion(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(correct, total)
