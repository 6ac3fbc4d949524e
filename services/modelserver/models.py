"""The models that a server holds: loaded from folders by name, run on batches in a thread of their own."""

import asyncio
import json
import math
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from services.modelserver.onnxmodel import GraphFailed, OnnxNetwork
from services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from tiltyard.models import Network, load_model
from tiltyard.modelspec import FaultCode, ModelFault, ModelSpec, Onnx, count_parameters, from_json, validate

WEIGHTS_FILE = "model.safetensors"
ONNX_FILE = "model.onnx"
SPEC_FILE = "spec.json"
VERSION = "1"
MAX_SPEC_BYTES = 1 << 20
MAX_PARAMETERS = 1 << 32
# protobuf's own limit: such a file is one message.
MAX_ONNX_BYTES = (1 << 31) - 1

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# What an answer may hold beside the logits.
ENVELOPE_BYTES = 64 * 1024

# Where the CPU computes; measured for perceptrons (a tenth faster) and convnets.
_PIECE_BYTES = 1024 * 1024
_LEAST_PIECE_ROWS = 64

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")

# The protocol's data types that a model takes; the network turns each into float32.
DATATYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "UINT16": torch.uint16,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}

with warnings.catch_warnings():
    # torch warns once in a process that a read-only buffer must not be written to; no batch ever is.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


@dataclass(frozen=True)
class Batch:
    """Rows for a model: `data` holds them row-major and little-endian in `datatype`, shape [n, ...input_shape]."""

    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True)
class Logits:
    """What a model answered: float32, row-major, shape [n, outputs] where the model keeps to its spec."""

    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True)
class IndexEntry:
    """One model of the repository: whether it is loaded, and if not, what was wrong with it when that was tried."""

    name: str
    ready: bool
    reason: str


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and the bytes that its weights take."""

    spec: ModelSpec
    network: Callable[[torch.Tensor], torch.Tensor]
    memory_bytes: int


class Models:
    """The loaded models of one process, and the folder that others can be loaded from.

    A model NAME is the folder NAME of the repository with `spec.json` and `model.safetensors`. Batches of all callers
    run one after another in one thread, which torch spreads over `threads` cores (0: all). `on_out_of_memory` is called
    in that thread when a batch cannot be held in memory; a process that serves one untrusted model ends there.
    """

    def __init__(
        self,
        *,
        repository: Path | None = None,
        device: str = "cpu",
        threads: int = 0,
        on_out_of_memory: Callable[[], None] | None = None,
    ) -> None:
        self._repository = repository
        self._device = _resolve(device)
        self._on_out_of_memory = on_out_of_memory
        self._loaded: dict[str, LoadedModel] = {}
        self._failed: dict[str, str] = {}
        if threads:
            torch.set_num_threads(threads)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loading")

    @property
    def memory_bytes(self) -> int:
        """Bytes that the weights of all loaded models take."""
        return sum(model.memory_bytes for model in self._loaded.values())

    def ready(self, name: str) -> bool:
        """Whether a model is loaded."""
        return name in self._loaded

    def spec(self, name: str, version: str = "") -> ModelSpec:
        """The spec of a loaded model. Raises NotFound."""
        return self._model(name, version).spec

    async def load(self, name: str) -> None:
        """Load a model from the repository, or load it anew; calls in flight keep what they began with.

        Raises InvalidArgument for a bad name, NotFound when there is no such folder, FailedPrecondition when its files
        do not make a model, and then what was loaded before stays.
        """
        folder = self._folder(name)
        try:
            await self.load_folder(name, folder)
        except ModelFault as fault:
            self._failed[name] = str(fault)
            raise FailedPrecondition(
                fault.code.value, f"model {name} does not load: {fault.detail}", model=name
            ) from fault

    async def load_folder(self, name: str, folder: Path) -> None:
        """Load a model from any folder under a name. Raises ModelFault, and MemoryError when it does not fit."""
        await asyncio.get_running_loop().run_in_executor(self._loader, self.load_folder_here, name, folder)

    def load_folder_here(self, name: str, folder: Path) -> None:
        """`load_folder`, blocking this thread."""
        self._loaded[name] = _read_model(folder, self._device)
        self._failed.pop(name, None)

    async def load_all(self) -> None:
        """Load every model of the repository; one that does not load is in the index with its reason."""
        for name in self._names():
            try:
                await self.load(name)
            except FailedPrecondition:
                continue  # its reason is in the index

    def add(self, name: str, network: Network) -> None:
        """Serve a module that the process already has."""
        network.eval()
        self._loaded[name] = LoadedModel(network.spec, network, 4 * count_parameters(network.spec))

    async def unload(self, name: str) -> None:
        """Let a model go; calls in flight finish with it."""
        _check_name(name)
        self._loaded.pop(name, None)

    def index(self, *, ready_only: bool) -> list[IndexEntry]:
        """The models of the repository and those added, by name."""
        names = set(self._loaded) | (set() if ready_only else set(self._names()))
        return [
            IndexEntry(
                name, ready=name in self._loaded, reason="" if name in self._loaded else self._failed.get(name, "")
            )
            for name in sorted(names)
        ]

    async def infer(self, name: str, version: str, batch: Batch) -> Logits:
        """Run one batch. Raises NotFound when the model is not loaded, InvalidArgument when the batch does not fit it.

        When memory does not suffice: ResourceExhausted, after `on_out_of_memory`.
        """
        model = self._model(name, version)
        _check_batch(batch, model.spec)
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._run, model, batch)

    def run(self, name: str, version: str, batch: Batch) -> Logits:
        """`infer`, blocking this thread; for callers that keep batches one after another themselves."""
        model = self._model(name, version)
        _check_batch(batch, model.spec)
        return self._run(model, batch)

    def close(self) -> None:
        """End the threads after the batches that they have."""
        self._worker.shutdown()
        self._loader.shutdown()

    def _run(self, model: LoadedModel, batch: Batch) -> Logits:
        try:
            with torch.inference_mode():
                rows = torch.frombuffer(batch.data, dtype=DATATYPES[batch.datatype]).reshape(batch.shape)
                logits = self._forward(model, rows)
            return Logits(tuple(logits.shape), logits.numpy().reshape(-1).view("u1").data)
        except GraphFailed as error:
            raise FailedPrecondition("MODEL_FAILED", str(error)) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if self._on_out_of_memory is not None:
                self._on_out_of_memory()
            raise ResourceExhausted("OUT_OF_MEMORY", f"{batch.shape[0]} rows do not fit in memory") from error

    def _forward(self, model: LoadedModel, rows: torch.Tensor) -> torch.Tensor:
        """The logits of a batch, float32 on the CPU; there, piece by piece, which is faster and gives the same bits."""
        if self._device != "cpu":
            answered: torch.Tensor = model.network(rows.to(self._device))
            return answered.to("cpu", torch.float32).contiguous()
        if isinstance(model.network, OnnxNetwork):
            # Whatever shape it gives is for the client to judge.
            return model.network(rows)
        logits = torch.empty((len(rows), model.spec.outputs), dtype=torch.float32)
        step = _piece_rows(model.spec)
        for start in range(0, len(rows), step):
            logits[start : start + step] = model.network(rows[start : start + step])
        return logits

    def _model(self, name: str, version: str) -> LoadedModel:
        _check_name(name)
        if version not in ("", VERSION) or name not in self._loaded:
            raise NotFound("MODEL_NOT_LOADED", f"model {name} version {version or VERSION} is not loaded", model=name)
        return self._loaded[name]

    def _folder(self, name: str) -> Path:
        _check_name(name)
        if self._repository is None or not (self._repository / name).is_dir():
            raise NotFound("MODEL_NOT_FOUND", f"the repository has no model {name}", model=name)
        return self._repository / name

    def _names(self) -> list[str]:
        if self._repository is None or not self._repository.is_dir():
            return []
        return sorted(path.name for path in self._repository.iterdir() if _NAME.match(path.name) and path.is_dir())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, torch's allocators' or the kernel's."""
    text = str(error)
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")
    )


def _resolve(device: str) -> str:
    """The torch device of a setting; `auto` is CUDA where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _piece_rows(spec: ModelSpec) -> int:
    """Rows whose float32 features fit a core's cache beside the weights that they are multiplied with."""
    return max(_LEAST_PIECE_ROWS, _PIECE_BYTES // (4 * math.prod(spec.input_shape)))


def _check_name(name: str) -> None:
    if not _NAME.match(name):
        raise InvalidArgument.field(
            "model_name", "must be 1 to 128 of A-Z, a-z, 0-9, _, - and ., first a letter or digit"
        )


def _read_model(folder: Path, device: str) -> LoadedModel:
    try:
        with (folder / SPEC_FILE).open("rb") as file:
            spec = from_json(json.loads(file.read(MAX_SPEC_BYTES)))
        if violations := validate(spec, max_parameters=MAX_PARAMETERS):
            raise ModelFault(FaultCode.BAD_FORMAT, f"{violations[0].field}: {violations[0].description}")
        if isinstance(spec.architecture, Onnx):
            graph, parameters = OnnxNetwork.load(
                spec, folder / ONNX_FILE, max_bytes=MAX_ONNX_BYTES, max_parameters=MAX_PARAMETERS
            )
            return LoadedModel(spec, graph, 4 * parameters)
        network = load_model(spec, folder / WEIGHTS_FILE, device=device)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFault(FaultCode.BAD_FORMAT, f"{type(error).__name__}: {error}") from error
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise
    return LoadedModel(spec, network, 4 * count_parameters(spec))


def _check_batch(batch: Batch, spec: ModelSpec) -> None:
    if batch.datatype not in DATATYPES:
        raise InvalidArgument.field("inputs[0].datatype", f"must be one of {', '.join(DATATYPES)}")
    rows, row_shape = batch.shape[:1], batch.shape[1:]
    if not rows or rows[0] < 1 or row_shape != spec.input_shape:
        wanted = ", ".join(["n", *map(str, spec.input_shape)])
        raise InvalidArgument.field("inputs[0].shape", f"must be [{wanted}] with n at least 1, is {list(batch.shape)}")
    expected = DATATYPES[batch.datatype].itemsize
    for size in batch.shape:
        expected *= size
    if len(batch.data) != expected:
        raise InvalidArgument.field("raw_input_contents[0]", f"must have {expected} bytes, has {len(batch.data)}")
    if batch.shape[0] * spec.outputs * 4 > MAX_MESSAGE_BYTES - ENVELOPE_BYTES:
        raise InvalidArgument.field("inputs[0].shape", "has more rows than one answer of 16 MiB can hold")
