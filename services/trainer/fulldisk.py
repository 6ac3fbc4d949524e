"""A full disk pauses a run: what was to be written is tried again until there is room."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

RETRY_S = 2.0
RESUMED = "the disk has room again: the run goes on"
# Of the room that did not suffice: a log that was rotated is no reason to read a source of many gigabytes again.
_WORTH_A_TRY = 64
_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the share of it that this user has, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def described(error: OSError) -> str:
    """What a full disk is said to be."""
    return f"the disk is full ({error.strerror})"


def paused(trouble: str) -> str:
    """What is said of a run that waits for room."""
    return f"paused: {trouble}; the run goes on when there is room"


def make_folder_with_room(folder: Path, size: int) -> None:
    """Makes a folder anew, where its disk takes so many bytes; they are gone again at the end. Raises OSError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    probe = folder / "room"
    try:
        probe.write_bytes(bytes(size))
    finally:
        probe.unlink(missing_ok=True)


class Room:
    """Does work that fills a disk, and not again before the disk has more room than the last attempt began with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._too_little_bytes = -1

    def attempt(self, work: Callable[[], None]) -> None:
        """Raises OSError, as `work` does or because it would again; nothing was done then."""
        found = shutil.disk_usage(self._folder).free
        if found <= self._too_little_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            work()
        except OSError as error:
            if error.errno == errno.ENOSPC:  # a quota does not show in what is free
                self._too_little_bytes = found + found // _WORTH_A_TRY
            raise


def write_when_there_is_room(
    write: Callable[[], None], *, warn: Callable[[str], None], wait: Callable[[float], bool]
) -> bool:
    """Calls `write` until the disk takes it; False when `wait` answers that it was told to stop meanwhile.

    Says once that the run is paused and once that it goes on. Raises OSError for any other trouble.
    """
    waiting = False
    while True:
        try:
            write()
        except OSError as error:
            if not is_full(error):
                raise
            if not waiting:
                warn(paused(described(error)))
            waiting = True
            if wait(RETRY_S):
                return False
        else:
            if waiting:
                warn(RESUMED)
            return True
