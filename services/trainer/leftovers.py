"""Ends every process of a run, also those that have left the child's process group: all inherit one variable.

`python -m services.trainer.leftovers RUN_DIR` does so once its standard input ends: whoever started it is gone.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN_VARIABLE = "TRAINING_RUN"
_PROCESSES = Path("/proc")
_AGAIN_S = 0.01
# A process that the kernel does not let go of is not waited for: it does nothing any more.
_PATIENCE_S = 5.0
_watching: list["subprocess.Popen[bytes]"] = []


def end_processes(folder: Path) -> None:
    """Kills until no process is left whose environment names this run's folder.

    Does nothing where there is no /proc.
    """
    wanted = f"{RUN_VARIABLE}={folder}".encode()
    give_up = time.monotonic() + _PATIENCE_S
    while _kill(wanted) and time.monotonic() < give_up:
        time.sleep(_AGAIN_S)


def end_with_me(folder: Path) -> None:
    """Has every process of the run end once this one has, however it dies: what a library started need not notice."""
    # The pipe is never closed but by the death of this process, and nobody inherits it.
    _watching.append(
        subprocess.Popen(  # noqa: S603 - this interpreter, a module of ours
            [sys.executable, "-m", "services.trainer.leftovers", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
    )


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


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_processes(Path(sys.argv[1]))
