"""The memory that a process may use, by what the kernel says of its control groups, and what of it is collected."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.runtime.memory import memory_bytes

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GIB = 1 << 30


def groups(folder: Path, limits: dict[str, str]) -> Path:
    for path, limit in limits.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"{limit}\n")
    return folder


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/\n", {}, MACHINE),
        ("0::/\n", {"memory.max": "max"}, MACHINE),
        ("0::/\n", {"memory.max": str(GIB)}, GIB),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": str(GIB), "memory.max": "max"}, GIB),
        ("0::/a/b\n", {"a/b/memory.max": str(GIB // 2), "a/memory.max": str(GIB)}, GIB // 2),
        # The first version, from inside a container: its own group is the root of what it sees.
        ("9:memory:/docker/f0\n3:cpu,cpuacct:/docker/f0\n", {"memory/memory.limit_in_bytes": str(GIB)}, GIB),
        # No limit in its words.
        ("9:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, MACHINE),
    ],
)
def test_the_lowest_limit_counts(tmp_path: Path, membership: str, limits: dict[str, str], expected: int) -> None:
    (tmp_path / "membership").write_text(membership)
    found = memory_bytes(membership=tmp_path / "membership", groups=groups(tmp_path / "groups", limits))
    assert found == expected


def test_where_there_are_no_groups_the_machine_counts(tmp_path: Path) -> None:
    assert memory_bytes(membership=tmp_path / "none", groups=tmp_path) == MACHINE
    assert 0 < memory_bytes() <= MACHINE


AFTER_THE_START = """
import gc, weakref
from services.runtime.memory import keep_what_is_loaded

class Node: pass

def cycle():
    node = Node()
    node.me = node
    return weakref.ref(node)

loaded = Node()
loaded.me = loaded
there = weakref.ref(loaded)
keep_what_is_loaded()
new = cycle()
kept = [[] for _ in range(5_000)]
assert new() is None
# What was loaded is passed over from then on, even once nobody needs it.
del loaded
gc.collect()
assert there() is not None
"""


def test_after_the_start_new_cycles_are_found_and_what_was_loaded_is_passed_over() -> None:
    subprocess.run([sys.executable, "-c", AFTER_THE_START], check=True, timeout=60)
