"""What a process takes of its machine, as the kernel tells it."""

import os
from pathlib import Path

from tiltyard.telemetry import metrics

_MEMORY = metrics.Gauge("process.memory.usage", unit="By", description="Physical memory in use.")
_FILES = metrics.Gauge("process.open_file_descriptor.count", unit="{count}", description="File descriptors in use.")
_DISK = metrics.Gauge("system.filesystem.usage", unit="By", description="The file system of the state folder.")
_STATE = "system.filesystem.state"

_PROC = Path("/proc/self")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def follow() -> None:
    """Tells both whenever metrics are collected, where there is a /proc to read them from."""
    if (_PROC / "statm").exists():
        _MEMORY.follow(lambda: {(): int((_PROC / "statm").read_text().split()[1]) * _PAGE_BYTES})
        _FILES.follow(lambda: {(): len(os.listdir(_PROC / "fd"))})


def follow_disk(folder: Path) -> None:
    """Tells what is used and what is free for this process where `folder` lies."""

    def usage() -> dict[metrics.Key, float]:
        try:
            disk = os.statvfs(folder)
        except OSError:
            return {}  # it is not there, or not mounted just now; the other numbers are told all the same
        used, free = disk.f_blocks - disk.f_bfree, disk.f_bavail
        return {((_STATE, "used"),): used * disk.f_frsize, ((_STATE, "free"),): free * disk.f_frsize}

    _DISK.follow(usage)
