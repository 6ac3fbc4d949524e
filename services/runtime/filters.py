"""The filter of a list: terms `field = value` joined by AND, read strictly (a small part of AIP-160)."""

import re
from collections.abc import Collection, Mapping

from services.runtime.errors import InvalidArgument

_MAX_CHARS = 1000
_FIELD = re.compile(r"[a-z_]+(\.[a-z_]+)*")
_VALUE = re.compile(r'"(?P<quoted>[^"\\]*)"|(?P<bare>[A-Za-z0-9_./-]+)')
_SPACE = re.compile(r" *")


def parse_filter(text: str, fields: Collection[str], *, field: str = "filter") -> Mapping[str, str]:
    """The value that each named field must have; empty for an empty filter.

    A value is a word of letters, digits and `_ . / -`, or any text in double quotes. Raises InvalidArgument naming
    the position (from 1) of what cannot be read, of an unknown field, or of a field that comes twice.
    """
    if len(text) > _MAX_CHARS:
        raise InvalidArgument.field(field, f"has {len(text)} characters, at most {_MAX_CHARS} are allowed")

    def wrong(position: int, problem: str) -> InvalidArgument:
        return InvalidArgument.field(field, f"at character {position + 1}: {problem}", reason="INVALID_FILTER")

    def skip(position: int) -> int:
        space = _SPACE.match(text, position)
        return space.end() if space else position

    terms: dict[str, str] = {}
    position = skip(0)
    while position < len(text) or terms:
        name = _FIELD.match(text, position)
        if name is None or name[0] not in fields:
            raise wrong(position, f"expected one of {', '.join(sorted(fields))}")
        if name[0] in terms:
            raise wrong(position, f"{name[0]} comes twice")
        position = skip(name.end())
        if not text.startswith("=", position):
            raise wrong(position, "expected =")
        position = skip(position + 1)
        value = _VALUE.match(text, position)
        if value is None:
            raise wrong(position, "expected a value")
        terms[name[0]] = value["bare"] if value["quoted"] is None else value["quoted"]
        end = skip(value.end())
        if end == len(text):
            break
        if end == value.end() or not text.startswith("AND ", end):
            raise wrong(end, "expected AND")
        position = skip(end + 4)
    return terms
