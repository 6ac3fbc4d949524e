"""What a passing message costs the kernel."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from tiltyard.calls.allocator import keep_message_memory
if sys.argv[1] == "kept":
    keep_message_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def pass_messages(count):
    for _ in range(count):
        copies = [b"x" * (1 << 20) for _ in range(4)]  # as received, parsed, handed on, written
        del copies
pass_messages(3)
before = faults()
pass_messages(100)
print(faults() - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other ways")
def test_messages_that_pass_one_after_the_other_share_their_memory() -> None:
    assert faults("not kept") > 100 * 256  # of 1,024 pages a message
    assert faults("kept") < 100
