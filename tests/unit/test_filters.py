"""Filters of lists: what is read, and where they say what is wrong."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from services.runtime.errors import InvalidArgument
from services.runtime.filters import NUMBER, TEXT, TIME, Term, parse_filter, words

FIELDS = {
    "state": words({"SCORED": 1, "AND": 2}.get),
    "name": TEXT,
    "size": NUMBER,
    "time": TIME,
}
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", []),
        ("   ", []),
        ("state = SCORED", [("state", "=", 1)]),
        ("state!=SCORED", [("state", "!=", 1)]),
        ('name = "any text, = AND all"', [("name", "=", "any text, = AND all")]),
        ('name = ""', [("name", "=", "")]),
        ("name = participants/ab AND state = AND", [("name", "=", "participants/ab"), ("state", "=", 2)]),
        ("size>=-12 AND size < 3", [("size", ">=", -12), ("size", "<", 3)]),
        ("time <= 2026-01-31T12:00:00Z", [("time", "<=", NOON)]),
        ("time > 2026-01-31T13:00:00.000001+01:00", [("time", ">", NOON + timedelta(microseconds=1))]),
    ],
)
def test_terms_are_read(text: str, terms: list[tuple[str, str, Any]]) -> None:
    assert parse_filter(text, FIELDS) == tuple(Term(*term) for term in terms)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("colour = red", "at character 1: expected one of name, size, state, time"),
        ("= red", "at character 1: expected one of name, size, state, time"),
        ("state SCORED", "at character 7: expected one of = !="),
        ("state < SCORED", "at character 7: expected one of = !="),
        ("name : x", "at character 6: expected one of = !="),
        ("size ~ 3", "at character 6: expected one of = != < <= > >="),
        ("size == 3", "at character 7: expected a value"),
        ("state =", "at character 8: expected a value"),
        ("state = 'SCORED'", "at character 9: expected a value"),
        ('state = "SCORED', "at character 9: expected a value"),
        ("state = NOWHERE", "at character 9: state NOWHERE is not one of its values"),
        ("size = 1.5", "at character 8: size must be a whole number of at most 18 digits"),
        ("size = 1234567890123456789", "at character 8: size must be a whole number of at most 18 digits"),
        ("name = A OR name = B", "at character 10: expected AND"),
        ("name = AAND name = B", "at character 13: expected AND"),
        ("name = A AND", "at character 13: expected one of name, size, state, time"),
        ("name = A AND ", "at character 14: expected one of name, size, state, time"),
        ('name = "A"AND name = B', "at character 11: expected AND"),
        ("x" * 1001, "has 1001 characters, at most 1000 are allowed"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_position(text: str, problem: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_filter(text, FIELDS)
    assert [(v.field, v.description) for v in refused.value.violations] == [("filter", problem)]


@pytest.mark.parametrize(
    "time",
    ["2026-01-31", "2026-01-31T12:00:00", "2026-01-31T12:00:00.0000001Z", "2026-02-31T12:00:00Z", "noon", "1-1Z"],
)
def test_a_time_needs_its_zone_and_has_microseconds_at_most(time: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_filter(f"time = {time}", FIELDS)
    assert refused.value.violations[0].description.startswith("at character 8: time must be a time of RFC 3339")
