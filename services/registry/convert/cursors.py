"""Cursors of the streams that follow a task: its revision, in decimal."""

import re

from services.runtime.errors import InvalidArgument

_CURSOR = re.compile(r"0|[1-9][0-9]{0,17}")


def revision_of(cursor: str) -> int | None:
    """The revision last seen, None for none."""
    if not cursor:
        return None
    if not _CURSOR.fullmatch(cursor):
        raise InvalidArgument.field("cursor", "is not a cursor of this stream")
    return int(cursor)
