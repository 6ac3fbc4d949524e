"""A model from its folder: `spec.json` with `model.safetensors` or `model.onnx`, on a device."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from services.runtime.memory import memory_bytes
from tiltyard.models import load_model
from tiltyard.models.onnxmodel import OnnxNetwork
from tiltyard.modelspec import FaultCode, ModelFault, ModelSpec, Onnx, count_parameters, from_json, validate

WEIGHTS_FILE = "model.safetensors"
ONNX_FILE = "model.onnx"
SPEC_FILE = "spec.json"
MAX_SPEC_BYTES = 1 << 20
# The most that a task may allow.
MAX_PARAMETERS = 1 << 40
# protobuf's own limit: such a file is one message.
MAX_ONNX_BYTES = (1 << 31) - 1


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run on `device` (`cpu` or a CUDA device), and the bytes that its weights take."""

    spec: ModelSpec
    network: Callable[[torch.Tensor], torch.Tensor]
    memory_bytes: int
    device: str = "cpu"


@dataclass(frozen=True)
class StoredModel:
    """What a folder says of its model before it is loaded: the spec, and the bytes that its weights will take."""

    spec: ModelSpec
    memory_bytes: int


def resolve_device(device: str) -> str:
    """The torch device of a setting; `auto` is CUDA where there is one. Raises ValueError for one that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{device} is wanted, and this process sees {torch.cuda.device_count()} CUDA devices")
    return device


def memory_budget(device: str) -> int:
    """Half of the memory where a device keeps its models, in bytes: the rest is for batches and for others."""
    if device == "cpu":
        return memory_bytes() // 2
    return int(torch.cuda.mem_get_info(device)[1]) // 2


def look_at(folder: Path) -> StoredModel:
    """What the folder's spec says, the weights not read. Raises ModelFault."""
    try:
        spec = _read_spec(folder)
        if isinstance(spec.architecture, Onnx):
            return StoredModel(spec, (folder / ONNX_FILE).stat().st_size)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFault(FaultCode.BAD_FORMAT, f"{type(error).__name__}: {error}") from error
    return StoredModel(spec, 4 * count_parameters(spec))


def load(folder: Path, device: str) -> LoadedModel:
    """The folder's model. Raises ModelFault, and MemoryError when it does not fit."""
    try:
        spec = _read_spec(folder)
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
    return LoadedModel(spec, network, 4 * count_parameters(spec), device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, torch's allocators' or the kernel's."""
    text = str(error)
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")
    )


def _read_spec(folder: Path) -> ModelSpec:
    with (folder / SPEC_FILE).open("rb") as file:
        spec = from_json(json.loads(file.read(MAX_SPEC_BYTES)))
    if violations := validate(spec, max_parameters=MAX_PARAMETERS):
        raise ModelFault(FaultCode.BAD_FORMAT, f"{violations[0].field}: {violations[0].description}")
    return spec
