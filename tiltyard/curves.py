"""Weight functions of stake: likelihood grows with stake, and each further unit adds less.

Section 6 of the design: with `r = stake / minimum`, `power(alpha)` is r^alpha, `log` is ln(1 + r) and `logistic` is
1 / (1 + exp(-2 (r - 2))), the published rate figure of FLock. A weight is floor(2^32 * curve), where the curve's value
is first rounded to 50 significant decimal digits, half to even, so that any language comes to the same integer.
"""

import decimal
import enum
from dataclasses import dataclass

WEIGHT_SCALE = 2**32
DIGITS = 50

# Twenty guard digits, so that 4^(1/2) comes out as 2 after rounding and not as 1.99...9.
_WORKING = decimal.Context(
    prec=DIGITS + 20,
    rounding=decimal.ROUND_HALF_EVEN,
    Emin=decimal.MIN_EMIN,
    Emax=decimal.MAX_EMAX,
    traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow],
)
_ROUNDED = decimal.Context(prec=DIGITS, rounding=decimal.ROUND_HALF_EVEN)
_EXACT = decimal.Context(prec=200, traps=[decimal.Inexact, decimal.InvalidOperation])


class CurveKind(enum.Enum):
    """The family of a weight function."""

    POWER = "power"
    LOG = "log"
    LOGISTIC = "logistic"


@dataclass(frozen=True)
class Curve:
    """A weight function. `alpha_millis` is the exponent of POWER in thousandths, 1 to 999, and 0 for the others."""

    kind: CurveKind
    alpha_millis: int = 0

    def __post_init__(self) -> None:
        if self.kind is CurveKind.POWER:
            if not 1 <= self.alpha_millis <= 999:
                raise ValueError(f"the exponent of a power curve is 1 to 999 thousandths, not {self.alpha_millis}")
        elif self.alpha_millis != 0:
            raise ValueError(f"{self.kind.value} takes no exponent")


SQUARE_ROOT = Curve(CurveKind.POWER, 500)


def weight(stake_micros: int, *, minimum_micros: int, curve: Curve) -> int:
    """The weight of a stake where `minimum_micros` is the task's minimum, which is 1 or more. Nothing weighs nothing.

    Raises ValueError for a negative stake or a minimum below 1.
    """
    if stake_micros < 0:
        raise ValueError(f"a stake is 0 or more, not {stake_micros}")
    if minimum_micros < 1:
        raise ValueError(f"a minimum stake is 1 or more, not {minimum_micros}")
    if stake_micros == 0:
        return 0
    ratio = _WORKING.divide(decimal.Decimal(stake_micros), decimal.Decimal(minimum_micros))
    value = _ROUNDED.plus(_evaluate(curve, ratio))
    return int(_EXACT.multiply(value, decimal.Decimal(WEIGHT_SCALE)))


@dataclass(frozen=True)
class Split:
    """A stake in `parts` equal parts, and their weight together over that of the whole."""

    parts: int
    gain: float


def best_split(stake_micros: int, *, minimum_micros: int, curve: Curve) -> Split:
    """The number of equal parts, each of the minimum or more, in which a stake would weigh most.

    What is gained so by somebody whose parts nobody knows to belong together. Raises ValueError as `weight` does.
    """
    whole = weight(stake_micros, minimum_micros=minimum_micros, curve=curve)

    def together(parts: int) -> int:
        part, left_over = divmod(stake_micros, parts)
        larger = weight(part + 1, minimum_micros=minimum_micros, curve=curve) if left_over else 0
        return (parts - left_over) * weight(part, minimum_micros=minimum_micros, curve=curve) + left_over * larger

    # The weight of all parts has one top: it grows with their number for power and log, and for the logistic until a
    # part is 2.75 times the minimum.
    low, high = 1, max(1, stake_micros // minimum_micros)
    while high - low > 8:
        third = (high - low) // 3
        if together(low + third) < together(high - third):
            low += third
        else:
            high -= third
    parts = max(range(low, high + 1), key=together)
    gain = together(parts) / whole if whole else 1.0
    return Split(parts, gain) if gain > 1 else Split(1, 1.0)


def _evaluate(curve: Curve, ratio: decimal.Decimal) -> decimal.Decimal:
    match curve.kind:
        case CurveKind.POWER:
            # power() of libmpdec is within one unit of the last of 70 digits; rounding to 50 takes that away.
            return _WORKING.power(ratio, decimal.Decimal(curve.alpha_millis).scaleb(-3))
        case CurveKind.LOG:
            return _WORKING.ln(_WORKING.add(decimal.Decimal(1), ratio))
        case CurveKind.LOGISTIC:
            exponent = _WORKING.multiply(decimal.Decimal(-2), _WORKING.subtract(ratio, decimal.Decimal(2)))
            return _WORKING.divide(decimal.Decimal(1), _WORKING.add(decimal.Decimal(1), _WORKING.exp(exponent)))
