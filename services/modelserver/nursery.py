"""The zygote: a process that has torch imported and forks a confined child for each evaluation.

It speaks one JSON object a line. In: `{"op": "spawn", ...}` with the fields of `child.Order`, and
`{"op": "kill", "id"}`. Out: `{"event": "warm", ...}` once with the fields of `sandbox.Confinement`, then for each child
`{"event": "ready", "id", "pid"}` or `{"event": "fault", "id", "pid", "code", "detail"}`, and at its end
`{"event": "ended", "id", "signal", "code", "garbled", "cpu_seconds"}`. A child that says anything else than one of the
first two, once, is killed, and its end is `garbled`: a stranger's weights may have taken it over. The end of its input,
and the death of its parent, end the zygote and every child.

The zygote itself never starts a thread, a gRPC object or a torch operation: what forks must be alone in its process.
"""

import gc
import json
import os
import select
import signal
import sys
from dataclasses import asdict, dataclass, field
from typing import NoReturn

from services.modelserver import child, reading, sandbox
from services.modelserver.spawn import EXIT_CRASHED, EXIT_OUT_OF_MEMORY
from tiltyard.modelspec import FaultCode

INPUT, OUTPUT = 0, 1
_MAX_REPORT_BYTES = 16 * 1024


@dataclass
class _Child:
    """A running child: the pipe that it reports through, until it has, and the descriptor that tells of its end."""

    id: int
    pid: int
    report: int
    ended: int
    received: bytearray = field(default_factory=bytearray)
    garbled: bool = False


class Zygote:
    """Forks children as the lines on standard input ask for, and reports their lives on standard output."""

    def __init__(self) -> None:
        self._children: dict[int, _Child] = {}
        self._received = bytearray()
        self._poll = select.poll()
        self._readable: list[str] | None = reading.readable()
        self._rehearsed = self._rehearse()

    def run(self) -> None:
        """Serve until the input ends."""
        self._poll.register(INPUT, select.POLLIN)
        _say({"event": "warm", **asdict(self._rehearsed)})
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == INPUT:
                    if not self._read_requests():
                        return
                    continue
                for running in list(self._children.values()):
                    if descriptor == running.report:
                        self._read_report(running)
                    elif descriptor == running.ended:
                        self._reap(running)

    def _rehearse(self) -> sandbox.Confinement:
        held = sandbox.try_out(self._readable, child.rehearse)
        if held is None:
            # Python lies here in some other way. Better that children read all than that good models fail by it.
            self._readable = None
            held = sandbox.try_out(None, child.rehearse)
            assert held is not None
        return held

    def _read_requests(self) -> bool:
        read = os.read(INPUT, 1 << 16)
        self._received += read
        while (end := self._received.find(b"\n")) >= 0:
            request = json.loads(self._received[:end])
            del self._received[: end + 1]
            if request["op"] == "spawn":
                self._spawn(child.Order(**{name: value for name, value in request.items() if name != "op"}))
            elif request["id"] in self._children:
                os.kill(self._children[request["id"]].pid, signal.SIGKILL)
        return bool(read)

    def _spawn(self, order: child.Order) -> None:
        reading, writing = os.pipe()
        # Whoever else may have got hold of the other end is not waited for.
        os.set_blocking(reading, False)
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_child(order, writing, zygote)
        os.close(writing)
        running = _Child(order.id, pid, reading, os.pidfd_open(pid))
        self._children[order.id] = running
        self._poll.register(running.report, select.POLLIN)
        self._poll.register(running.ended, select.POLLIN)

    def _become_child(self, order: child.Order, report: int, zygote: int) -> NoReturn:
        """Never returns: whatever happens in the child must not run the zygote's code."""
        try:
            sandbox.die_with_parent(zygote)
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, INPUT)
            os.dup2(null, OUTPUT)
            # Everything else that is open belongs to the zygote or to other children.
            os.closerange(3, report)
            os.closerange(report + 1, 65_536)
            code = child.live(order, report, zygote, self._readable, self._rehearsed)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            code = EXIT_OUT_OF_MEMORY if isinstance(error, MemoryError) else EXIT_CRASHED
        os._exit(code)

    def _read_report(self, running: _Child) -> None:
        try:
            read = os.read(running.report, _MAX_REPORT_BYTES)
        except BlockingIOError:
            return
        running.received += read
        told_all = running.received.endswith(b"\n")
        if told_all or not read or len(running.received) > _MAX_REPORT_BYTES:
            self._close_report(running)
        if told_all and (report := _report_of(running.received)) is not None:
            _say({**report, "id": running.id, "pid": running.pid})
        elif running.report < 0 and read:
            running.garbled = True
            os.kill(running.pid, signal.SIGKILL)

    def _close_report(self, running: _Child) -> None:
        if running.report >= 0:
            self._poll.unregister(running.report)
            os.close(running.report)
            running.report = -1

    def _reap(self, running: _Child) -> None:
        if running.report >= 0:
            self._read_report(running)
        _, status, usage = os.wait4(running.pid, 0)
        self._close_report(running)
        self._poll.unregister(running.ended)
        os.close(running.ended)
        del self._children[running.id]
        killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        _say(
            {
                "event": "ended",
                "id": running.id,
                "signal": killed_by,
                "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0,
                "garbled": running.garbled,
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
            }
        )


def _report_of(line: bytearray) -> dict[str, object] | None:
    """What a child says in a line, None for what no child of ours says."""
    try:
        match json.loads(line):
            case {"event": "ready"}:
                return {"event": "ready"}
            case {"event": "fault", "code": str(code), "detail": str(detail)}:
                return {"event": "fault", "code": FaultCode(code).value, "detail": detail}
    except (ValueError, RecursionError):
        pass
    return None


def _say(line: dict[str, object]) -> None:
    os.write(OUTPUT, json.dumps(line).encode() + b"\n")


def main() -> None:
    """Warm up, then serve. `--parent PID` is who started this; without that process there is nothing to do."""
    parent = int(sys.argv[sys.argv.index("--parent") + 1])
    sandbox.die_with_parent(parent)
    # An interrupt at the terminal is the parent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child.warm_up()
    # What is shared now stays shared: a child's collector need not touch, and so copy, the pages of these objects.
    gc.collect()
    gc.freeze()
    Zygote().run()
    # Children in mid-run end by the kernel's hand when this process does.
    os._exit(0)
