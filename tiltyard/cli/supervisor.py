"""Runs services as child processes on fixed ports, starts again what dies, and leaves no orphan behind."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

HOST = "127.0.0.1"
GRACE_S = 15.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
# Who lived that long before it died is started again at once.
_HEALTHY_AFTER_S = 10.0
# Deaths in a row before its first SERVING after which a service is taken for broken.
_FALSE_STARTS = 3
_LOG_TAIL_BYTES = 2000
# Of each log as much is kept twice at most: what is written now, and what was written before.
_LOG_BYTES = 32 << 20
_LOOK_AT_LOGS_S = 30.0
# After that a watch of somebody's health begins anew.
_WATCH_S = 60.0

# The kernel ends the child when we die, however that happens (PR_SET_PDEATHSIG is 1); the setting outlives exec.
# A preexec_fn would run Python between fork and exec of a process in which gRPC has threads.
_TETHER = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


# What one service is told: each has settings of its own, and a name among the others in their telemetry.
_NOT_FOR_SERVICES = ("TILTYARD_", "OTEL_SERVICE_NAME")


class StartFailed(Exception):
    """A service did not come up; the message holds the end of its log."""


@dataclass(frozen=True)
class Program:
    """One service to run: `module` as `python -m` names it, listening on `port` of this machine, its settings.

    `settings` are TILTYARD_* variables without the prefix; state folder and address are added. With `may_end`, an exit
    with status 0 is the end of its work (a validator that was drained), not a death.
    """

    name: str
    module: str
    port: int
    settings: Mapping[str, str] = field(default_factory=dict)
    may_end: bool = False

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{HOST}:{self.port}"


class Supervisor:
    """Keeps programs running from `async with` to its end. `report` gets one line on each death and restart."""

    def __init__(self, state: Path, *, report: Callable[[str], None]) -> None:
        self._state = state
        self._report = report
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._programs: dict[str, Program] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._served: set[str] = set()
        self._log_starts: dict[str, int] = {}
        self._stopping = False
        self._bounding: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Supervisor":
        self._bounding = asyncio.create_task(self._bound_logs(), name="bound logs")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def folder(self, name: str) -> Path:
        """The state folder of the program `name`."""
        return self._state / name

    def log_file(self, name: str) -> Path:
        """Where the program's output goes."""
        return self._state / "logs" / f"{name}.log"

    def pids(self) -> dict[str, int]:
        """Process ids of what runs now, by name."""
        return {name: process.pid for name, process in self._processes.items() if process.returncode is None}

    async def start(self, programs: Iterable[Program]) -> None:
        """Starts programs, all at once. Returns when their processes exist; `until_serving` waits for more."""
        for program in programs:
            if program.name in self._programs:
                raise ValueError(f"{program.name} runs already")
            self._programs[program.name] = program
            log = self.log_file(program.name)
            self._log_starts[program.name] = log.stat().st_size if log.exists() else 0
            await self._spawn(program)
            self._keepers[program.name] = asyncio.create_task(self._keep(program), name=f"keep {program.name}")

    async def until_serving(self, names: Collection[str] | None = None, *, timeout_s: float = 60.0) -> None:
        """Waits until the health service of each of `names` (None: all) says SERVING. Raises StartFailed."""
        wanted = list(self._programs if names is None else names)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(self._until_serving(self._programs[name]) for name in wanted))
        except TimeoutError:
            late = [name for name in wanted if name not in self._served]
            tails = "\n".join(self._log_tail(name) for name in late)
            raise StartFailed(f"not serving after {timeout_s:g} s: {', '.join(late)}\n{tails}") from None

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Asks all programs to drain and end, and kills those that have not after `grace_s` seconds."""
        self._stopping = True
        keepers = list(self._keepers.values())
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        running = [process for process in self._processes.values() if process.returncode is None]
        for process in running:
            process.terminate()
        if running:
            _, late = await asyncio.wait([asyncio.ensure_future(each.wait()) for each in running], timeout=grace_s)
            for process in running:
                if process.returncode is None:
                    process.kill()
            if late:
                await asyncio.wait(late)
        self._keepers.clear()
        if self._bounding is not None:
            self._bounding.cancel()

    async def _bound_logs(self) -> None:
        while True:
            for name in list(self._programs):
                await asyncio.to_thread(bound_log, self.log_file(name))
            await asyncio.sleep(_LOOK_AT_LOGS_S)

    async def _keep(self, program: Program) -> None:
        pause_s, false_starts = _FIRST_PAUSE_S, 0
        while True:
            started = time.monotonic()
            process = self._processes[program.name]
            status = await process.wait()
            if program.may_end and status == 0:
                self._report(f"{program.name} has ended")
                return
            if program.name not in self._served:
                false_starts += 1
                if false_starts == _FALSE_STARTS or status == 2:
                    raise StartFailed(f"{program.name} ended with status {status}\n{self._log_tail(program.name)}")
            if time.monotonic() - started > _HEALTHY_AFTER_S:
                pause_s = _FIRST_PAUSE_S
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            self._report(f"{program.name} died ({how}), it starts again")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            await self._spawn_again(program)

    async def _spawn_again(self, program: Program) -> None:
        while True:
            try:
                return await self._spawn(program)
            except OSError as error:
                # No process, memory or file is to be had just now.
                self._report(f"{program.name} cannot be started ({error.strerror}), it is tried again")
                await asyncio.sleep(_LONGEST_PAUSE_S)

    async def _spawn(self, program: Program) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_FOR_SERVICES)}
        settings = {"LISTEN": program.address, "STATE_DIR": str(self.folder(program.name)), **program.settings}
        environment |= {f"TILTYARD_{name}": value for name, value in settings.items()}
        log = await asyncio.to_thread(self._open_log, program.name)
        try:
            self._processes[program.name] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-ISc", _TETHER, str(os.getpid())),
                *(sys.executable, "-m", program.module),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # An interrupt from the terminal is for us alone; we drain them.
                start_new_session=True,
            )
        finally:
            os.close(log)

    def _open_log(self, name: str) -> int:
        self.folder(name).mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.log_file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    async def _until_serving(self, program: Program) -> None:
        watching = asyncio.ensure_future(_watch_health(program.address))
        keeper = self._keepers[program.name]
        try:
            await asyncio.wait([watching, keeper], return_when=asyncio.FIRST_COMPLETED)
            if keeper.done():
                # Its exception says why.
                keeper.result()
                raise StartFailed(f"{program.name} has ended")
            self._served.add(program.name)
        finally:
            watching.cancel()

    def _log_tail(self, name: str) -> str:
        """The end of what the program has said since we started it."""
        try:
            log = self.log_file(name).read_bytes()
        except FileNotFoundError:
            return ""
        start = self._log_starts[name]
        tail = log[start if start <= len(log) else 0 :][-_LOG_TAIL_BYTES:]
        return tail.decode(errors="replace").strip()


async def _watch_health(address: str) -> None:
    options = [
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 200),
        ("grpc.enable_http_proxy", 0),
    ]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub, request = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest()
        while True:
            try:
                async for answer in stub.Watch(request, timeout=_WATCH_S, wait_for_ready=True):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except grpc.aio.AioRpcError:
                # It went away while it started; the next watch waits for the next connection.
                await asyncio.sleep(_FIRST_PAUSE_S)


def bound_log(path: Path, most_bytes: int = _LOG_BYTES) -> None:
    """Puts a log longer than `most_bytes` aside as `{name}.1`, in the place of the one before, and empties it.

    Its writer appends, and goes on in the emptied file; what it writes between the copy and that is lost.
    """
    if not path.exists() or path.stat().st_size <= most_bytes:
        return
    earlier = path.with_name(f"{path.name}.1")
    with contextlib.suppress(OSError):  # where the disk is full, what was is not worth what comes
        shutil.copyfile(path, earlier)
        earlier.chmod(0o600)
    os.truncate(path, 0)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on, outside the range from which outgoing connections take theirs.

    So nobody takes one by chance while its service restarts.
    """
    first_ephemeral = 32768
    try:
        first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first_ephemeral = 32768
    lowest, beyond = (10_000, first_ephemeral) if first_ephemeral > 11_000 else (61_001, 65_536)
    found: list[int] = []
    for port in random.SystemRandom().sample(range(lowest, beyond), beyond - lowest):
        if is_free(port):
            found.append(port)
            if len(found) == count:
                return found
    raise OSError("no free port")


def is_free(port: int) -> bool:
    """Whether this machine's `port` could be listened on just now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
