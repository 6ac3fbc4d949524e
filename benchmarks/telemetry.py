"""What telemetry costs: calls, training and evaluation with spans and metrics exported, against the same without.

Told is what is done in a second of processor time: of a saturated server that is its rate, and it can be told apart to
a percent on a machine that does other things meanwhile, which seconds of the clock cannot. Both sides always run in one
machine's one state: two pairs of caller and server at the same moment, and one training and one validator whose
telemetry is switched to and fro. The collector, a process of its own, takes everything and keeps nothing. All spans are
recorded (the default sampler). Metrics are exported every five seconds (by default: every minute): once while the
calls of a pair are made.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np
import psutil

from benchmarks.calls import _add_echo, _echo_call
from benchmarks.evaluation import SAMPLES, _job, _timed_attempt
from services.modelserver.spawn import Nursery
from services.runtime.auth import Authenticator
from services.runtime.memory import keep_what_is_loaded
from services.runtime.server import ArenaServer, Mount
from services.runtime.telemetry import configure_telemetry
from services.trainer.bootstrap import build
from services.trainer.settings import TrainerSettings
from services.validator.children import NurseryAttempts
from tiltyard.calls.channel import open_channel
from tiltyard.client import Node
from tiltyard.datasets import write_dataset
from tiltyard.identity import Key, TokenSource
from tiltyard.telemetry import metrics, otlp, tracing
from tiltyard.trainer.v1 import trainer_pb2
from tiltyard.type.v1 import model_pb2, task_pb2

_AUDIENCE = "benchmark.local/echo"
_CALLS = 1000
_IN_FLIGHT = 8
_CALL_ROUNDS = 6
_CALL_PROCESSES = 10  # two processes that do the same differ by a percent or two, for as long as they live
_ATTEMPTS = 81  # they scatter by some percents, and one percent is to be seen
_TRAINING_WINDOWS = 24
_WINDOW_S = 0.5
_CALLS_GOAL = 0.95
_WORK_GOAL = 0.99

Pairs = list[tuple[float, float]]
"""What was done a second of processor time with telemetry, and without."""


def run() -> list[dict[str, Any]]:
    """Ratios of what is done a second with telemetry and without."""
    with tempfile.TemporaryDirectory(prefix="tiltyard-benchmark-") as name, ExitStack() as stack:
        folder = Path(name)
        collector = stack.enter_context(_process("collector"))
        exported = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.greeting}",
            "OTEL_METRIC_EXPORT_INTERVAL": "5000",
        }
        results = _calls(exported)
        os.environ.update(exported)
        switch = _Switch()
        stack.callback(switch.close)
        results.append(_row("training", "steps", asyncio.run(_training(folder, switch)), _WORK_GOAL))
        results.append(_row("evaluation", "samples", asyncio.run(_evaluation(folder, switch)), _WORK_GOAL))
    return results


def _row(name: str, what: str, pairs: Pairs, goal: float) -> dict[str, Any]:
    ratio = median(on / off for on, off in pairs)
    return {
        "name": f"telemetry: {name}",
        "ours": median(on for on, _ in pairs),
        "unit": f"{what} a CPU second",
        "against": "without telemetry",
        "theirs": median(off for _, off in pairs),
        "ratio": ratio,
        "goal": goal,
        "met": ratio >= goal,
    }


def _cpu_s(*pids: int) -> float:
    """Processor time of these processes so far (clock_getcpuclockid(3), which Python does not offer)."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


class _Switch:
    """Telemetry of this process, on and off as often as one likes."""

    def __init__(self) -> None:
        self._export = otlp.Export.from_environment("tiltyard-benchmark", traces=True, metrics=True)
        self._export.start()

    def turn(self, on: bool) -> None:
        tracing.install(self._export if on else None)
        metrics.collect(on)

    def close(self) -> None:
        self._export.close(grace_s=5)


def _calls(exported: dict[str, str]) -> list[dict[str, Any]]:
    """A caller and its server with telemetry beside a caller and its server without, at the same moment."""
    spent = [each for turn in range(_CALL_PROCESSES) for each in _rounds_of_calls(exported, first=turn % 2 == 0)]
    answered = [(_CALLS / on[0], _CALLS / off[0]) for on, off in spent]
    made = [(_CALLS / on[1], _CALLS / off[1]) for on, off in spent]
    return [_row("calls answered", "calls", answered, _CALLS_GOAL), _row("calls made", "calls", made, _CALLS_GOAL)]


def _rounds_of_calls(exported: dict[str, str], *, first: bool) -> list[list[tuple[float, float]]]:
    """Seconds that server and caller took each round, with telemetry and without, in processes of their own."""
    environments = (exported, {}) if first else ({}, exported)
    with ExitStack() as stack:
        servers = [stack.enter_context(_process("server", **each)) for each in environments]
        callers = [
            stack.enter_context(_process("caller", server.greeting, **each))
            for server, each in zip(servers, environments, strict=True)
        ]
        spent = []
        for _ in range(_CALL_ROUNDS + 1):
            before = [(_cpu_s(server.pid), _cpu_s(caller.pid)) for server, caller in zip(servers, callers, strict=True)]
            for caller in callers:
                caller.tell()
            for caller in callers:
                caller.answer()
            sides = [
                (_cpu_s(server.pid) - of_server, _cpu_s(caller.pid) - of_caller)
                for server, caller, (of_server, of_caller) in zip(servers, callers, before, strict=True)
            ]
            spent.append(sides if first else sides[::-1])
    # The first opens connections.
    return spent[1:]


async def _training(folder: Path, switch: _Switch) -> Pairs:
    """One long training, whose node has telemetry every other half second; the node's time and the child's count."""
    settings = TrainerSettings(state_dir=folder / "trainer", listen="127.0.0.1:0")
    random = np.random.default_rng(0)
    settings.data_dir.mkdir(parents=True)
    y = random.integers(0, 10, size=4000)
    write_dataset(settings.data_dir / "rows.safetensors", random.normal(size=(4000, 64)).astype(np.float32), y)
    switch.turn(True)
    trainer = await build(settings)
    work = [asyncio.create_task(job()) for job in trainer.background]
    server = ArenaServer(
        settings.listen,
        trainer.mounts,
        authenticator=trainer.authenticator,
        policy=trainer.policy,
        remembered=trainer.database,
    )
    try:
        async with server, Node(trainer.key, address=server.address, node_id=trainer.key.id) as node:
            return await _windows(node, switch)
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        for close in trainer.on_close:
            await close()


async def _windows(node: Node, switch: _Switch) -> Pairs:
    request = trainer_pb2.StartTrainingRequest(
        dataset="rows.safetensors",
        model=model_pb2.ModelSpec(input_shape=[64], outputs=10, mlp=model_pb2.Mlp(hidden=[128])),
        loss=task_pb2.LOSS_CROSS_ENTROPY,
        config=trainer_pb2.TrainingConfig(epochs=100_000, batch_size=64),
    )
    name = (await node.trainings.StartTraining(request)).training.name
    rates: list[float] = []
    on, step, cpu_s, ends = True, 0, 0.0, 0.0
    async for seen in node.trainings.WatchTraining(trainer_pb2.WatchTrainingRequest(name=name)):
        now = seen.training.progress.step
        if not now or time.monotonic() < ends:
            continue
        spent_s = _cpu_s(*_trainers())
        if step:
            rates.append((now - step) / (spent_s - cpu_s))
            on = not on
            switch.turn(on)
            if len(rates) == 2 * _TRAINING_WINDOWS + 2:
                break
        step, cpu_s, ends = now, spent_s, time.monotonic() + _WINDOW_S
    await node.trainings.CancelTraining(trainer_pb2.CancelTrainingRequest(name=name))
    # The first two warm torch up.
    return list(zip(rates[2::2], rates[3::2], strict=True))


def _trainers() -> list[int]:
    """This process, which serves the node, and the training's own."""
    children = psutil.Process().children()
    return [os.getpid(), *(each.pid for each in children if "services.trainer.descent.child" in each.cmdline())]


async def _evaluation(folder: Path, switch: _Switch) -> Pairs:
    """Whole attempts of a validator, a confined model server each; the validator's own time counts."""
    job = _job(folder)
    pairs: Pairs = []
    async with Nursery() as nursery:
        attempts = NurseryAttempts(nursery, folder=folder / "children", threads=0, concurrency=1)

        async def rate(on: bool) -> float:
            switch.turn(on)
            started = time.process_time()
            with tracing.span("evaluate"):
                await _timed_attempt(attempts, job)
            return SAMPLES / (time.process_time() - started)

        try:
            for turn in range(_ATTEMPTS + 1):
                # The one that goes first has whatever the other left behind: they take turns at that, too.
                if turn % 2:
                    pair = (await rate(True), await rate(False))
                else:
                    later = await rate(False)
                    pair = (await rate(True), later)
                if turn:
                    pairs.append(pair)
        finally:
            attempts.close()
    return pairs


@dataclass(frozen=True)
class _Process:
    """A process of this benchmark: what it said first, and one line for each that it is told."""

    greeting: str
    process: "subprocess.Popen[str]"

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended with {self.process.wait()}")
        return line.strip()


@contextmanager
def _process(kind: str, *arguments: str, **environment: str) -> Iterator[_Process]:
    """A process of `kind`, one of `_KINDS`, that lives as long as this context."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.telemetry", kind, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**clean, **environment},
    )
    try:
        yield _Process(_Process("", process).answer(), process)
    finally:
        process.kill()
        process.communicate()


async def _be_server() -> None:
    configure_telemetry("benchmark", "info", "json")
    mount = Mount("benchmark.v1.Echo", _add_echo)
    async with ArenaServer("127.0.0.1:0", [mount], authenticator=Authenticator([_AUDIENCE])) as server:
        keep_what_is_loaded()
        print(server.address, flush=True)
        await asyncio.Event().wait()


async def _be_caller(address: str) -> None:
    """A thousand calls for each line on standard input, a few in flight, through the channel that services use."""
    configure_telemetry("benchmark", "info", "json")
    tokens = TokenSource(Key.generate(), _AUDIENCE)
    async with open_channel(address, tokens=tokens) as channel:
        call = _echo_call(channel, None)
        keep_what_is_loaded()
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            left = iter(range(_CALLS))

            async def work_off(left: Iterator[int] = left) -> None:
                for _ in left:
                    await call()

            with tracing.span("a thousand calls"):
                await asyncio.gather(*(work_off() for _ in range(_IN_FLIGHT)))
            print("done", flush=True)


def _be_collector() -> None:
    """Takes every message undecoded and answers with an empty one."""
    take: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")
    server = grpc.server(ThreadPoolExecutor(2))
    for signal in ("trace", "metrics"):
        service = f"opentelemetry.proto.collector.{signal}.v1.{signal.capitalize()}Service"
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"Export": take})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["server"]:
            asyncio.run(_be_server())
        case ["caller", address]:
            asyncio.run(_be_caller(address))
        case ["collector"]:
            _be_collector()
