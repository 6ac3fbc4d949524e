"""Child processes that train: started, listened to, and never left behind."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog

from services.runtime.errors import NotFound
from services.trainer import runfolder
from services.trainer.bases import base_model_path
from services.trainer.datareport import DataReport
from services.trainer.ends import Broken, Died, End, Note, Preparation, Stage, Trained, Warned
from services.trainer.leftovers import RUN_VARIABLE, end_processes
from services.trainer.localdata import DataFolder, LocalFile
from services.trainer.progress import Progress
from services.trainer.training import Training

# From SIGTERM to SIGKILL. One that is to go on has time for a step and a large checkpoint, within what a container is
# given to stop; one that is not ends within a second.
STOP_GRACE_S = 15.0
CANCEL_GRACE_S = 0.6
# A child has no settings of ours, and nothing to tell a collector: this process tells of it.
_NOT_FOR_CHILDREN = ("TILTYARD_", "OTEL_")
_MAX_LINE_BYTES = 1024 * 1024
_LOG_TAIL_BYTES = 4096

_log = structlog.get_logger("tiltyard.trainer")


class ChildProcesses:
    """Runs each training by `python -m services.trainer.descent.child`, in a process group and a folder of its own."""

    def __init__(self, *, folder: Path, bases: Path, data: DataFolder, threads: int) -> None:
        self._folder = folder
        self._bases = bases
        self._data = data
        self._threads = threads

    async def train(
        self,
        training: Training,
        *,
        device: str,
        report: Callable[[Progress], None],
        note: Callable[[Note], None],
        goes_on: Callable[[], bool],
    ) -> End:
        """Starts or resumes the training's process and waits for its end. When cancelled, the process is gone.

        Raises NotFound where its dataset is not there or cannot be reached.
        """
        folder = self._folder / training.id
        dataset = await asyncio.to_thread(self._located, training)
        if dataset.mark != training.dataset_mark:
            return Broken("the dataset has changed since the training was started")
        order = runfolder.Order(
            dataset=dataset.path,
            source=dataset.source,
            data=self._data.folder,
            packed_bytes=self._data.packed_bytes,
            spec=training.spec,
            loss=training.loss,
            config=training.config,
            device=device,
            threads=self._threads,
            base_model=base_model_path(self._bases, training.base_model) if training.base_model else None,
        )
        await asyncio.to_thread(runfolder.prepare, folder, order)
        # A service that was killed could not end what its child had started.
        await asyncio.to_thread(end_processes, folder)
        process = await self._start(folder)
        try:
            return await _listen(process, folder, report, note)
        finally:
            await _to_its_end(_stop(process, folder, STOP_GRACE_S if goes_on() else CANCEL_GRACE_S))

    def _located(self, training: Training) -> LocalFile:
        try:
            return self._data.locate(training.dataset, training.loss)
        except OSError as error:
            what = f"the dataset {training.dataset!r} cannot be reached: {error.strerror}"
            raise NotFound("DATASET_NOT_FOUND", what) from error

    async def clear(self, training: Training) -> None:
        """Keeps the model of a training that has one to show, and nothing of any other.

        What cannot be removed stays until the next start: the training has ended all the same.
        """
        await self._cleared(training, keep_model=bool(training.model_digest))
        # What it had its dataset packed into may stay for others, within the bound.
        await asyncio.to_thread(self._data.copies.bound)

    async def let_go(self, training: Training) -> None:
        """Makes room: of a run that is not to go on there stays a model, and the mark that it was asked to stop."""
        await self._cleared(training, keep_model=True, keep_mark=True)

    async def _cleared(self, training: Training, *, keep_model: bool, keep_mark: bool = False) -> None:
        folder = self._folder / training.id
        try:
            await asyncio.to_thread(_clear, folder, keep_model=keep_model, keep_mark=keep_mark)
        except OSError as error:
            _log.warning("what a training left cannot be removed", training=training.id, error=str(error))

    async def mark_cancelled(self, training: Training) -> None:
        """Keeps durably, beside the run, that it was asked to stop. Raises OSError."""
        await asyncio.to_thread(runfolder.mark_cancelled, self._folder / training.id)

    async def is_marked_cancelled(self, training: Training) -> bool:
        """Whether `mark_cancelled` was called for it."""
        return await asyncio.to_thread(runfolder.is_cancelled, self._folder / training.id)

    async def uncleared(self) -> list[str]:
        """The ids of all trainings of which more than a model is left."""
        return await asyncio.to_thread(
            lambda: [each.name for each in self._folder.iterdir() if each.is_dir() and not runfolder.is_clear(each)]
        )

    async def _start(self, folder: Path) -> asyncio.subprocess.Process:
        # The child needs nothing of what the service was told, least of all where its key lies.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_FOR_CHILDREN)}
        with runfolder.log(folder).open("wb") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "services.trainer.descent.child",
                str(folder),
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment | {"OMP_NUM_THREADS": str(self._threads), RUN_VARIABLE: str(folder)},
                limit=_MAX_LINE_BYTES,
                process_group=0,
            )


async def _listen(
    process: asyncio.subprocess.Process,
    folder: Path,
    report: Callable[[Progress], None],
    note: Callable[[Note], None],
) -> End:
    """What the process says until it has ended, and what that means."""
    end: End | None = None
    assert process.stdout is not None  # it is a pipe
    async for line in process.stdout:
        event = _event(line)
        match event.get("event"):
            case "progress":
                report(Progress.from_json(event["point"]))
            case "trained":
                end = Trained(bytes.fromhex(event["model_digest"]))
            case "broken":
                end = Broken(event["error"])
            case "warning":
                note(Warned(event["text"]))
            case "preparing":
                note(Preparation(Stage(event["stage"]), event["rows"], event["total_rows"]))
            case "data":
                note(DataReport.from_json(event["report"]))
    code = await process.wait()
    if end is not None:
        return end
    tail = await asyncio.to_thread(_log_tail, folder)
    detail = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return Died(f"{detail}{f' ({tail})' if tail else ''}")


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}  # the last line of a process that was killed while it wrote
    return event if isinstance(event, dict) else {}


async def _to_its_end(work: Coroutine[None, None, None]) -> None:
    """Waits for work that must be done also when this task is cancelled, and when it is cancelled again meanwhile."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


async def _stop(process: asyncio.subprocess.Process, folder: Path, grace_s: float) -> None:
    """Ends the whole process group and waits for it, then whatever of the run has left the group."""
    if process.returncode is None:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await process.wait()
    _signal(process, signal.SIGKILL)
    await process.wait()
    await asyncio.to_thread(end_processes, folder)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _log_tail(folder: Path) -> str:
    """The last line that the process wrote to standard error, for people."""
    try:
        with runfolder.log(folder).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return ""
    return lines[-1][:500] if lines else ""


def _clear(folder: Path, *, keep_model: bool, keep_mark: bool = False) -> None:
    end_processes(folder)
    shutil.rmtree(runfolder.scratch(folder), ignore_errors=True)
    if keep_model:
        runfolder.clear(folder, keep_mark=keep_mark)
    else:
        shutil.rmtree(folder, ignore_errors=True)
