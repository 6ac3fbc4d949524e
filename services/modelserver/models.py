"""The models that a server holds: loaded from folders by name within a memory budget, run on batches."""

import asyncio
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from services.modelserver import QUEUE_BYTES
from services.modelserver.batching import BatchQueue
from services.modelserver.loading import LoadedModel, load, look_at, memory_budget, resolve_device
from services.modelserver.running import Batch, Logits, check_batch, run_batches
from services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from tiltyard.models import Network
from tiltyard.modelspec import ModelFault, ModelSpec, count_parameters

VERSION = "1"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")


@dataclass(frozen=True)
class IndexEntry:
    """One model of the repository: whether it answers, and if not, what was wrong with it when it was loaded."""

    name: str
    ready: bool
    reason: str


class Models:
    """The loaded models of one process, and the folder that others can be loaded from.

    A model NAME is the folder NAME of the repository with `spec.json` and `model.safetensors`. The weights of all take
    at most `memory_bytes` (0: half of the device's memory): the least recently used makes room, and is loaded again by
    the next batch for it. Batches of all callers run one after another in one thread, which torch spreads over
    `threads` cores (0: all); `queue_bytes` of them may wait, `delay_s` for others to join (`batching.BatchQueue`).
    `on_out_of_memory` is called when a batch of `run` cannot be held in memory; a process that serves one untrusted
    model ends there.
    """

    def __init__(
        self,
        *,
        repository: Path | None = None,
        device: str = "cpu",
        threads: int = 0,
        memory_bytes: int = 0,
        queue_bytes: int = QUEUE_BYTES,
        delay_s: float = 0.0,
        on_out_of_memory: Callable[[], None] | None = None,
    ) -> None:
        self._repository = repository
        self._device = resolve_device(device)
        self._budget = memory_bytes or memory_budget(self._device)
        self._on_out_of_memory = on_out_of_memory
        # The most recently used last.
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        # Served, but not in memory now.
        self._resting: dict[str, ModelSpec] = {}
        self._added: set[str] = set()
        self._failed: dict[str, str] = {}
        self._in_use: Counter[str] = Counter()
        self._loading = asyncio.Lock()
        if threads:
            torch.set_num_threads(threads)
        # By itself torch computes a GPU's convolutions in TF32, and answers differ from a CPU's in the third digit.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._queue = BatchQueue(run_batches, max_bytes=queue_bytes, delay_s=delay_s)
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loading")

    @property
    def memory_bytes(self) -> int:
        """Bytes that the weights of all models in memory take."""
        return sum(model.memory_bytes for model in self._loaded.values())

    @property
    def waiting(self) -> int:
        """Batches that wait for their turn."""
        return self._queue.waiting

    def ready(self, name: str) -> bool:
        """Whether a model answers, if need be after it has been loaded again."""
        return name in self._loaded or name in self._resting

    def in_memory(self) -> list[str]:
        """The models whose weights are in memory, the least recently used first."""
        return list(self._loaded)

    def spec(self, name: str, version: str = "") -> ModelSpec:
        """The spec of a model that answers. Raises NotFound."""
        self._check_served(name, version)
        return self._loaded[name].spec if name in self._loaded else self._resting[name]

    async def load(self, name: str) -> None:
        """Load a model from the repository, or load it anew; calls in flight keep what they began with.

        Raises InvalidArgument for a bad name, NotFound when there is no such folder, FailedPrecondition when its files
        do not make a model or it is larger than the budget, and then what was loaded before stays; ResourceExhausted
        when batches hold on to all other models.
        """
        folder = self._folder(name)
        async with self._loading:
            await self._load(name, folder)

    def load_folder_here(self, name: str, folder: Path) -> None:
        """Load a model from any folder under a name, whatever the budget, blocking this thread.

        Raises ModelFault, and MemoryError when it does not fit.
        """
        self._loaded[name] = load(folder, self._device)

    async def load_all(self, *, lazily: bool = False) -> None:
        """Serve every model of the repository: in memory as far as the budget goes, the others at their first batch.

        With `lazily` all of them at their first batch. One that does not load is in the index with its reason.
        """
        for name in self._names():
            try:
                stored = await asyncio.to_thread(look_at, self._folder(name))
            except ModelFault as fault:
                self._failed[name] = str(fault)
                continue
            if lazily or self.memory_bytes + stored.memory_bytes > self._budget:
                self._resting[name] = stored.spec
                continue
            try:
                await self.load(name)
            except (FailedPrecondition, ResourceExhausted) as error:
                self._failed[name] = str(error)

    def add(self, name: str, network: Network) -> None:
        """Serve a module that the process already has."""
        network.eval()
        self._added.add(name)
        self._loaded[name] = LoadedModel(network.spec, network, 4 * count_parameters(network.spec))

    async def unload(self, name: str) -> None:
        """Let a model go; calls in flight finish with it."""
        _check_name(name)
        async with self._loading:
            self._loaded.pop(name, None)
            self._resting.pop(name, None)
            self._failed.pop(name, None)
            self._added.discard(name)

    def index(self, *, ready_only: bool) -> list[IndexEntry]:
        """The models of the repository and those added, by name."""
        names = {*self._loaded, *self._resting, *(() if ready_only else self._names())}
        return [
            IndexEntry(name, ready=self.ready(name), reason="" if self.ready(name) else self._failed.get(name, ""))
            for name in sorted(names)
        ]

    async def infer(self, name: str, version: str, batch: Batch) -> Logits:
        """Run one batch. Raises NotFound when the model is not served, InvalidArgument when the batch does not fit it.

        When the queue is full, or memory does not suffice: ResourceExhausted.
        """
        check_batch(batch, self.spec(name, version))
        with self._used(name):
            if name not in self._loaded:
                await self._wake(name)
            self._loaded.move_to_end(name)
            return await self._queue.answer(self._loaded[name], batch)

    def run(self, name: str, version: str, batch: Batch) -> Logits:
        """`infer`, blocking this thread, without a queue; for callers that keep batches in order themselves."""
        check_batch(batch, self.spec(name, version))
        try:
            return run_batches(self._loaded[name], [batch])[0]
        except ResourceExhausted:
            if self._on_out_of_memory is not None:
                self._on_out_of_memory()
            raise

    def close(self) -> None:
        """End the threads after the batches that they have."""
        self._queue.close()
        self._loader.shutdown()

    async def _wake(self, name: str) -> None:
        folder = self._folder(name)
        async with self._loading:
            # Another batch for it may have come first.
            if name not in self._loaded:
                self._check_served(name)
                await self._load(name, folder)

    async def _load(self, name: str, folder: Path) -> None:
        """One at a time. Raises FailedPrecondition and ResourceExhausted."""
        loop = asyncio.get_running_loop()
        try:
            stored = await loop.run_in_executor(self._loader, look_at, folder)
            self._make_room(name, stored.memory_bytes)
            self._loaded[name] = await loop.run_in_executor(self._loader, load, folder, self._device)
        except ModelFault as fault:
            self._failed[name] = str(fault)
            raise FailedPrecondition(
                fault.code.value, f"model {name} does not load: {fault.detail}", model=name
            ) from fault
        except MemoryError as error:
            raise ResourceExhausted("OUT_OF_MEMORY", f"model {name} does not fit in memory", model=name) from error
        self._resting.pop(name, None)
        self._failed.pop(name, None)
        self._added.discard(name)

    def _make_room(self, name: str, wanted_bytes: int) -> None:
        if wanted_bytes > self._budget:
            raise FailedPrecondition(
                "MODEL_TOO_LARGE",
                f"model {name} takes {wanted_bytes} bytes, all models here may take {self._budget}",
                model=name,
            )
        others = [each for each in self._loaded if each != name]
        excess = wanted_bytes + sum(self._loaded[each].memory_bytes for each in others) - self._budget
        leaving = []
        # One that was added has no folder to come back from.
        for each in (each for each in others if not self._in_use[each] and each not in self._added):
            if excess <= 0:
                break
            leaving.append(each)
            excess -= self._loaded[each].memory_bytes
        if excess > 0:
            raise ResourceExhausted(
                "MODELS_IN_USE",
                f"there is no room for model {name} beside those in use",
                retry_after_s=self._queue.wait_s,
                model=name,
            )
        for each in leaving:
            spec = self._loaded.pop(each).spec
            # One whose folder is gone is over: whoever put it there forgot to unload it.
            if self._is_stored(each):
                self._resting[each] = spec

    @contextmanager
    def _used(self, name: str) -> Iterator[None]:
        self._in_use[name] += 1
        try:
            yield
        finally:
            self._in_use[name] -= 1
            if not self._in_use[name]:
                del self._in_use[name]

    def _check_served(self, name: str, version: str = "") -> None:
        _check_name(name)
        if version not in ("", VERSION) or not self.ready(name):
            raise NotFound("MODEL_NOT_LOADED", f"model {name} version {version or VERSION} is not loaded", model=name)

    def _folder(self, name: str) -> Path:
        _check_name(name)
        if self._repository is None or not self._is_stored(name):
            raise NotFound("MODEL_NOT_FOUND", f"the repository has no model {name}", model=name)
        return self._repository / name

    def _is_stored(self, name: str) -> bool:
        return self._repository is not None and (self._repository / name).is_dir()

    def _names(self) -> list[str]:
        if self._repository is None or not self._repository.is_dir():
            return []
        return sorted(path.name for path in self._repository.iterdir() if _NAME.match(path.name) and path.is_dir())


def _check_name(name: str) -> None:
    if not _NAME.match(name):
        raise InvalidArgument.field(
            "model_name", "must be 1 to 128 of A-Z, a-z, 0-9, _, - and ., first a letter or digit"
        )
