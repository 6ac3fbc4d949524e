"""Ends every process of a run, also those that have left the child's process group: all inherit one variable."""

import os
import signal
import time
from pathlib import Path

RUN_VARIABLE = "TRAINING_RUN"
_PROCESSES = Path("/proc")
_AGAIN_S = 0.01
# A process that the kernel does not let go of is not waited for: it does nothing any more.
_PATIENCE_S = 5.0


def end_processes(folder: Path) -> None:
    """Kills until no process is left whose environment names this run's folder.

    Does nothing where there is no /proc.
    """
    wanted = f"{RUN_VARIABLE}={folder}".encode()
    give_up = time.monotonic() + _PATIENCE_S
    while _kill(wanted) and time.monotonic() < give_up:
        time.sleep(_AGAIN_S)


def _kill(wanted: bytes) -> int:
    """Kills whoever has `wanted` in its environment; how many they were."""
    if not _PROCESSES.is_dir():
        return 0
    found = 0
    for entry in _PROCESSES.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            process = os.pidfd_open(int(entry.name))
        except OSError:
            continue  # it has ended
        try:
            # Read while the process is held: its number cannot have become another's.
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                found += 1
        except OSError:
            continue  # another user's, or it has ended meanwhile
        finally:
            os.close(process)
    return found
