"""What a process takes of its machine, as the kernel tells it."""

import os
from collections.abc import Sequence
from pathlib import Path

from tiltyard.telemetry import metrics

_MEMORY = metrics.Gauge("process.memory.usage", unit="By", description="Physical memory in use.")
_FILES = metrics.Gauge("process.open_file_descriptor.count", unit="{count}", description="File descriptors in use.")
_DISK = metrics.Gauge("system.filesystem.usage", unit="By", description="The file systems that are written to.")
_MOUNTPOINT, _STATE = "system.filesystem.mountpoint", "system.filesystem.state"

_PROC = Path("/proc/self")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def follow() -> None:
    """Tells both whenever metrics are collected, where there is a /proc to read them from."""
    if (_PROC / "statm").exists():
        _MEMORY.follow(lambda: {(): int((_PROC / "statm").read_text().split()[1]) * _PAGE_BYTES})
        _FILES.follow(lambda: {(): len(os.listdir(_PROC / "fd"))})


def follow_disks(folders: Sequence[Path]) -> None:
    """Tells what is used and what is free for this process where the folders lie, of each file system once."""

    def usage() -> dict[metrics.Key, float]:
        told: dict[metrics.Key, float] = {}
        for folder in folders:
            try:
                disk = os.statvfs(folder)
            except OSError:
                continue  # it is not there, or not mounted just now; the other numbers are told all the same
            mount = (_MOUNTPOINT, _mountpoint(folder))
            for state, blocks in (("used", disk.f_blocks - disk.f_bfree), ("free", disk.f_bavail)):
                told[(mount, (_STATE, state))] = blocks * disk.f_frsize
        return told

    _DISK.follow(usage)


def _mountpoint(folder: Path) -> str:
    at = folder.resolve()
    return str(next(each for each in (at, *at.parents) if os.path.ismount(each)))
