"""Filters of lists: what is read, and where they say what is wrong."""

import pytest

from services.runtime.errors import InvalidArgument
from services.runtime.filters import parse_filter

FIELDS = ("state", "participant")


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", {}),
        ("   ", {}),
        ("state = SCORED", {"state": "SCORED"}),
        ("state=SCORED", {"state": "SCORED"}),
        ('state = "any text, = AND all"', {"state": "any text, = AND all"}),
        ('state = ""', {"state": ""}),
        ("participant = participants/ab AND state = AND", {"participant": "participants/ab", "state": "AND"}),
    ],
)
def test_terms_are_read(text: str, terms: dict[str, str]) -> None:
    assert parse_filter(text, FIELDS) == terms


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("colour = red", "at character 1: expected one of participant, state"),
        ("= red", "at character 1: expected one of participant, state"),
        ("state SCORED", "at character 7: expected ="),
        ("state =", "at character 8: expected a value"),
        ("state = 'SCORED'", "at character 9: expected a value"),
        ('state = "SCORED', "at character 9: expected a value"),
        ("state = A OR state = B", "at character 11: expected AND"),
        ("state = AAND participant = B", "at character 14: expected AND"),
        ("state = A AND", "at character 11: expected AND"),
        ("state = A AND ", "at character 15: expected one of participant, state"),
        ("state = A AND state = B", "at character 15: state comes twice"),
        ('state = "A"AND participant = B', "at character 12: expected AND"),
        ("x" * 1001, "has 1001 characters, at most 1000 are allowed"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_position(text: str, problem: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_filter(text, FIELDS)
    assert [(v.field, v.description) for v in refused.value.violations] == [("filter", problem)]
