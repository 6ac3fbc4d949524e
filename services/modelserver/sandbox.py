"""What a process gives up before it runs a stranger's weights: memory, CPU time, network, other processes and programs.

Linux only, by libc calls; each restriction that the kernel refuses is reported, none is assumed.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import socket
import struct
from collections.abc import Callable, Sequence
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
    """What holds: `network` is how the network was taken away ("" if it was not), `programs` whether fork and exec.

    `files` is whether no file can be changed any more, `reads` whether none can be read but those that were named.
    """

    network: str
    programs: bool
    files: bool
    reads: bool

    def __str__(self) -> str:
        network = (
            f"without network ({self.network})" if self.network else "with the network, which the kernel leaves it"
        )
        programs, files, reads = ("unable" if held else "able" for held in (self.programs, self.files, self.reads))
        return (
            f"{network}, {programs} to start processes and programs, {files} to change files, and {reads} to read "
            "those of its user"
        )

    @property
    def whole(self) -> bool:
        """Whether all of it holds."""
        return bool(self.network) and self.programs and self.files and self.reads


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


def confine(parent: int, readable: Sequence[str] | None) -> Confinement:
    """Take away the network (a namespace of its own, else a system-call filter), other processes, programs and files.

    The process must have one thread; it dies with process `parent`, and can't change that. Unix sockets in its working
    directory can be served and none be called, and what is open stays open. Of other files only those that are
    `readable` are read, with folders all beneath them; None: all as before.
    """
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    alone = _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0 or _libc.unshare(_CLONE_NEWNET) == 0
    # Taking a user namespace may have cleared it, and the filter lets nobody set it.
    die_with_parent(parent)
    files = _freeze_files(readable)
    filtered = _filter_system_calls()
    network = " and ".join(["network namespace"] * alone + ["system-call filter"] * filtered)
    return Confinement(network=network, programs=filtered, files=files, reads=files and readable is not None)


def try_out(readable: Sequence[str] | None, rehearse: Callable[[], None]) -> Confinement | None:
    """What `confine` comes to on this machine, seen in a process that ends at once. The caller must have one thread.

    None if `rehearse` fails there, which is tried where not all can be read.
    """
    reading, writing = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        complaints = os.dup(2)
        try:
            held = confine(parent, readable)
            if held.reads:
                # What libraries tell of themselves is told to nobody here.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                rehearse()
            os.write(writing, json.dumps(asdict(held)).encode())
        except Exception as error:
            os.write(complaints, f"a rehearsal failed: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as told:
        words = told.read()
    os.waitpid(pid, 0)
    return Confinement(**json.loads(words)) if words else None


# Per machine: the audit architecture; clone, socket, socketpair, tgkill, prlimit64, prctl, fcntl, ioctl; and calls that
# only an attacker needs: they start or reach into processes, open sockets past any filter (io_uring), leave the group
# that ends together, have the kernel forget who this dies with (as other users, in other namespaces), speak to other
# servers of this machine, share memory, semaphores or queues that outlive it, or make what is hard to remove.
_CALLS = {
    # execve, execveat, ptrace, process_vm_readv, process_vm_writev, io_uring_setup, pidfd_send_signal, pidfd_open,
    # pidfd_getfd, fork, vfork, kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo; setsid, setpgid, unshare, setns,
    # setuid, setgid, setreuid, setregid, setresuid, setresgid, setfsuid, setfsgid, setgroups; connect; shmget, shmat,
    # shmctl, semget, semop, semtimedop, semctl, msgget, msgsnd, msgrcv, msgctl, mq_open, mq_unlink; chmod, fchmod,
    # fchmodat, fchmodat2, mkdir, mkdirat, mknod, mknodat, symlink, symlinkat, link, linkat, rename, renameat,
    # renameat2, truncate.
    "x86_64": (0xC000003E, (56, 41, 53, 234, 302, 157, 72, 16), (
        59, 322, 101, 310, 311, 425, 424, 434, 438, 57, 58, 62, 200, 129, 297,
        112, 109, 272, 308, 105, 106, 113, 114, 117, 119, 122, 123, 116, 42,
        29, 30, 31, 64, 65, 220, 66, 68, 69, 70, 71, 240, 241,
        90, 91, 268, 452, 83, 258, 133, 259, 88, 266, 86, 265, 82, 264, 316, 76,
    )),
    # The same, without those that there are not: fork, vfork, chmod, mkdir, mknod, symlink, link, rename.
    "aarch64": (0xC00000B7, (220, 198, 199, 131, 261, 167, 25, 29), (
        221, 281, 117, 270, 271, 425, 424, 434, 438, 129, 130, 138, 240,
        157, 154, 97, 268, 146, 144, 145, 143, 147, 149, 151, 152, 159, 203,
        194, 196, 195, 190, 193, 192, 191, 186, 189, 188, 187, 180, 181,
        52, 53, 452, 34, 33, 36, 37, 38, 276, 45,
    )),
}  # fmt: skip
_CLONE3 = 435
_CLONE_THREAD = 0x00010000
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | 1  # EPERM
_MISSING = 0x00050000 | 38  # ENOSYS
_X32 = 0x40000000
# fcntl(2), ioctl(2): whom the kernel signals when a descriptor has something to read.
_F_SETOWN, _F_SETOWN_EX, _FIOSETOWN, _SIOCSPGRP = 8, 15, 0x8901, 0x8902


def _filter_system_calls() -> bool:
    """Install a seccomp filter: only Unix sockets, threads, signals and limits of its own. False if it cannot be."""
    if platform.machine() not in _CALLS:
        return False
    architecture, conditional, refused = _CALLS[platform.machine()]
    clone, socket_, socketpair, tgkill, prlimit, prctl, fcntl, ioctl = conditional
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    # struct seccomp_data: call number at 0, architecture at 4, low halves of the arguments from 16 on.
    first, second = 16, 24
    program: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (answer, 0, 0, _REFUSE),
        (load, 0, 0, 0),
        (at_least, 0, 1, _X32),
        (answer, 0, 0, _REFUSE),
        # Its flags lie in memory, which a filter cannot read; libc then makes its threads by clone().
        (equal, 0, 1, _CLONE3),
        (answer, 0, 0, _MISSING),
    ]
    for call in refused:
        program += [(equal, 0, 1, call), (answer, 0, 0, _REFUSE)]
    for call, argument, test, value, allowed in (
        (clone, first, any_bit, _CLONE_THREAD, True),
        (socket_, first, equal, socket.AF_UNIX, True),
        # Without a connection a message goes to any server's socket. The kinds that have one are odd numbers, 1 and 5.
        (socket_, second, any_bit, socket.SOCK_DGRAM, False),
        (socketpair, second, any_bit, socket.SOCK_DGRAM, False),
        # By its own id: abort() goes this way.
        (tgkill, first, equal, os.getpid(), True),
        # Of this process.
        (prlimit, first, equal, 0, True),
        # To outlive the zygote.
        (prctl, first, equal, _PR_SET_PDEATHSIG, False),
        # To have the kernel signal another.
        (fcntl, second, equal, _F_SETOWN, False),
        (fcntl, second, equal, _F_SETOWN_EX, False),
        (ioctl, second, equal, _FIOSETOWN, False),
        (ioctl, second, equal, _SIOCSPGRP, False),
    ):
        # The number is loaded again for what comes next.
        program += [
            (equal, 0, 4, call),
            (load, 0, 0, argument),
            (test, int(allowed), int(not allowed), value),
            (answer, 0, 0, _REFUSE),
            (load, 0, 0, 0),
        ]
    program += [(answer, 0, 0, _ALLOW)]
    return _install(program)


# landlock_create_ruleset, landlock_add_rule, landlock_restrict_self: one number each on all machines.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULESET_VERSION = 1
_PATH_BENEATH = 1
# LANDLOCK_ACCESS_FS_*: reading; two that are still wanted, and all that change anything: those from removing a folder
# on, too.
_READ = 1 << 2
_WRITE, _MAKE_SOCKET, _TRUNCATE = 1 << 1, 1 << 9, 1 << 14
_CHANGES = _WRITE | sum(1 << bit for bit in range(4, 15))
# By the version of the interface: without reparenting, without truncation.
_KNOWN_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1}


def _freeze_files(readable: Sequence[str] | None) -> bool:
    """Have the kernel refuse changes of files, but for a socket right here, and reading others than are `readable`.

    False where it has no Landlock.
    """
    version = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _RULESET_VERSION)
    if version < 1:
        return False
    changes = _CHANGES & _KNOWN_RIGHTS.get(version, _CHANGES)
    reading = 0 if readable is None else _READ
    handled = ctypes.create_string_buffer(struct.pack("=Q", changes | reading), 8)
    ruleset = _libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    try:
        return (
            _let(ruleset, ".", _MAKE_SOCKET | reading)
            and _let(ruleset, os.devnull, changes & (_WRITE | _TRUNCATE) | reading)
            and all(_let(ruleset, path, reading) for path in readable or ())
            and _libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
        )
    finally:
        os.close(ruleset)


def _let(ruleset: int, path: str, rights: int) -> bool:
    """Allow `rights` on a path and what is beneath it, if there still is such a path."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor), 12)
        return bool(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0) == 0)
    finally:
        os.close(descriptor)


def _install(program: Sequence[tuple[int, int, int, int]]) -> bool:
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(program), ctypes.addressof(instructions)))
    return bool(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0) == 0)
