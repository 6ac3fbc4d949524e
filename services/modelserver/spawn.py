"""The validator's side of the nursery: spawn a confined model server in milliseconds, and learn how it ended.

This module imports no torch, and neither does what uses it.
"""

import asyncio
import contextlib
import json
import os
import signal
import stat
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import structlog

from services.modelserver.sandbox import Confinement
from tiltyard.modelspec import FaultCode, ModelFault

MODEL_NAME = "model"
LOG_FILE = "model.log"
SOCKET_FILE = "model.sock"

EXIT_CRASHED = 1
EXIT_FAULT = 70
EXIT_OUT_OF_MEMORY = 77
EXIT_UNREADABLE = 78
EXIT_UNCONFINED = 79

# A Unix socket's path must fit into 108 bytes (unix(7)).
MAX_SOCKET_PATH = 100
WARM_UP_TIMEOUT_S = 120.0
READY_TIMEOUT_S = 120.0
LOG_TAIL_BYTES = 4096

# What the children may know of the environment of the process that starts them: no settings, no keys.
_ENVIRONMENT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
)

_log = structlog.get_logger("tiltyard.nursery")


class ExitKind(StrEnum):
    """How a child ended. OK: it was stopped by its owner. KILLED: by somebody or something else than the model."""

    OK = "OK"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    TOO_SLOW = "TOO_SLOW"
    CRASHED = "CRASHED"
    KILLED = "KILLED"


@dataclass(frozen=True)
class Exit:
    """The end of a child: its kind, a sentence, and the CPU time that it used."""

    kind: ExitKind
    detail: str
    cpu_seconds: float


@dataclass(frozen=True)
class Limits:
    """What a child may use: bytes of data beyond an idle one's, whole seconds of CPU time, cores (0: all)."""

    memory_bytes: int
    cpu_seconds: int
    threads: int = 0


class ChildEnded(Exception):
    """The child ended before it could serve."""

    def __init__(self, exit_: Exit) -> None:
        super().__init__(f"{exit_.kind}: {exit_.detail}")
        self.exit = exit_


class NurseryDown(Exception):
    """No child can be started now; nothing that a model did."""


@dataclass
class _Pending:
    """What the zygote has said of one child so far."""

    ready: asyncio.Future[dict[str, Any]]
    ended: asyncio.Future[Exit]
    home: "_Home"
    killed_by_owner: bool = False

    def end(self, exit_: Exit) -> None:
        """It has ended like this."""
        self.home.leave()
        self.ended.set_result(exit_)


class _Home:
    """The folder of a child, and the way to its socket there, short enough for one however deep the folder lies.

    The child serves in its working directory. Its caller, where the path is too long, goes by a descriptor of the
    folder, which is gone with this process, however that ends; a folder with a short name elsewhere would stay.
    """

    def __init__(self, folder: Path) -> None:
        # From the root on, since a child has a working directory of its own.
        self.folder = folder.absolute()
        self.socket = self.folder / SOCKET_FILE
        self.socket.unlink(missing_ok=True)
        self._descriptor: int | None = None
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH:
            self._descriptor = os.open(self.folder, os.O_PATH | os.O_DIRECTORY)
            self.socket = Path(f"/proc/self/fd/{self._descriptor}") / SOCKET_FILE

    def leave(self) -> None:
        """To call when the child has ended."""
        # What it has put in the socket's place goes with the folder, if it goes at all.
        with contextlib.suppress(OSError):
            self.socket.unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@dataclass(frozen=True)
class Child:
    """A running model server with one model, named `MODEL_NAME`, on a Unix socket."""

    address: str
    pid: int
    _nursery: "Nursery" = field(repr=False)
    _id: int = field(repr=False)
    _pending: _Pending = field(repr=False)

    async def wait(self) -> Exit:
        """Wait for the child's end."""
        return await asyncio.shield(self._pending.ended)

    async def kill(self) -> Exit:
        """End the child, if it hasn't ended, and say how it did."""
        self._nursery.kill(self._id)
        return await self.wait()


class Nursery:
    """Keeps a warm zygote and has it fork children; starts another when it dies. Use from the main thread's loop.

    The kernel ends the zygote with the thread that started it and the children with the zygote, so none is left behind
    however this process ends.
    """

    def __init__(self) -> None:
        self.confinement: Confinement | None = None
        """How children are confined on this machine; known once the zygote is warm."""
        self._zygote: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._closing = False
        self._next_id = 0
        self._pending: dict[int, _Pending] = {}
        self._restart: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the zygote and wait until it is warm. Raises NurseryDown."""
        async with self._starting:
            if self._closing:
                raise NurseryDown("the nursery is closed")
            if self._zygote is not None:
                return
            environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
            zygote = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "services.modelserver",
                "--zygote",
                "--parent",
                str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # Threads would make forking unsafe, and numpy's BLAS starts some when it is imported. torch's threads
                # are to sleep while they wait: where cores are shared, spinning costs five to ten times the throughput.
                env={
                    **environment,
                    "OPENBLAS_NUM_THREADS": "1",
                    "OMP_WAIT_POLICY": "PASSIVE",
                    "GRPC_ENABLE_FORK_SUPPORT": "0",
                },
                start_new_session=True,
            )
            try:
                assert zygote.stdout is not None
                async with asyncio.timeout(WARM_UP_TIMEOUT_S):
                    first = await zygote.stdout.readline()
                if not first:
                    raise NurseryDown(f"the nursery ended with {await zygote.wait()} before it was warm")
                told = json.loads(first)
                self.confinement = Confinement(told["network"], told["programs"], told["files"], told["reads"])
            except BaseException as error:
                _end_group(zygote)
                await zygote.wait()
                if isinstance(error, TimeoutError):
                    raise NurseryDown(f"the nursery was not warm after {WARM_UP_TIMEOUT_S:g} s") from error
                raise
            if not self.confinement.whole:
                _log.warning("models cannot be fully confined here", each=str(self.confinement))
            self._zygote = zygote
            self._reader = asyncio.create_task(self._read(zygote))

    async def spawn(self, folder: Path, limits: Limits, *, timeout_s: float = READY_TIMEOUT_S) -> Child:
        """Start a child that serves the model in `folder` (`spec.json`, `model.safetensors`), and wait until it does.

        Raises ModelFault when the files do not make a model, ChildEnded when the child ended on the way (out of memory,
        too slow, crashed, killed), NurseryDown when there is no child to be had. Nothing is left running then.
        """
        await self.start()
        number = self._next_id
        self._next_id += 1
        home = _Home(folder)
        loop = asyncio.get_running_loop()
        pending = _Pending(loop.create_future(), loop.create_future(), home)
        self._pending[number] = pending
        self._send(
            {
                "op": "spawn",
                "id": number,
                "folder": str(home.folder),
                "memory_bytes": limits.memory_bytes,
                "cpu_seconds": limits.cpu_seconds,
                "threads": limits.threads,
            }
        )
        try:
            async with asyncio.timeout(timeout_s):
                either: list[asyncio.Future[Any]] = [pending.ready, pending.ended]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not pending.ready.done():
                raise ChildEnded(pending.ended.result())
            event = pending.ready.result()
            if event["event"] == "fault":
                # It is about to end by itself, and nothing is to be left running.
                await asyncio.shield(pending.ended)
                raise ModelFault(FaultCode(event["code"]), event["detail"])
        except TimeoutError as error:
            self.kill(number)
            raise NurseryDown(f"a child did not serve within {timeout_s:g} s") from error
        except BaseException:
            self.kill(number)
            raise
        return Child(f"unix:{home.socket}", event["pid"], self, number, pending)

    def kill(self, number: int) -> None:
        """End child `number`, if it hasn't ended."""
        pending = self._pending.get(number)
        if pending is not None and not pending.ended.done():
            pending.killed_by_owner = True
            self._send({"op": "kill", "id": number})

    async def close(self) -> None:
        """End the zygote and all children."""
        self._closing = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.gather(self._restart, return_exceptions=True)
        if self._zygote is not None:
            _end_group(self._zygote)
        if self._reader is not None:
            await self._reader

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _send(self, line: dict[str, object]) -> None:
        # A zygote that died takes its children along, and the reader says so to all who wait.
        if self._zygote is not None and self._zygote.stdin is not None and not self._zygote.stdin.is_closing():
            self._zygote.stdin.write(json.dumps(line).encode() + b"\n")

    async def _read(self, zygote: asyncio.subprocess.Process) -> None:
        assert zygote.stdout is not None
        try:
            while line := await zygote.stdout.readline():
                self._hear(json.loads(line))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            # A child that was taken over may write where the zygote does.
            _log.error("the nursery says what none says", detail=f"{type(error).__name__}: {error}"[:200])
        _end_group(zygote)
        while await zygote.stdout.read(1 << 16):
            pass
        await zygote.wait()
        if zygote.stdin is not None:
            zygote.stdin.close()
            with contextlib.suppress(ConnectionError):
                await zygote.stdin.wait_closed()
        self._zygote = None
        for pending in list(self._pending.values()):
            kind = ExitKind.OK if pending.killed_by_owner else ExitKind.KILLED
            pending.end(Exit(kind, "ended with the nursery", 0.0))
        self._pending.clear()
        if not self._closing:
            _log.warning("the nursery died, it starts again", exit_code=zygote.returncode)
            self._restart = asyncio.create_task(self._start_again())

    async def _start_again(self) -> None:
        try:
            await self.start()
        except NurseryDown as error:
            # The next spawn tries again and tells its caller.
            _log.error("the nursery does not start", detail=str(error))

    def _hear(self, event: dict[str, Any]) -> None:
        pending = self._pending.get(event["id"])
        if pending is None:
            return
        if event["event"] == "ended":
            del self._pending[event["id"]]
            pending.end(_exit_of(event, pending))
        elif not pending.ready.done():
            pending.ready.set_result(event)


def _end_group(zygote: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(zygote.pid, signal.SIGKILL)


def _exit_of(event: dict[str, Any], pending: _Pending) -> Exit:
    number, code, cpu_seconds = event["signal"], event["code"], event["cpu_seconds"]
    if event["garbled"]:
        return Exit(ExitKind.CRASHED, "reported what no model server reports", cpu_seconds)
    log = _log_tail(pending.home.folder)
    if code == EXIT_OUT_OF_MEMORY or any(sign in log for sign in ("bad_alloc", "MemoryError", "allocate memory")):
        return Exit(ExitKind.OUT_OF_MEMORY, "the model does not fit in its memory limit", cpu_seconds)
    if number == signal.SIGXCPU:
        return Exit(ExitKind.TOO_SLOW, f"used {cpu_seconds:.1f} s of CPU time", cpu_seconds)
    if number == signal.SIGKILL:
        if pending.killed_by_owner:
            return Exit(ExitKind.OK, "stopped", cpu_seconds)
        return Exit(ExitKind.KILLED, "killed from outside", cpu_seconds)
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return Exit(ExitKind.KILLED, f"ended by {signal.Signals(number).name} from outside", cpu_seconds)
    if number == signal.SIGBUS:
        # A page of a mapped file that the disk does not give.
        return Exit(ExitKind.KILLED, "the disk failed under the model's file", cpu_seconds)
    cause = f"ended by {signal.Signals(number).name}" if number else f"exited with status {code}"
    last = log.strip().rpartition("\n")[2][-200:]
    if code == EXIT_UNREADABLE:
        return Exit(ExitKind.KILLED, f"the model's files cannot be read: {last}", cpu_seconds)
    if code == EXIT_UNCONFINED:
        return Exit(ExitKind.KILLED, f"it could not be confined as in the rehearsal: {last}", cpu_seconds)
    return Exit(ExitKind.CRASHED, f"{cause}: {last}" if last else cause, cpu_seconds)


def _log_tail(folder: Path) -> str:
    """The end of a child's log, which the child may have replaced by a link, a pipe or a folder: then there is none."""
    try:
        descriptor = os.open(folder / LOG_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return ""
        return os.pread(descriptor, LOG_TAIL_BYTES, max(0, found.st_size - LOG_TAIL_BYTES)).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(descriptor)
