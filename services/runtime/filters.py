"""The filter and the order of a list, read strictly: a part of AIP-160 (terms joined by AND) and of AIP-132."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from services.runtime.errors import InvalidArgument

_MAX_CHARS = 1000
_FIELD = re.compile(r"[a-z_]+(\.[a-z_]+)*")
_AND = re.compile(r"AND(?= |\Z)")
_OPERATOR = re.compile(r"!=|<=|>=|=|<|>")
_VALUE = re.compile(r'"(?P<quoted>[^"\\]*)"|(?P<bare>[A-Za-z0-9_./:+-]+)')
_SPACE = re.compile(r" *")
_WORD = re.compile(r"[A-Za-z_]+")
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_MICROSECONDS = re.compile(r"[^.]*(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})")

EQUALITY = ("=", "!=")
COMPARISON = ("=", "!=", "<", "<=", ">", ">=")


@dataclass(frozen=True)
class Kind:
    """What a field's values are: how one is read (ValueError says what it must be), and how it may be compared."""

    read: Callable[[str], Any]
    operators: tuple[str, ...] = EQUALITY


@dataclass(frozen=True)
class Term:
    """`field operator value`, the value read."""

    field: str
    operator: str
    value: Any


def words(named: Callable[[str], Any]) -> Kind:
    """One of some words; `named` gives None for another."""

    def read(text: str) -> Any:
        found = named(text)
        if found is None:
            raise ValueError(f"{text[:100]} is not one of its values")
        return found

    return Kind(read)


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ValueError("must be a whole number of at most 18 digits")
    return int(text)


def _time(text: str) -> datetime:
    problem = "must be a time of RFC 3339 to the microsecond at most, as 2026-01-31T12:00:00Z"
    if not _MICROSECONDS.fullmatch(text):
        raise ValueError(problem)
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(problem) from None


TEXT = Kind(str)
NUMBER = Kind(_number, COMPARISON)
TIME = Kind(_time, COMPARISON)


def parse_filter(text: str, fields: Mapping[str, Kind], *, field: str = "filter") -> tuple[Term, ...]:
    """The terms of a filter, none for an empty one.

    A value is a word of letters, digits and `_ . / : + -`, or any text in double quotes. Raises InvalidArgument naming
    the position (from 1) of what cannot be read, of an unknown field, and of an operator or a value that it has not.
    """
    if len(text) > _MAX_CHARS:
        raise InvalidArgument.field(field, f"has {len(text)} characters, at most {_MAX_CHARS} are allowed")

    def wrong(position: int, problem: str) -> InvalidArgument:
        return InvalidArgument.field(field, f"at character {position + 1}: {problem}", reason="INVALID_FILTER")

    terms: list[Term] = []
    position = _after_space(text, 0)
    while position < len(text) or terms:
        name = _FIELD.match(text, position)
        if name is None or name[0] not in fields:
            raise wrong(position, f"expected one of {', '.join(sorted(fields))}")
        kind = fields[name[0]]
        position = _after_space(text, name.end())
        operator = _OPERATOR.match(text, position)
        if operator is None or operator[0] not in kind.operators:
            raise wrong(position, f"expected one of {' '.join(kind.operators)}")
        position = _after_space(text, operator.end())
        value = _VALUE.match(text, position)
        if value is None:
            raise wrong(position, "expected a value")
        try:
            read = kind.read(value["bare"] if value["quoted"] is None else value["quoted"])
        except ValueError as problem:
            raise wrong(position, f"{name[0]} {problem}") from None
        terms.append(Term(name[0], operator[0], read))
        end = _after_space(text, value.end())
        if end == len(text):
            break
        conjunction = _AND.match(text, end)
        if end == value.end() or conjunction is None:
            raise wrong(end, "expected AND")
        position = _after_space(text, conjunction.end())
    return tuple(terms)


def parse_order(text: str, fields: Collection[str], *, default: str) -> tuple[str, bool]:
    """The field that a list is ordered by, and whether from the largest down: `field`, `field asc` or `field desc`.

    An empty text is the `default`. Raises InvalidArgument naming the position of what cannot be read.
    """

    def wrong(position: int, problem: str) -> InvalidArgument:
        description = f"at character {position + 1}: {problem}"
        return InvalidArgument.field("order_by", description, reason="INVALID_ORDER")

    if not text.strip(" "):
        text = default
    position = _after_space(text, 0)
    name = _FIELD.match(text, position)
    if name is None or name[0] not in fields:
        raise wrong(position, f"expected one of {', '.join(sorted(fields))}")
    position = _after_space(text, name.end())
    direction = _WORD.match(text, position)
    if direction is not None and direction[0] in ("asc", "desc") and position > name.end():
        position = _after_space(text, direction.end())
    else:
        direction = None
    if position < len(text):
        raise wrong(position, "expected asc, desc or the end")
    return name[0], direction is not None and direction[0] == "desc"


def _after_space(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    return space.end() if space else position
