"""Times and spans of time between the contract and the domain."""

from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

# Far enough for every task, near enough that adding rate windows stays within the calendar.
LAST_SECOND = 2**33
MAX_NANOS = 999_999_999


def timestamp(time: datetime) -> Timestamp:
    """A time to the microsecond."""
    converted = Timestamp()
    converted.FromDatetime(time)
    return converted


def duration(span: timedelta) -> Duration:
    """A span to the microsecond."""
    converted = Duration()
    converted.FromTimedelta(span)
    return converted


def to_datetime(time: Timestamp) -> datetime:
    """A time cut to the microsecond; seconds are known to lie in [0, LAST_SECOND], nanoseconds in [0, MAX_NANOS]."""
    return datetime.fromtimestamp(time.seconds, UTC) + timedelta(microseconds=time.nanos // 1000)
