"""Dataclasses back from the JSON that they were written down as; what a person or a disk has changed is refused."""

from dataclasses import fields
from enum import StrEnum
from typing import Any, TypeVar, get_args

T = TypeVar("T")

_LEAST, _MOST = -(1 << 63), (1 << 63) - 1


def from_fields(kind: type[T], value: object) -> T:
    """The dataclass whose fields, by name, are in a JSON object: numbers, booleans, words of a StrEnum, tuples of them.

    Raises TypeError and ValueError for what is of another form, and for integers of more than 64 bits.
    """
    if not isinstance(value, dict):
        raise TypeError(f"must be an object, is {type(value).__name__}")
    types = _types(kind)
    return kind(**{name: _of(types[name], name, each) if name in types else each for name, each in value.items()})


def _types(kind: type[Any]) -> dict[str, Any]:
    return {field.name: field.type for field in fields(kind)}


def _of(kind: Any, name: str, value: object) -> object:
    if element := get_args(kind):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list, is {type(value).__name__}")
        return tuple(_of(element[0], name, each) for each in value)
    if issubclass(kind, StrEnum):
        return kind(value)
    if type(value) is int and not _LEAST <= value <= _MOST:
        raise ValueError(f"{name} has more than 64 bits")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{name} must be {kind.__name__}, is {type(value).__name__}")
    return value
