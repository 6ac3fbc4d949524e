"""What stake is taken away for, and how much of it: fixed, the same for everybody, and no caller's choice."""

import enum
from collections.abc import Mapping
from types import MappingProxyType


class Fault(enum.Enum):
    """A fault that the record shows. It costs a share of all stake that its maker has when it is slashed."""

    SEAL_MISSING = "seal_missing"
    """A validator accepted an assignment and committed no seal in time."""
    SEAL_NOT_OPENED = "seal_not_opened"
    """A validator committed a seal and did not open it in time."""
    REPORT_OUTSIDE_TOLERANCE = "report_outside_tolerance"
    """A validator's report was named as one outside of the tolerance, reserves heard."""
    CONTRADICTION = "contradiction"
    """A participant signed two statements of which one must be false."""


COST_MILLIS: Mapping[Fault, int] = MappingProxyType(
    {
        Fault.SEAL_MISSING: 1,
        Fault.SEAL_NOT_OPENED: 10,
        Fault.REPORT_OUTSIDE_TOLERANCE: 50,
        Fault.CONTRADICTION: 1000,
    }
)
"""Thousandths of available, locked and unbonding stake together."""


def cost_micros(fault: Fault, *, stake_micros: int) -> int:
    """What a fault costs somebody with this much stake, in micro-units: rounded up, so that no stake is too small."""
    return -(-stake_micros * COST_MILLIS[fault] // 1000)
