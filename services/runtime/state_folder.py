"""One process for one state folder, where two of them would undo each other's work."""

import fcntl
import os
import sys
from pathlib import Path


def own_state_folder(folder: Path, service: str) -> int:
    """Takes the state folder for this process; the kernel gives it back however the process ends.

    Returns the descriptor that holds it. Exits with status 2 when another process has it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / "process.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.stderr.write(f"TILTYARD_STATE_DIR: {folder} is in use by another {service}\n")
        raise SystemExit(2) from None
    return descriptor
