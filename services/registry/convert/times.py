"""Times and durations between datetime and the contract, to the microsecond."""

from datetime import UTC, datetime, timedelta
from typing import overload

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def micros_of(moment: datetime) -> int:
    """Microseconds since the Unix epoch."""
    return (moment - EPOCH) // MICROSECOND


def moment_of(micros: int) -> datetime:
    """The moment so many microseconds after the Unix epoch, UTC."""
    return EPOCH + timedelta(microseconds=micros)


@overload
def timestamp(moment: datetime) -> Timestamp: ...
@overload
def timestamp(moment: None) -> None: ...
def timestamp(moment: datetime | None) -> Timestamp | None:
    """The contract's timestamp; None leaves a field unset."""
    if moment is None:
        return None
    seconds, micros = divmod(micros_of(moment), 1_000_000)
    return Timestamp(seconds=seconds, nanos=micros * 1000)


def moment(message: Timestamp) -> datetime:
    """The moment, nanoseconds cut off. Raises OverflowError or ValueError beyond the year 9999."""
    return EPOCH + timedelta(seconds=message.seconds, microseconds=message.nanos // 1000)


def duration(span: timedelta) -> Duration:
    """The contract's duration."""
    seconds, rest = divmod(span, timedelta(seconds=1))
    return Duration(seconds=seconds, nanos=rest // MICROSECOND * 1000)


def span(message: Duration) -> timedelta:
    """The length of time, nanoseconds cut off. Raises OverflowError beyond timedelta's range."""
    return timedelta(seconds=message.seconds, microseconds=message.nanos // 1000)
