"""What a process gives up before it runs a stranger's weights: memory, CPU time, network, other processes and programs.

Linux only, by libc calls; each restriction that the kernel refuses is reported, none is assumed.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000

# Threads of gRPC, Python and torch keep stacks and arenas that are no part of the model's work.
THREAD_ALLOWANCE_BYTES = 256 * 1024 * 1024
MAX_LOG_BYTES = 16 * 1024 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Confinement:
    """What holds: `network` is how the network was taken away ("" if it was not), `programs` whether fork and exec."""

    network: str
    programs: bool

    def __str__(self) -> str:
        network = (
            f"without network ({self.network})" if self.network else "with the network, which the kernel leaves it"
        )
        return f"{network}, and {'unable' if self.programs else 'able'} to start processes and programs"


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; exits at once when process `parent` has ended already."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def limit_memory(memory_bytes: int) -> None:
    """Let this process hold `memory_bytes` of data beyond what it holds now."""
    status = Path("/proc/self/status").read_text()
    held_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    limit = held_kib * 1024 + THREAD_ALLOWANCE_BYTES + memory_bytes
    # Data and not address space: torch and thread arenas reserve far more addresses than they ever use.
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def limit_cpu(cpu_seconds: int) -> None:
    """End this process by SIGXCPU once it has used so many seconds of CPU time."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))


def limit_files() -> None:
    """No core dump, and no file larger than a log needs."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_LOG_BYTES, MAX_LOG_BYTES))


def confine() -> Confinement:
    """Take away the network (a namespace of its own, else a system-call filter), other processes and programs.

    The process must have one thread. Unix sockets named by a path keep working.
    """
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    alone = _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0 or _libc.unshare(_CLONE_NEWNET) == 0
    filtered = _filter_system_calls()
    network = " and ".join(["network namespace"] * alone + ["system-call filter"] * filtered)
    return Confinement(network=network, programs=filtered)


def try_out() -> Confinement:
    """What `confine` comes to on this machine, seen in a process that ends at once. The caller must have one thread."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(asdict(confine())).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as told:
        held = Confinement(**json.loads(told.read()))
    os.waitpid(pid, 0)
    return held


# Per machine: the audit architecture, socket(), clone(), and calls that nothing here needs and an attacker would:
# execve, execveat, ptrace, process_vm_readv, process_vm_writev, io_uring_setup (it opens sockets past any filter), and
# fork and vfork where there are such.
_CALLS = {
    "x86_64": (0xC000003E, 41, 56, (59, 322, 101, 310, 311, 425, 57, 58)),
    "aarch64": (0xC00000B7, 198, 220, (221, 281, 117, 270, 271, 425)),
}
_CLONE3 = 435
_CLONE_THREAD = 0x00010000
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | 1  # EPERM
_MISSING = 0x00050000 | 38  # ENOSYS
_X32 = 0x40000000


def _filter_system_calls() -> bool:
    """Install a seccomp filter: Unix sockets only, threads only, none of the calls above. False if it cannot be."""
    if platform.machine() not in _CALLS:
        return False
    architecture, socket_call, clone_call, refused = _CALLS[platform.machine()]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    # struct seccomp_data: call number at 0, architecture at 4, low half of the first argument at 16.
    program: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (answer, 0, 0, _REFUSE),
        (load, 0, 0, 0),
        (at_least, 0, 1, _X32),
        (answer, 0, 0, _REFUSE),
    ]
    for call in refused:
        program += [(equal, 0, 1, call), (answer, 0, 0, _REFUSE)]
    program += [
        # Its flags lie in memory, which a filter cannot read; libc then makes its threads by clone().
        (equal, 0, 1, _CLONE3),
        (answer, 0, 0, _MISSING),
        (equal, 0, 3, clone_call),
        (load, 0, 0, 16),
        (any_bit, 1, 0, _CLONE_THREAD),
        (answer, 0, 0, _REFUSE),
        # A clone() that is allowed goes on here with its flags loaded, so the number is loaded again.
        (load, 0, 0, 0),
        (equal, 0, 3, socket_call),
        (load, 0, 0, 16),
        (equal, 1, 0, 1),
        (answer, 0, 0, _REFUSE),
        (answer, 0, 0, _ALLOW),
    ]
    return _install(program)


def _install(program: Sequence[tuple[int, int, int, int]]) -> bool:
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(program), ctypes.addressof(instructions)))
    return bool(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0) == 0)
