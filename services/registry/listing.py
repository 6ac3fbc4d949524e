"""How a list is asked for: which rows, in which order, beyond which, and how many."""

from dataclasses import dataclass
from typing import Any

Place = tuple[int | str, int]
"""Where a row stands in an ordered list: what it is ordered by as its column keeps it, and its number among equals."""


@dataclass(frozen=True)
class Condition:
    """What a record's field must be. `operator` is = != < <= > or >=; None is different from every value."""

    field: str
    operator: str
    value: Any


@dataclass(frozen=True)
class Listing:
    """One page of a list. Rows that are added or changed meanwhile neither repeat nor hide others."""

    conditions: tuple[Condition, ...] = ()
    order: str = ""
    """The record's field that the list is ordered by; empty for its own numbering."""
    descending: bool = False
    after: Place | None = None
    limit: int | None = None
