"""What a submission's reports amount to: tolerance, dispute, score or fault. Integers only; anyone can recompute it.

One vote a report, since stake has acted in the draw. Reports of a training node's own endpoint never count.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

# The 97.5 % point of the normal distribution.
_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Counts:
    """What a validator counted: 0 <= correct <= total, and how many rows are too close to call."""

    correct: int
    total: int
    ambiguous: int = 0


@dataclass(frozen=True)
class Report:
    """One opened report: either counts, or the name of a fault."""

    validator: str
    counts: Counts | None = None
    fault: str | None = None
    node_endpoint: bool = False

    def __post_init__(self) -> None:
        if (self.counts is None) == (self.fault is None):
            raise ValueError(f"the report of {self.validator} must say either counts or a fault")


class Outcome(StrEnum):
    """What was concluded."""

    SCORED = "SCORED"
    FAULT = "FAULT"
    AMBIGUOUS = "AMBIGUOUS"


@dataclass(frozen=True)
class NeedMore:
    """The reports disagree: call in up to this many more validators before anything is concluded."""

    reserves_wanted: int


@dataclass(frozen=True)
class Conclusion:
    """`correct` and `total` are set with SCORED, `fault` with FAULT; `outliers` are ids in the order of the reports."""

    outcome: Outcome
    tolerance: int
    correct: int = 0
    total: int = 0
    fault: str = ""
    outliers: tuple[str, ...] = ()


def quorum(k: int) -> int:
    """How many of k validators must have reported at least: ceil(2k/3)."""
    return -(-2 * k // 3)


def lower_median(values: Sequence[int]) -> int:
    """The middle value, of two middle ones the lower. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values have no median")
    return sorted(values)[(len(values) - 1) // 2]


def countable(reports: Sequence[Report]) -> list[Report]:
    """The reports that have a vote: those that tie their answers to the committed weights."""
    return [report for report in reports if not report.node_endpoint]


def tolerance(task_tolerance: int, reports: Sequence[Report]) -> int:
    """The largest difference in correct counts that is no dispute: the task's, or the rows too close to call if more.

    Honest CPUs and GPUs may differ on those rows and nowhere else; the lower median of what was reported binds, so that
    a minority cannot widen it.
    """
    ambiguous = [report.counts.ambiguous for report in countable(reports) if report.counts]
    return max(task_tolerance, lower_median(ambiguous)) if ambiguous else task_tolerance


def conclude(reports: Sequence[Report], k: int, task_tolerance: int, disputed: bool) -> NeedMore | Conclusion:
    """What the opened reports of one submission in one round amount to.

    The reports fall into camps: one for each fault that was named, and one of the counts that lie within the tolerance
    of the lower median of all counts. Counts further off are in no camp. A camp with more than half of all votes is
    the majority: the camp of counts gives a score, which is that lower median; the camp of a fault gives the fault;
    without a majority the outcome is AMBIGUOUS and nobody is named. Whoever is not in the majority is an outlier.

    Unless `disputed` (the further validators have been called in, or there are none), reports that are not all in one
    camp ask for 2k+1 more instead. Raises ValueError when fewer than `quorum(k)` reports count.
    """
    votes = countable(reports)
    if len(votes) < quorum(k):
        raise ValueError(f"{len(votes)} reports are fewer than the quorum of {quorum(k)}")
    allowed = tolerance(task_tolerance, votes)
    median = _median_of_counts(votes)
    camp_of = {report.validator: _camp(report, median, allowed) for report in votes}
    sizes = Counter(camp for camp in camp_of.values() if camp is not None)
    camp, size = max(sizes.items(), key=lambda item: item[1], default=(None, 0))
    if size < len(votes) and not disputed:
        return NeedMore(reserves_wanted=2 * k + 1)
    if camp is None or 2 * size <= len(votes):
        return Conclusion(Outcome.AMBIGUOUS, tolerance=allowed)
    outliers = tuple(report.validator for report in votes if camp_of[report.validator] != camp)
    if camp == _COUNTS and median is not None:
        return Conclusion(
            Outcome.SCORED, tolerance=allowed, correct=median.correct, total=median.total, outliers=outliers
        )
    return Conclusion(Outcome.FAULT, tolerance=allowed, fault=camp, outliers=outliers)


# Not a fault's name: those are in upper case.
_COUNTS = "counts"


def _median_of_counts(votes: Sequence[Report]) -> Counts | None:
    counts = sorted((report.counts for report in votes if report.counts), key=lambda count: count.correct)
    return counts[(len(counts) - 1) // 2] if counts else None


def _camp(report: Report, median: Counts | None, allowed: int) -> str | None:
    if report.counts is None or median is None:
        return report.fault
    return _COUNTS if abs(report.counts.correct - median.correct) <= allowed else None


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of correct/total (Wilson 1927), for people: nothing is decided by it.

    Raises ValueError unless 0 <= correct <= total and total is 1 or more.
    """
    if not (0 <= correct <= total and total > 0):
        raise ValueError(f"{correct} of {total} is no proportion")
    share, z2 = correct / total, _Z_95 * _Z_95
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    margin = _Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    low = 0.0 if correct == 0 else max(0.0, centre - margin)
    high = 1.0 if correct == total else min(1.0, centre + margin)
    return low, high
