"""What splitting a stake gains, computed from the curve and measured by draws, with and without one funding account.

`python -m benchmarks.sybil` prints the tables of docs/sybil.md; `--write` puts them there. Seeds are fixed: the same
numbers come out every time.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tiltyard.curves import SQUARE_ROOT, Curve, CurveKind, best_split, weight
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


def measure(curve: Curve, times: int) -> Gain:
    """Draws of one owner group: the stake in one piece, in parts, and in parts with one funding account."""
    stake = times * _MINIMUM
    split = best_split(stake, minimum_micros=_MINIMUM, curve=curve)
    part, left_over = divmod(stake, split.parts)
    parts = [part + (number < left_over) for number in range(split.parts)]
    whole = weight(stake, minimum_micros=_MINIMUM, curve=curve)
    others = [whole] * _OTHERS
    unsplit, unsplit_error = _odds([whole], others, f"{curve} {times} whole")
    apart, apart_error = _odds(
        [weight(each, minimum_micros=_MINIMUM, curve=curve) for each in parts], others, f"{curve} {times} apart"
    )
    # One funding account makes the parts one owner group, whose leaf weighs what their sum weighs.
    together, together_error = _odds(
        [weight(sum(parts), minimum_micros=_MINIMUM, curve=curve)], others, f"{curve} {times} together"
    )
    return Gain(
        times,
        split.parts,
        split.gain,
        apart / unsplit,
        apart / unsplit * (apart_error**2 + unsplit_error**2) ** 0.5,
        together / unsplit,
        together / unsplit * (together_error**2 + unsplit_error**2) ** 0.5,
    )


def _odds(own: list[int], others: list[int], label: str) -> tuple[float, float]:
    """Wins for each win of the others, counted over draws of one, with the relative standard error."""
    tree = SumTree((str(index), value) for index, value in enumerate([*own, *others]))
    won = 0
    for run in range(_DRAWS):
        seed = hashlib.sha256(f"{label} {run}".encode()).digest()
        won += next(islice(draw(seed, tree), 1)).leaf_index < len(own)
    lost = _DRAWS - won
    return won / lost, (1 / won + 1 / lost) ** 0.5


def run() -> list[dict[str, Any]]:
    """For the benchmark's table: measured gains beside the computed ones."""
    return [row for name, curve in _CURVES.items() for times in _IN_BENCH for row in _rows(name, measure(curve, times))]


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
    for name, curve in _CURVES.items():
        yield f"### {name}"
        yield ""
        yield "| stake / minimum | best parts | gain, computed | gain, by draws | one funding account, by draws |"
        yield "|---:|---:|---:|---:|---:|"
        for times in _TIMES:
            gain = measure(curve, times)
            yield (
                f"| {times} | {gain.parts} | {gain.computed:.2f} | {gain.apart:.2f} ± {gain.apart_error:.2f} "
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
