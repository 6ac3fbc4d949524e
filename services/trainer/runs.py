"""The queue: takes trainings in order onto free devices, sees each through to its end, and resumes after a restart."""

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

import structlog

from services.runtime.errors import Aborted, ArenaError, ResourceExhausted, Unavailable
from services.trainer.datareport import DataReport
from services.trainer.live import LiveTrainings
from services.trainer.progress import Progress
from services.trainer.training import Training, TrainingState, TrainingStore

# A process that dies again and again at one place (the kernel's memory killer, a broken device) is given up.
MAX_DEATHS = 4
HISTORY_INTERVAL_S = 2.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 30.0
# A quota may be raised meanwhile, so it is asked again.
_LONGEST_WAIT_S = 600.0

_log = structlog.get_logger("tiltyard.trainer")


@dataclass(frozen=True)
class Trained:
    """The model is in the run's folder and has passed its self-check; `model_digest` is SHA-256 of its file."""

    model_digest: bytes


@dataclass(frozen=True)
class Broken:
    """The training cannot go on, for a reason that another attempt would meet again."""

    error: str


@dataclass(frozen=True)
class Died:
    """The process ended without a word, as when it is killed; it may go on from its last checkpoint."""

    detail: str


End = Trained | Broken | Died


@dataclass(frozen=True)
class Warned:
    """The training goes on in spite of something."""

    text: str


Note = Warned | DataReport


class Children(Protocol):
    """Runs trainings in processes of their own."""

    async def train(
        self, training: Training, *, device: str, report: Callable[[Progress], None], note: Callable[[Note], None]
    ) -> End:
        """Starts or resumes the training's process and waits for its end. When cancelled, the process is gone."""
        ...

    async def clear(self, training: Training) -> None:
        """Removes what an ended training no longer needs."""
        ...


class Submitter(Protocol):
    """The registry, as far as the end of a training needs it."""

    async def submit(self, training: Training) -> str:
        """Commits, uploads and reveals the model, or goes on where that stopped; the submission's name."""
        ...


class Runs:
    """Sees every training through. `devices` names the devices, each of which takes `runs_per_device` at once."""

    def __init__(
        self,
        *,
        store: TrainingStore,
        live: LiveTrainings,
        children: Children,
        submitter: Submitter,
        devices: Callable[[], Awaitable[Sequence[str]]],
        runs_per_device: int,
        on_model: Callable[[Training], Awaitable[None]],
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._live = live
        self._children = children
        self._submitter = submitter
        self._devices = devices
        self._runs_per_device = runs_per_device
        self._on_model = on_model
        self._clock = clock
        self._wake = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._interrupted: set[str] = set()

    def wake(self) -> None:
        """Something was queued."""
        self._wake.set()

    def interrupt(self, training: str) -> None:
        """Stops what runs for a training that was asked to stop."""
        task = self._tasks.get(training)
        if task is not None and training not in self._interrupted:
            self._interrupted.add(training)
            task.cancel()

    async def run(self) -> None:
        """Works until it is cancelled; then every process is gone and every state is written down."""
        free = list(itertools.chain.from_iterable([device] * self._runs_per_device for device in await self._devices()))
        try:
            await self._recover()
            while True:
                self._wake.clear()
                for training in self._live.all():
                    if training.id in self._tasks:
                        continue
                    if training.state is TrainingState.SUBMITTING:
                        self._begin(training, None, free)
                    elif training.state is TrainingState.QUEUED and free:
                        self._begin(training, free.pop(0), free)
                await self._wake.wait()
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _recover(self) -> None:
        for found in await self._store.unended():
            training = await self._store.change(found.id, Training.queued)
            if training.cancel_requested:
                await self._end(training.id, lambda each: each.cancelled(now=self._clock()))
            else:
                self._live.publish(training, await self._store.history(training.id))

    def _begin(self, training: Training, device: str | None, free: list[str]) -> None:
        task = asyncio.create_task(self._see_through(training, device), name=f"training {training.id}")
        self._tasks[training.id] = task

        def ended(_: asyncio.Task[None]) -> None:
            self._tasks.pop(training.id, None)
            self._interrupted.discard(training.id)
            if device is not None:
                free.append(device)
            self._wake.set()

        task.add_done_callback(ended)

    async def _see_through(self, training: Training, device: str | None) -> None:
        try:
            if device is None:
                await self._submit(training)
            else:
                await self._train(training, device)
        except asyncio.CancelledError:
            if training.id not in self._interrupted:
                await self._keep_history(training.id)
                raise
            point = self._newest(training.id)
            await self._end(training.id, lambda each: each.cancelled(now=self._clock(), progress=point))
        except ArenaError as error:
            await self._fail(training.id, error.message)  # its dataset is gone, say
        except Exception as error:
            # One training's trouble must not stop the queue.
            _log.error("a training failed unexpectedly", training=training.id, exc_info=error)
            await self._fail(training.id, f"internal error: {type(error).__name__}; see the service's log")

    async def _train(self, training: Training, device: str) -> None:
        training = await self._store.change(training.id, lambda each: each.running(device=device, now=self._clock()))
        self._live.publish(training)
        if training.ended:
            await self._children.clear(training)
            return
        keeper = asyncio.create_task(self._keep_history_now_and_then(training.id))
        try:
            end = await self._until_end(training, device)
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        match end:
            case Trained(model_digest=digest):
                await self._on_model(training)
                point = self._newest(training.id)
                # The device is free from here on: what is left to do needs the network only.
                await self._end(
                    training.id, lambda each: each.trained(model_digest=digest, progress=point, now=self._clock())
                )
            case Broken(error=error):
                await self._fail(training.id, error)
            case Died(detail=detail):
                await self._fail(training.id, f"the training process died {MAX_DEATHS} times, at last: {detail}")

    async def _until_end(self, training: Training, device: str) -> End:
        deaths, furthest, pause_s = 0, -1, _FIRST_PAUSE_S
        while True:
            end = await self._children.train(
                training,
                device=device,
                report=lambda point: self._live.report(training.id, point),
                note=lambda note: self._note(training.id, note),
            )
            if not isinstance(end, Died):
                return end
            point = self._newest(training.id)
            step = point.step if point else 0
            if step > furthest:
                deaths, furthest, pause_s = 0, step, _FIRST_PAUSE_S
            deaths += 1
            _log.warning("a training process died", training=training.id, detail=end.detail, step=step, deaths=deaths)
            if deaths == MAX_DEATHS:
                return end
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _submit(self, training: Training) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                submission = await self._submitter.submit(training)
                break
            except ResourceExhausted as error:
                if error.retry_after_s is None:
                    await self._fail(training.id, f"the registry refused the model: {error.message} ({error.reason})")
                    return
                # A limit of submissions a day, say: the model is none the worse for waiting.
                self._note(training.id, Warned(f"waits {math.ceil(error.retry_after_s)} s to submit: {error.message}"))
                await self._keep_history(training.id)
                await asyncio.sleep(min(error.retry_after_s, _LONGEST_WAIT_S))
                continue
            except (Unavailable, Aborted) as error:
                _log.warning("the registry cannot be reached", training=training.id, error=error.message)
            except ArenaError as error:
                await self._fail(training.id, f"the registry refused the model: {error.message} ({error.reason})")
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        await self._end(training.id, lambda each: each.submitted(submission=submission, now=self._clock()))

    async def _fail(self, training: str, error: str) -> None:
        point = self._newest(training)
        await self._end(training, lambda each: each.failed(error=error, progress=point, now=self._clock()))

    async def _end(self, training: str, change: Callable[[Training], Training]) -> None:
        await self._keep_history(training)
        ended = await self._store.change(training, change)
        if ended.ended:
            await self._children.clear(ended)
        self._live.publish(ended)

    def _note(self, training: str, note: Note) -> None:
        match note:
            case Warned(text=text):
                _log.warning("a training goes on in spite of trouble", training=training, trouble=text)
                self._live.amend(training, lambda each: each.warned(text))
            case DataReport() as data:
                self._live.amend(training, lambda each: each.examined(data))

    def _newest(self, training: str) -> Progress | None:
        current = self._live.get(training)
        return current.progress if current else None

    async def _keep_history_now_and_then(self, training: str) -> None:
        while True:
            await asyncio.sleep(HISTORY_INTERVAL_S)
            await self._keep_history(training)

    async def _keep_history(self, training: str) -> None:
        points = self._live.history(training)
        if points:
            await self._store.keep_history(training, points)
        current = self._live.get(training)
        if current is not None and (current.warnings or current.data):
            noted = current
            await self._store.change(training, lambda each: replace(each, warnings=noted.warnings, data=noted.data))
