"""What a model server reads beside its own folder: Python, its packages, shared libraries, and what the kernel tells.

A list of what is allowed, since the kernel (Landlock) knows no other. What is not on it, a key or a dataset, stays
unread wherever it lies.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# None of them tells of anything but the machine.
_OF_THE_SYSTEM = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64", "/etc/ld.so.cache"),
    *("/usr/share/zoneinfo", "/etc/localtime", "/dev/urandom", "/dev/random", "/sys/devices", "/sys/fs/cgroup"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/net/core/somaxconn"),
)
_OF_PYTHON = ("stdlib", "platstdlib", "purelib", "platlib")
_PACKAGES = ("site-packages", "dist-packages")
_MODULES = (".py", ".pyc", ".so")
# What packages lay beside themselves.
_BESIDE = (".libs", ".dist-info", ".egg-info")


def readable() -> list[str]:
    """Files, and folders with all that is beneath them, for the modules that this process has and may import."""
    found = {Path(path) for path in _OF_THE_SYSTEM}
    found |= {Path(sysconfig.get_path(name)) for name in _OF_PYTHON}
    found |= {Path(prefix, name) for prefix in (sys.prefix, sys.base_prefix) for name in ("lib", "lib64")}
    for entry in sys.path:
        found |= set(_importable(Path(entry)))
    for name, module in list(sys.modules.items()):
        if "." not in name:
            # An editable one lies on no path.
            found |= {Path(folder) for folder in getattr(module, "__path__", ())}
    for entry in filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")):
        found |= set(Path(entry).glob("*.so*"))
    found = {path.absolute() for path in found}
    return sorted(str(path) for path in found if found.isdisjoint(path.parents) and os.path.exists(path))


def library_around(path: Path) -> str | None:
    """The one of `readable` that a path lies in, which model servers read with all beneath it; None if there is none.

    As the kernel does, it goes by where links lead.
    """
    resolved = path.resolve()
    return next((each for each in readable() if resolved.is_relative_to(Path(each).resolve())), None)


def _importable(entry: Path) -> Iterator[Path]:
    """What is to import from an entry of sys.path: of the working directory, say, not all that lies there."""
    if entry.name in _PACKAGES or os.path.isfile(entry):
        yield entry
        return
    try:
        inside = list(entry.iterdir())
    except OSError:
        return
    for path in inside:
        suffixes = _BESIDE if os.path.isdir(path) else _MODULES
        if path.suffix in suffixes or os.path.exists(path / "__init__.py"):
            yield path
