"""The queue: takes trainings in order onto free devices, sees each through to its end, and resumes after a restart."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Protocol, TypeVar

import structlog

from services.runtime.errors import ArenaError, NotFound, Unavailable
from services.trainer import training_metrics
from services.trainer.datareport import DataReport
from services.trainer.ends import Broken, Died, End, Note, Preparation, Trained, Warned
from services.trainer.live import LiveTrainings
from services.trainer.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S, persist
from services.trainer.progress import Progress
from services.trainer.recovery import Remains, recover
from services.trainer.training import Training, TrainingState, TrainingStore
from tiltyard.telemetry import tracing

# A process that dies again and again at one place (the kernel's memory killer, a broken device) is given up.
MAX_DEATHS = 4
# A drive may be mounted after the node has come up: what has been learned so far is worth some waiting.
DATASET_PATIENCE_S = 600.0
HISTORY_INTERVAL_S = 2.0

T = TypeVar("T")

_log = structlog.get_logger("tiltyard.trainer")


class Children(Remains, Protocol):
    """Runs trainings in processes of their own."""

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

        `goes_on` then tells whether it is to be resumed: its last checkpoint is worth some waiting.
        Raises NotFound where its dataset is not there, before anything is started, and OSError where it cannot be
        started, as on a full disk.
        """
        ...

    async def let_go(self, training: Training) -> None:
        """Makes room: of a run that is not to go on there stays a model, and the mark that it was asked to stop."""
        ...

    async def mark_cancelled(self, training: Training) -> None:
        """Keeps durably, beside the run, that it was asked to stop. Raises OSError."""
        ...


class Submitter(Protocol):
    """The registry, as far as the end of a training needs it."""

    async def submit(self, training: Training) -> str:
        """Commits, uploads and reveals the model, or goes on where that stopped; the submission's name."""
        ...


class Bases(Protocol):
    """The base models; services.trainer.bases.BaseModels is the real one."""

    async def fetch(self, training: Training) -> None:
        """Has the training's base model on this node. Raises Unavailable, OSError, ArenaError for one of no use."""
        ...

    async def keep(self, digests: Collection[str]) -> None:
        """Removes every other one."""
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
        bases: Bases,
        devices: Sequence[str],
        runs_per_device: int,
        on_model: Callable[[Training], Awaitable[None]],
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._live = live
        self._children = children
        self._submitter = submitter
        self._bases = bases
        self._devices = devices
        self._runs_per_device = runs_per_device
        self._on_model = on_model
        self._clock = clock
        self._wake = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._interrupted: set[str] = set()
        self._held_back: set[str] = set()
        training_metrics.follow(live)
        self._fetched: set[str] = set()

    def wake(self) -> None:
        """Something was queued."""
        self._wake.set()

    async def mark_cancelled(self, training: Training) -> None:
        """Keeps beside its run that a training was asked to stop, where the store takes nothing. Raises OSError."""
        await self._children.mark_cancelled(training)

    def interrupt(self, training: str) -> None:
        """Stops what runs for a training that was asked to stop."""
        task = self._tasks.get(training)
        if task is None:
            self._wake.set()
        elif training not in self._interrupted:
            self._interrupted.add(training)
            task.cancel()

    async def run(self) -> None:
        """Works until it is cancelled; then every process is gone and every state is written down."""
        free = list(itertools.chain.from_iterable([device] * self._runs_per_device for device in self._devices))
        try:
            await persist(self._recover, say=_say_waiting)
            while True:
                self._wake.clear()
                for training in self._live.all():
                    if training.id in self._tasks or training.id in self._held_back:
                        continue
                    if training.cancel_requested:
                        # Asked to stop in the moment between two of its steps.
                        self._begin(training, "cancel", self._cancelled)
                    elif training.state is TrainingState.SUBMITTING:
                        self._begin(training, "submit", self._submit)
                    elif training.base_model and training.id not in self._fetched:
                        self._begin(training, "fetch base model", self._fetch)
                    elif free:
                        self._begin_on(free, training)
                await self._wake.wait()
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _recover(self) -> None:
        await recover(store=self._store, live=self._live, remains=self._children, clock=self._clock)
        await self._forget_bases()

    def _begin_on(self, free: list[str], training: Training) -> None:
        """Takes a free device, and gives it back."""
        device = free.pop(0)
        task = self._begin(training, "train", partial(self._train, device=device))
        task.add_done_callback(lambda _: free.append(device))

    def _begin(self, training: Training, step: str, work: Callable[[Training], Awaitable[None]]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._see_through(training, step, work), name=f"training {training.id}")
        self._tasks[training.id] = task

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.pop(training.id, None)
            self._interrupted.discard(training.id)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._hold_back(training.id, error)
            self._wake.set()

        task.add_done_callback(ended)
        return task

    def _hold_back(self, training: str, error: BaseException) -> None:
        """Begins it again later: at once it would fail again, and before all others."""
        _log.error("a training's end cannot be written down", training=training, exc_info=error)
        self._held_back.add(training)

        def release() -> None:
            self._held_back.discard(training)
            self._wake.set()

        asyncio.get_running_loop().call_later(LONGEST_PAUSE_S, release)

    async def _see_through(self, training: Training, step: str, work: Callable[[Training], Awaitable[None]]) -> None:
        try:
            with tracing.span(step, parent=training.trace, training=training.id):
                await work(training)
        except asyncio.CancelledError:
            if training.id not in self._interrupted:
                await self._keep_history(training.id)
                raise
            await self._cancelled(training)
        except ArenaError as error:
            await self._fail(training.id, error.message)  # its dataset is gone, say
        except Exception as error:
            # One training's trouble must not stop the queue.
            _log.error("a training failed unexpectedly", training=training.id, exc_info=error)
            await self._fail(training.id, f"internal error: {type(error).__name__}; see the service's log")

    async def _cancelled(self, training: Training) -> None:
        # What it holds goes first: on a full disk that is the room to write down that it has ended.
        await self._children.let_go(training)
        point = self._newest(training.id)
        await self._end(training.id, lambda each: each.cancelled(now=self._clock(), progress=point))

    async def _fetch(self, training: Training) -> None:
        """Gets what it begins with while others have the devices."""
        try:
            await self._persist(training.id, lambda: self._bases.fetch(training))
        except ArenaError as error:
            await self._fail(training.id, f"{error.message} ({error.reason})")
            return
        self._fetched.add(training.id)

    async def _train(self, training: Training, *, device: str) -> None:
        training = await self._change(training.id, lambda each: each.running(device=device, now=self._clock()))
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
        attempt = partial(
            self._children.train,
            training,
            device=device,
            report=partial(self._live.report, training.id),
            note=partial(self._note, training.id),
            goes_on=lambda: training.id not in self._interrupted,
        )
        deaths, furthest, pause_s = 0, -1, FIRST_PAUSE_S
        while True:
            end = await self._persist(training.id, partial(self._with_dataset, training.id, attempt))
            if not isinstance(end, Died):
                return end
            point = self._newest(training.id)
            step = point.step if point else 0
            if step > furthest:
                deaths, furthest, pause_s = 0, step, FIRST_PAUSE_S
            deaths += 1
            training_metrics.DEATHS.add()
            _log.warning("a training process died", training=training.id, detail=end.detail, step=step, deaths=deaths)
            if deaths == MAX_DEATHS:
                return end
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _with_dataset(self, training: str, attempt: Callable[[], Awaitable[End]]) -> End:
        """An attempt; of a training that has made a step, also after its dataset was away for a while."""
        give_up, pause_s = time.monotonic() + DATASET_PATIENCE_S, FIRST_PAUSE_S
        while True:
            try:
                return await attempt()
            except NotFound as error:
                if self._newest(training) is None or time.monotonic() >= give_up:
                    raise
                self._note(training, Warned(f"waits: {error.message}"))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _submit(self, training: Training) -> None:
        try:
            # A limit of submissions a day, say: the model is none the worse for waiting.
            submission = await self._persist(training.id, lambda: self._submitter.submit(training))
        except ArenaError as error:
            await self._fail(training.id, f"the registry refused the model: {error.message} ({error.reason})")
            return
        await self._end(training.id, lambda each: each.submitted(submission=submission, now=self._clock()))

    async def _fail(self, training: str, error: str) -> None:
        point = self._newest(training)
        await self._end(training, lambda each: each.failed(error=error, progress=point, now=self._clock()))

    async def _end(self, training: str, change: Callable[[Training], Training]) -> None:
        await self._persist(training, lambda: self._write_history(training))
        ended = await self._change(training, lambda each: change(self._noted(each)))
        if ended.ended:
            training_metrics.ENDED.add(state=ended.state.value)
            await self._children.clear(ended)
        self._live.publish(ended)
        if ended.ended and ended.base_model:
            self._fetched.discard(training)
            await self._forget_bases()

    async def _change(self, training: str, change: Callable[[Training], Training]) -> Training:
        """Writes a change down, once the database takes it."""
        return await self._persist(training, lambda: self._store.change(training, change))

    async def _persist(self, training: str, work: Callable[[], Awaitable[T]]) -> T:
        async def say(text: str) -> None:
            self._note(training, Warned(text))
            await self._keep_history(training)

        return await persist(work, say=say)

    async def _forget_bases(self) -> None:
        await self._bases.keep({each.base_model for each in self._live.all() if each.base_model})

    def _note(self, training: str, note: Note) -> None:
        match note:
            case Warned(text=text):
                _log.warning("a training goes on in spite of trouble", training=training, trouble=text)
                self._live.amend(training, lambda each: each.warned(text))
            case DataReport() as data:
                self._live.amend(training, lambda each: each.examined(data))
            case Preparation() as preparation:
                self._live.amend(training, lambda each: replace(each, preparation=preparation))

    def _newest(self, training: str) -> Progress | None:
        current = self._live.get(training)
        return current.progress if current else None

    async def _keep_history_now_and_then(self, training: str) -> None:
        while True:
            await asyncio.sleep(HISTORY_INTERVAL_S)
            await self._keep_history(training)

    async def _keep_history(self, training: str) -> None:
        """Writes down how far it is; what cannot be written now is written with the next point."""
        try:
            await self._write_history(training)
        except Unavailable as error:
            _log.warning("a training's history was not kept", training=training, error=error.message)

    async def _write_history(self, training: str) -> None:
        if points := self._live.history(training):
            await self._store.keep_history(training, points)
        current = self._live.get(training)
        if current is not None and (current.warnings or current.data):
            await self._store.change(training, self._noted)

    def _noted(self, training: Training) -> Training:
        """A training with what has been noted of it since it was written down."""
        current = self._live.get(training.id)
        if current is None:
            return training
        return replace(training, warnings=current.warnings, data=current.data, config=current.config)


async def _say_waiting(trouble: str) -> None:
    _log.warning("the queue waits for its database", trouble=trouble)
