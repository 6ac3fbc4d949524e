"""What a caller can do with trainings: start, read, list, watch and cancel them."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

from services.runtime.errors import FailedPrecondition, InvalidArgument, Unavailable
from services.trainer.config import LossKind, TrainingConfig
from services.trainer.live import LiveTrainings
from services.trainer.localdata import LocalDataset
from services.trainer.schedule import completed
from services.trainer.training import Training, TrainingPage, TrainingState, TrainingStore
from tiltyard.modelspec import ModelSpec, Onnx
from tiltyard.telemetry import tracing

# Small datasets are learned by heart long before the weights stop moving; smoothed labels keep them from it.
DEFAULT_LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class TaskFacts:
    """What a training has to know of a task: its models and objective, and whether it takes submissions.

    `base_model` is the SHA-256 in hex of the weights to begin with; empty where each node begins with its own.
    """

    models: Sequence[ModelSpec]
    loss: LossKind
    open: bool
    base_model: str = ""


@dataclass(frozen=True)
class NewTraining:
    """What is asked for. With a `task` (a bare id) model and loss are the task's; without one they are given.

    Epochs and label smoothing that are not given follow from the data and the loss.
    """

    task: str
    model_index: int
    dataset: str
    config: TrainingConfig
    epochs_given: bool
    label_smoothing_given: bool
    submit: bool
    spec: ModelSpec | None
    loss: LossKind


class TaskReader(Protocol):
    """The registry, as far as the start of a training needs it."""

    async def task(self, task: str) -> TaskFacts:
        """Raises NotFound for an unknown task, Unavailable when the registry cannot be asked."""
        ...

    async def check_membership(self, task: str) -> None:
        """Raises FailedPrecondition (NOT_A_TRAINING_NODE) unless this node is a training node of the task."""
        ...


class Datasets(Protocol):
    """The node's datasets; services.trainer.localdata.DataFolder is the real one."""

    async def check(self, dataset: str, *, spec: ModelSpec, loss: LossKind) -> LocalDataset:
        """Raises InvalidArgument or NotFound for a dataset that this model cannot be trained on."""
        ...


class Queue(Protocol):
    """Who runs what has been written down."""

    def wake(self) -> None:
        """Something was queued."""
        ...

    async def mark_cancelled(self, training: Training) -> None:
        """Keeps beside its run that a training was asked to stop, where the store takes nothing. Raises OSError."""
        ...

    def interrupt(self, training: str) -> None:
        """Stops a training's process, if there is one; the training was asked to stop."""
        ...


class Trainings:
    """The trainings of this node."""

    def __init__(
        self,
        *,
        store: TrainingStore,
        live: LiveTrainings,
        queue: Queue,
        datasets: Datasets,
        tasks: TaskReader,
        new_id: Callable[[], str],
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._live = live
        self._queue = queue
        self._datasets = datasets
        self._tasks = tasks
        self._new_id = new_id
        self._clock = clock

    async def start(self, new: NewTraining) -> Training:
        """Checks everything that can be checked before the first step, writes the training down, and queues it.

        Raises InvalidArgument, NotFound for a task or dataset, FailedPrecondition for a submission that the task does
        not take from this node, or for a base model that this node may not read.
        """
        spec, loss, base_model = await self._model(new)
        if isinstance(spec.architecture, Onnx):
            field = "model_index" if new.task else "model.onnx"
            raise InvalidArgument.field(field, "is an ONNX graph, which cannot be trained here, only submitted")
        _check_config(new.config, spec=spec, loss=loss)
        dataset = await self._datasets.check(new.dataset, spec=spec, loss=loss)
        config = _completed(new, rows=dataset.rows, loss=loss)
        training = await self._store.create(
            Training(
                id=self._new_id(),
                task=new.task,
                model_index=new.model_index,
                dataset=new.dataset,
                dataset_mark=dataset.mark,
                spec=spec,
                loss=loss,
                config=config,
                submit=new.submit,
                created_at=self._clock(),
                base_model=base_model,
                trace=tracing.carried(),
            )
        )
        self._live.publish(training)
        self._queue.wake()
        return training

    async def get(self, training: str) -> Training:
        """The training with its newest progress. Raises NotFound."""
        return self._live.get(training) or await self._store.get(training)

    async def page(self, *, cursor: str, size: int) -> TrainingPage:
        """Trainings newest first."""
        page = await self._store.page(cursor=cursor, size=size)
        return replace(page, trainings=[self._live.get(each.id) or each for each in page.trainings])

    async def watch(self, training: str) -> AsyncGenerator[Training, None]:
        """The training at each point of its history, then at each change, until it has ended. Raises NotFound."""
        changed = self._live.next_change(training)
        current = await self.get(training)
        history = self._live.history(training) or await self._store.history(training)
        for point in history[:-1]:
            yield replace(current, state=TrainingState.RUNNING, error="", progress=point, ended_at=None)
        yield current
        while not current.ended:
            await changed.wait()
            changed = self._live.next_change(training)
            current = await self.get(training)
            yield current

    async def cancel(self, training: str) -> Training:
        """Asks a training to stop; one that has ended stays as it is. Raises NotFound.

        What runs is stopped also while the store takes nothing, as on a full disk, and is not resumed after a restart.
        Raises Unavailable where that cannot be kept beside the run either: then nothing has changed.
        """
        try:
            asked = await self._store.change(training, lambda each: each.cancel(now=self._clock()), answers=True)
        except Unavailable as error:
            asked = await self._cancel_beside_the_run(training, error)
        if self._live.get(training) is not None:
            self._live.publish(asked)
        self._queue.interrupt(training)
        return asked

    async def _cancel_beside_the_run(self, training: str, trouble: Unavailable) -> Training:
        current = await self.get(training)
        if current.ended:
            return current
        try:
            await self._queue.mark_cancelled(current)
        except OSError:
            raise trouble from None
        return replace(current, cancel_requested=True)

    async def _model(self, new: NewTraining) -> tuple[ModelSpec, LossKind, str]:
        """What is trained, by which objective, and what it begins with."""
        if not new.task:
            assert new.spec is not None  # the request was checked for it
            return new.spec, new.loss, ""
        facts = await self._tasks.task(new.task)
        if not 0 <= new.model_index < len(facts.models):
            raise InvalidArgument.field(
                "model_index", f"is {new.model_index}, but the task has {len(facts.models)} models", "OUT_OF_RANGE"
            )
        if new.submit and not facts.open:
            raise FailedPrecondition("TASK_NOT_OPEN", f"tasks/{new.task} takes no submissions", task=new.task)
        base_model = "" if new.config.from_scratch else facts.base_model
        if new.submit or base_model:
            # A base model is for the task's training nodes alone.
            await self._tasks.check_membership(new.task)
        return facts.models[new.model_index], facts.loss, base_model


def _completed(new: NewTraining, *, rows: int | None, loss: LossKind) -> TrainingConfig:
    config = new.config
    if not new.epochs_given:
        config = replace(config, epochs=0)
        if rows is not None:
            config = completed(config, rows=rows)
    if not new.label_smoothing_given and loss is LossKind.CROSS_ENTROPY:
        config = replace(config, label_smoothing=DEFAULT_LABEL_SMOOTHING)
    return config


def _check_config(config: TrainingConfig, *, spec: ModelSpec, loss: LossKind) -> None:
    """What depends on the model, which may be the task's."""
    if config.augment and len(spec.input_shape) < 2:
        raise InvalidArgument.field("config.augment", f"needs images, rows have the shape {spec.input_shape}")
    if config.label_smoothing and loss is not LossKind.CROSS_ENTROPY:
        raise InvalidArgument.field("config.label_smoothing", f"is for cross-entropy, the loss is {loss}")
    if config.class_weights:
        if loss is not LossKind.CROSS_ENTROPY:
            raise InvalidArgument.field("config.class_weights", f"are for cross-entropy, the loss is {loss}")
        if len(config.class_weights) != spec.outputs:
            raise InvalidArgument.field(
                "config.class_weights", f"are {len(config.class_weights)}, but the model has {spec.outputs} outputs"
            )
