"""One attempt at an evaluation: a fresh, confined model server from the nursery, and every row through it."""

import asyncio
import contextlib
import errno
import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from services.modelserver.spawn import (
    MODEL_NAME,
    READY_TIMEOUT_S,
    Child,
    ChildEnded,
    Exit,
    ExitKind,
    Limits,
    Nursery,
    NurseryDown,
)
from services.validator.assignments import Order
from services.validator.batches import rows_per_batch
from services.validator.evaluation import CannotEvaluate, Job, ModelFailed, ServerLost
from services.validator.pipeline import BatchStream, RequestRefused, StreamBroken, WrongAnswer
from services.validator.rows import EvaluationRows
from services.validator.runs import Fault, Finding, Progress
from tiltyard.counting import Metric, NanOutput, Tally
from tiltyard.modelspec import ModelFault, Onnx, to_json
from tiltyard.telemetry import tracing

_SPEC_FILE = "spec.json"
_WEIGHTS_FILE = "model.safetensors"
_ONNX_FILE = "model.onnx"
# A child whose connection broke is dead or about to be.
_EXIT_TIMEOUT_S = 5.0
# Waiting for one batch: the CPU limit ends what computes; this ends what hangs, on a busy machine too.
_LEAST_STALL_S = 30.0
# Of a core: with less nothing is computed, on the busiest machine.
_COMPUTING_SHARE = 0.01

# The cache may lie on another disk than the children, or on one whose file system has one name for a file.
_NO_SECOND_NAME = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)

_FAULT_OF = {
    ExitKind.OUT_OF_MEMORY: Fault.OUT_OF_MEMORY,
    ExitKind.TOO_SLOW: Fault.TOO_SLOW,
    ExitKind.CRASHED: Fault.CRASHED,
}


class NurseryAttempts:
    """Attempts with children of `nursery`, each on `threads` cores, under `folder`, which is emptied first."""

    def __init__(self, nursery: Nursery, *, folder: Path, threads: int, concurrency: int) -> None:
        self._nursery = nursery
        self._folder = folder
        self._threads = threads
        self._streams = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="evaluation")
        _remove(folder)
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)

    def isolation(self) -> str:
        """How model servers are confined on this machine, in one sentence."""
        ground = "Each model server is a process of its own with limits on memory, CPU time and files"
        held = self._nursery.confinement
        return f"{ground}; what else it gives up is not known yet." if held is None else f"{ground}, {held}."

    async def attempt(self, job: Job, progress: Progress) -> Finding:
        """The counts. Raises ModelFailed, ServerLost and CannotEvaluate; leaves no process behind."""
        with EvaluationRows.open(job.dataset) as rows:
            rows.check_shape(job.order.spec.input_shape)
            if isinstance(job.order.spec.architecture, Onnx) and importlib.util.find_spec("onnxruntime") is None:
                raise CannotEvaluate("ONNX models need onnxruntime here: pip install 'tiltyard[onnx]'")
            progress.begin(rows.total)
            # The child has no network to tell of itself by, and nobody would believe it: this process tells of it.
            with tracing.span("model server", rows=rows.total) as span:
                async with self._child(job) as child:
                    span.set(pid=child.pid)
                    return await self._stream(child, rows, job, progress)

    def close(self) -> None:
        """Ends the threads."""
        self._streams.shutdown()

    @asynccontextmanager
    async def _child(self, job: Job) -> AsyncIterator[Child]:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            (folder / _SPEC_FILE).write_text(json.dumps(to_json(job.order.spec)))
            onnx = isinstance(job.order.spec.architecture, Onnx)
            await asyncio.to_thread(_put, job.model, folder / (_ONNX_FILE if onnx else _WEIGHTS_FILE))
            limits = Limits(
                memory_bytes=job.order.max_memory_bytes,
                cpu_seconds=max(1, math.ceil(job.order.max_cpu_s)),
                threads=1 if job.one_core else self._threads,
            )
            try:
                # One that computes while it loads ends by its limit of CPU time, and then it is the model's fault.
                child = await self._nursery.spawn(folder, limits, timeout_s=max(READY_TIMEOUT_S, stall_s(job.order)))
            except ModelFault as fault:
                raise ModelFailed.by(fault) from fault
            except ChildEnded as ended:
                _raise_by(ended.exit)
            except NurseryDown as error:
                raise ServerLost(str(error)) from error
            try:
                yield child
            finally:
                await child.kill()
        finally:
            await asyncio.to_thread(_remove, folder)

    async def _stream(self, child: Child, rows: EvaluationRows, job: Job, progress: Progress) -> Finding:
        order = job.order
        tally = Tally(order.metric or Metric.ACCURACY, top_k=order.top_k, bound=order.bound)
        stream = BatchStream(
            child.address,
            model=MODEL_NAME,
            outputs=order.spec.outputs,
            rows_per_batch=rows_per_batch(order.spec, rows.row_bytes),
        )

        def take(start: int, stop: int, logits: NDArray[np.float32]) -> None:
            try:
                tally.add(logits, rows.labels(start, stop))
            except ValueError as error:
                raise CannotEvaluate(f"rows {start} to {stop} of the dataset: {error}") from error
            progress.advance(stop)

        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._streams, stream.run, rows, take)
        patience_s = stall_s(order)
        try:
            await while_it_moves(running, progress, patience_s, lambda: _cpu_s(child.pid))
        except NanOutput as error:
            raise ModelFailed(Fault.NAN_OUTPUT, str(error)) from error
        except WrongAnswer as error:
            raise ModelFailed(Fault.SHAPE_MISMATCH, str(error)) from error
        except RequestRefused as error:
            raise ModelFailed(Fault.CRASHED, f"the model server refused a batch: {error}") from error
        except StreamBroken as error:
            await _raise_by_end(child, str(error))
        except TimeoutError as error:
            raise ModelFailed(Fault.TOO_SLOW, f"no batch was answered for {patience_s:g} s") from error
        finally:
            stream.cancel()
            if not running.done():
                # A channel closes only when what was handed to its socket has been read, which a hanging model server
                # would never do.
                await child.kill()
            # The thread reads the file until it ends.
            with contextlib.suppress(Exception):
                await asyncio.shield(running)
        return Finding(counts=tally.counts(), prediction_blocks=tally.prediction_blocks())


def _put(model: Path, place: Path) -> None:
    """Has a model's file in a child's folder, by a second name where the file system gives it one."""
    try:
        place.hardlink_to(model)
    except OSError as error:
        if error.errno not in _NO_SECOND_NAME:
            raise
        shutil.copyfile(model, place)


def _remove(folder: Path) -> None:
    """Removes a folder that a model server may have written to, as far as that lets itself be removed."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)


def stall_s(order: Order) -> float:
    """Seconds without an answered batch after which a model server counts as hanging."""
    return max(_LEAST_STALL_S, 2 * order.max_cpu_s)


async def while_it_moves(
    running: "asyncio.Future[None]", progress: Progress, stall_s: float, cpu_s: Callable[[], float] = lambda: 0.0
) -> None:
    """Waits for `running`. Raises TimeoutError when `progress`, and `cpu_s` but for a share, stood for `stall_s`."""
    while True:
        before, cpu_before_s = progress.position, cpu_s()
        done, _ = await asyncio.wait([running], timeout=stall_s)
        if done:
            return running.result()
        if progress.position == before and cpu_s() - cpu_before_s < _COMPUTING_SHARE * stall_s:
            raise TimeoutError


def _cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, 0 when it has ended; proc_pid_stat(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _raise_by_end(child: Child, detail: str) -> NoReturn:
    try:
        async with asyncio.timeout(_EXIT_TIMEOUT_S):
            exit_ = await child.wait()
    except TimeoutError:
        raise ModelFailed(Fault.CRASHED, f"the model server broke off: {detail}") from None
    _raise_by(exit_)


def _raise_by(exit_: Exit) -> NoReturn:
    if exit_.kind in _FAULT_OF:
        raise ModelFailed(_FAULT_OF[exit_.kind], exit_.detail)
    raise ServerLost(exit_.detail)
