"""How times and weights lie in columns: microseconds since 1970, and 16 bytes big-endian, which sort like numbers."""

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WEIGHT_BYTES = 16


def to_us(time: datetime) -> int:
    """Microseconds since 1970."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def from_us(microseconds: int) -> datetime:
    """A time in UTC."""
    return _EPOCH + timedelta(microseconds=microseconds)


def weight_bytes(weight: int) -> bytes:
    """A weight below 2^128."""
    return weight.to_bytes(_WEIGHT_BYTES, "big")


def weight_of(column: bytes) -> int:
    """The weight in a column."""
    return int.from_bytes(column, "big")
