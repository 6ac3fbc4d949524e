"""The state folder of a process: made at its start, and owned where two processes would undo each other's work."""

import fcntl
import os
import sys
from pathlib import Path
from typing import NoReturn


def make_state_folder(folder: Path) -> None:
    """Makes the folder where it isn't there. Exits with status 2 where it can't be made or written to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        _refuse(f"{folder} is no folder")
    except OSError as error:
        _refuse(f"{folder} can't be made: {error.strerror}")
    if not os.access(folder, os.W_OK | os.X_OK):
        _refuse(f"{folder} can't be written to")


def own_state_folder(folder: Path, service: str) -> int:
    """Takes the state folder for this process; the kernel gives it back however the process ends.

    Returns the descriptor that holds it. Exits with status 2 when another process has it, or it can't be made.
    """
    make_state_folder(folder)
    descriptor = os.open(folder / "process.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _refuse(f"{folder} is in use by another {service}")
    return descriptor


def _refuse(problem: str) -> NoReturn:
    sys.stderr.write(f"TILTYARD_STATE_DIR: {problem}\n")
    raise SystemExit(2) from None
