"""A full disk pauses a run: what was to be written is tried again until there is room."""

import errno
from collections.abc import Callable

RETRY_S = 2.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_when_there_is_room(
    write: Callable[[], None], *, warn: Callable[[str], None], wait: Callable[[float], bool]
) -> bool:
    """Calls `write` until the disk takes it; False when `wait` answers that it was told to stop meanwhile.

    Says once that the run is paused and once that it goes on. Raises OSError for any other trouble.
    """
    paused = False
    while True:
        try:
            write()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not paused:
                warn(f"paused: the disk is full ({error.strerror}); the run goes on when there is room")
            paused = True
            if wait(RETRY_S):
                return False
        else:
            if paused:
                warn("the disk has room again: the run goes on")
            return True
