"""docs/sybil.md says what the curves give."""

import re
from pathlib import Path

from tiltyard.curves import SQUARE_ROOT, Curve, CurveKind, best_split

DOC = (Path(__file__).parents[2] / "docs" / "sybil.md").read_text()
CURVES = {
    "power(1/2)": SQUARE_ROOT,
    "power(1/4)": Curve(CurveKind.POWER, 250),
    "power(3/4)": Curve(CurveKind.POWER, 750),
    "log": Curve(CurveKind.LOG),
    "logistic": Curve(CurveKind.LOGISTIC),
}
NUMBERS = re.compile(
    r"^\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) ± ([\d.]+) \| ([\d.]+) ± ([\d.]+) \|$",
    re.MULTILINE,
)


def test_every_number_of_the_tables_is_what_the_curve_gives() -> None:
    sections = DOC.split("\n### ")[1:]
    assert [section.partition("\n")[0] for section in sections] == list(CURVES)
    for section in sections:
        curve = CURVES[section.partition("\n")[0]]
        rows = NUMBERS.findall(section)
        assert [int(row[0]) for row in rows] == [2, 3, 5, 10, 20, 50, 100, 200, 500, 1000]
        for times, parts, computed, apart, apart_error, together, together_error in rows:
            split = best_split(int(times) * 1_000_000, minimum_micros=1_000_000, curve=curve)
            assert (int(parts), computed) == (split.parts, f"{split.gain:.2f}")
            # A measured gain is where it ought to be, and in one owner group there is none.
            assert abs(float(apart) - split.gain) < 4 * float(apart_error) + 0.01
            assert abs(float(together) - 1) < 4 * float(together_error) + 0.01
