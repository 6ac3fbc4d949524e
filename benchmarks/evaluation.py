"""Evaluation samples per second of the whole path, against its limit: in-process torch and one bare gRPC stream.

The path is what a validator does: a confined model server is spawned, evaluation batches stream through it, and the
answers are counted. Its limit is 1/(1/a + 1/b): a is what torch alone computes, b what a bare stream carries, as if
nothing of the two ran side by side. A convnet, whose compute dominates, is held against torch alone, and the MLP
against MLServer with the same torch module and our client. All in one run, in turns, on the same cores; medians.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np
from safetensors.numpy import save_file

from benchmarks._mlserver import mlserver, template
from benchmarks._peers import PeerUnavailable
from services.modelserver.spawn import Nursery
from services.validator.assignments import Order
from services.validator.batches import rows_per_batch
from services.validator.children import NurseryAttempts
from services.validator.evaluation import Job
from services.validator.fleet import Endpoint, Fleet
from services.validator.rows import EvaluationRows
from services.validator.runs import Progress
from tiltyard.counting import Tally
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc
from tiltyard.modelspec import Convnet, Mlp, ModelSpec, from_json, tensor_shapes, to_json

SPEC = ModelSpec((784,), 10, Mlp((128,)), input_scale=1 / 255)
SAMPLES = 200_000
ROUNDS = 7
GOAL = 0.85
CONVNET = ModelSpec((28, 28), 10, Convnet((16, 32)), input_scale=1 / 255)
CONVNET_SAMPLES = 30_000
CONVNET_ROUNDS = 3
CONVNET_GOAL = 0.95
MLSERVER_SAMPLES = 40_000
MLSERVER_ROUNDS = 5
MLSERVER_GOAL = 6.0
_DROP = "/benchmark.v1.Drop/Drop"
_OPTIONS = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)]


def run() -> list[dict[str, Any]]:
    """The whole path against its limit, and the two parts of the limit for the record."""
    return asyncio.run(_run())


async def _run() -> list[dict[str, Any]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiltyard-benchmark-")))
        job = _job(folder)
        torch_alone = stack.enter_context(_Part("torch", folder))
        drop = stack.enter_context(_Part("drop", folder))
        async with Nursery() as nursery:
            attempts = NurseryAttempts(nursery, folder=folder / "children", threads=0, concurrency=1)
            stack.callback(attempts.close)
            ours, alone, bare = [], [], []
            for _ in range(ROUNDS):
                ours.append(await _timed_attempt(attempts, job))
                alone.append(float(await asyncio.to_thread(torch_alone.ask)))
                bare.append(await asyncio.to_thread(_timed_stream, drop.greeting, job))
    path, a, b = (SAMPLES / median(seconds) for seconds in (ours, alone, bare))
    return [
        _result("evaluation", path, "1/(1/a + 1/b)", 1 / (1 / a + 1 / b), GOAL),
        _result("evaluation, of torch", path, "a: torch in one process", a, None),
        _result("evaluation, of a stream", path, "b: a bare gRPC stream that drops", b, None),
        await _convnet(),
        await _against_mlserver(),
    ]


async def _convnet() -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiltyard-benchmark-")))
        job = _job(folder, CONVNET, CONVNET_SAMPLES)
        torch_alone = stack.enter_context(_Part("torch", folder))
        async with Nursery() as nursery:
            attempts = NurseryAttempts(nursery, folder=folder / "children", threads=0, concurrency=1)
            stack.callback(attempts.close)
            ours, alone = [], []
            for _ in range(CONVNET_ROUNDS):
                ours.append(await _timed_attempt(attempts, job, CONVNET_SAMPLES))
                alone.append(float(await asyncio.to_thread(torch_alone.ask)))
    path, a = (CONVNET_SAMPLES / median(seconds) for seconds in (ours, alone))
    return _result("evaluation of a convnet", path, "torch in one process", a, CONVNET_GOAL)


async def _against_mlserver() -> dict[str, Any]:
    """The same model and the same client; loading is not counted. A row that says why, where there is no MLServer."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiltyard-benchmark-")))
        (folder / "ours").mkdir()
        job, theirs_job = _job(folder / "ours"), _job(folder, SPEC, MLSERVER_SAMPLES)
        share = folder / "share"
        model = template(share / "m") / "model-settings.json"
        model.write_text(model.read_text().replace("${MODEL}", "m"))
        for name in ("spec.json", "model.safetensors"):
            (share / "m" / name).hardlink_to(folder / name)
        try:
            address = await asyncio.to_thread(stack.enter_context, mlserver(share))
        except PeerUnavailable as error:
            row = _result("evaluation against MLServer", 0.0, f"not measured, no MLServer here: {error}", 1.0, None)
            return {**row, "theirs": 0.0}
        channel = stack.enter_context(grpc.insecure_channel(address, options=_OPTIONS))
        load = pb.RepositoryModelLoadRequest(model_name="m")
        await asyncio.to_thread(rpc.GRPCInferenceServiceStub(channel).RepositoryModelLoad, load, timeout=120)
        async with Nursery() as nursery:
            attempts = NurseryAttempts(nursery, folder=folder / "children", threads=0, concurrency=1)
            stack.callback(attempts.close)
            ours, theirs = [], []
            for _ in range(MLSERVER_ROUNDS):
                ours.append(await _timed_attempt(attempts, job))
                theirs.append(await asyncio.to_thread(_timed_fleet, channel, theirs_job))
    path, peer = SAMPLES / median(ours), MLSERVER_SAMPLES / median(theirs)
    return _result("evaluation against MLServer", path, "MLServer, our client", peer, MLSERVER_GOAL)


def _timed_fleet(channel: grpc.Channel, job: Job) -> float:
    """Seconds for every row through a server that has the model `m` loaded."""
    with EvaluationRows.open(job.dataset) as rows:
        tally = Tally()
        fleet = Fleet(
            [Endpoint("mlserver", channel, tuple)],
            model="m",
            outputs=SPEC.outputs,
            rows_per_batch=rows_per_batch(SPEC, rows.row_bytes),
        )
        started = time.perf_counter()
        fleet.run(rows, lambda start, stop, logits: tally.add(logits, rows.labels(start, stop)))
        seconds = time.perf_counter() - started
        assert tally.total == rows.total
    return seconds


def _result(name: str, ours: float, against: str, theirs: float, goal: float | None) -> dict[str, Any]:
    ratio = ours / theirs
    return {
        "name": name,
        "ours": ours,
        "unit": "samples/s",
        "against": against,
        "theirs": theirs,
        "ratio": ratio,
        "goal": goal,
        "met": None if goal is None else ratio >= goal,
    }


def _job(folder: Path, spec: ModelSpec = SPEC, samples: int = SAMPLES) -> Job:
    rng = np.random.default_rng(0)
    weights = {name: (rng.normal(size=shape) * 0.1).astype(np.float32) for name, shape in tensor_shapes(spec).items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "spec.json").write_text(json.dumps(to_json(spec)))
    x = rng.integers(0, 256, (samples, *spec.input_shape), dtype=np.uint8)
    save_file({"x": x, "y": rng.integers(0, spec.outputs, samples)}, folder / "dataset.safetensors")
    order = Order(
        dataset_digest="",
        dataset_bytes=0,
        model_digest="",
        model_bytes=0,
        spec=spec,
        max_cpu_s=600,
        max_memory_bytes=1 << 30,
    )
    return Job(order, folder / "dataset.safetensors", folder / "model.safetensors")


async def _timed_attempt(attempts: NurseryAttempts, job: Job, samples: int = SAMPLES) -> float:
    started = time.perf_counter()
    finding = await attempts.attempt(job, Progress())
    seconds = time.perf_counter() - started
    assert finding.counts is not None
    assert finding.counts.total == samples
    return seconds


def _timed_stream(address: str, job: Job) -> float:
    """Seconds for the same bytes, read from the same file, over a stream to a server that drops them."""
    with EvaluationRows.open(job.dataset) as rows, grpc.insecure_channel(address, options=_OPTIONS) as channel:
        grpc.channel_ready_future(channel).result(timeout=20)
        step = rows_per_batch(SPEC, rows.row_bytes)

        def batches() -> Iterator[bytes]:
            for start in range(0, rows.total, step):
                yield rows.features(start, min(start + step, rows.total))

        started = time.perf_counter()
        method: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(_DROP)
        answer = method(batches())
        seconds = time.perf_counter() - started
    assert int(answer) == SAMPLES * rows.row_bytes
    return seconds


class _Part:
    """A process of its own for one part of the limit: says one line when it is ready, and one for each line it gets."""

    def __init__(self, name: str, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.evaluation", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.greeting = self._process.stdout.readline().strip()

    def ask(self) -> str:
        """One more answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def _be_torch(folder: Path) -> None:
    """Answers each line with the seconds that torch takes for every row, memory-mapped as the path reads them."""
    # As our model server does, so that both compute alike.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from tiltyard.models import load_model

    spec = from_json(json.loads((folder / "spec.json").read_text()))
    model = load_model(spec, folder / "model.safetensors")
    with EvaluationRows.open(folder / "dataset.safetensors") as rows, torch.inference_mode():
        step = rows_per_batch(spec, rows.row_bytes)
        print("ready", flush=True)
        for _ in sys.stdin:
            started = time.perf_counter()
            for start in range(0, rows.total, step):
                stop = min(start + step, rows.total)
                raw = bytearray(rows.features(start, stop))
                model(torch.frombuffer(raw, dtype=torch.uint8).reshape(stop - start, *rows.row_shape)).argmax(1)
            print(time.perf_counter() - started, flush=True)


def _be_drop(folder: Path) -> None:
    """Serves a stream whose bytes are counted and dropped, until standard input ends."""

    def drop(batches: Iterator[bytes], _context: object) -> bytes:
        return str(sum(len(batch) for batch in batches)).encode()

    server = grpc.server(futures.ThreadPoolExecutor(4), options=_OPTIONS)
    service, _, method = _DROP[1:].partition("/")
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(drop)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
    address = f"unix:{folder}/drop.sock"
    server.add_insecure_port(address)
    server.start()
    print(address, flush=True)
    sys.stdin.read()
    server.stop(0)


if __name__ == "__main__":
    {"torch": _be_torch, "drop": _be_drop}[sys.argv[1]](Path(sys.argv[2]))
