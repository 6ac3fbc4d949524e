"""How much memory this process may use, and what of it is never looked through for cycles that nobody needs."""

import gc
import os
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def keep_what_is_loaded() -> None:
    """Has the collector of cycles pass over all objects that there are by now.

    For the end of a start: modules and messages' classes stay as long as the process does, and to look through them
    again and again takes a server some two percent of its time. To come more seldom, too, would gain nothing more.
    """
    gc.collect()
    gc.freeze()


def memory_bytes(*, membership: Path = _MEMBERSHIP, groups: Path = _GROUPS) -> int:
    """The machine's memory, or the lowest limit of the control groups around this process (cgroups(7), 1 and 2)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            limits += _limits_around(groups, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_around(groups / "memory", path, "memory.limit_in_bytes")
    return min(limits)


def _limits_around(root: Path, path: str, name: str) -> list[int]:
    """The limits of a group and of all that it lies in; a container sees its own group as the root."""
    group = root / path.lstrip("/")
    found = []
    for folder in (group, *group.parents):
        if folder.is_relative_to(root) and (folder / name).is_file():
            text = (folder / name).read_text().strip()
            if text != "max":
                found.append(int(text))
    return found
