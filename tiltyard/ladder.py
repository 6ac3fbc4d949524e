"""The Ladder (Blum and Hardt 2015): what a node learns of its scores while a task is open. Integers only.

The public best of a node is a multiple of the task's step. A score moves it only when it is better by more than a step,
and then to the multiple that is nearest to the score. docs/ladder.md says what follows from that and what does not.
"""

_MICROS = 1_000_000


def rounded(correct: int, total: int, step_micros: int) -> int:
    """correct/total in whole steps of `step_micros` millionths: the nearest, of two equally near the upper.

    Raises ValueError unless 0 <= correct <= total, 1 <= total and 1 <= step_micros <= 1,000,000.
    """
    _check(correct, total, step_micros)
    return (2 * correct * _MICROS + step_micros * total) // (2 * step_micros * total)


def climbed(best: int | None, correct: int, total: int, step_micros: int) -> int | None:
    """The public best in steps after this score, or None where it stays as it was; `best` None is before any score.

    Raises ValueError as `rounded` does.
    """
    _check(correct, total, step_micros)
    if best is not None and correct * _MICROS <= (best + 1) * step_micros * total:
        return None
    return rounded(correct, total, step_micros)


def shown(best: int, total: int, step_micros: int) -> int:
    """A public best in rows of `total`: the nearest whole number of rows, never more than there are."""
    return min(total, (2 * best * step_micros * total + _MICROS) // (2 * _MICROS))


def _check(correct: int, total: int, step_micros: int) -> None:
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} is no proportion")
    if not 1 <= step_micros <= _MICROS:
        raise ValueError(f"a step is 1 to {_MICROS} millionths, not {step_micros}")
