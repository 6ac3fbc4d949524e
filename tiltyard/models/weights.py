"""Weights in and out of safetensors files; nothing here unpickles."""

import os
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tiltyard.foldersync import sync_folder
from tiltyard.models.network import Network
from tiltyard.models.networks import build_empty
from tiltyard.modelspec import FaultCode, ModelFault, ModelSpec, compare_shapes

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load_model(spec: ModelSpec, path: Path, *, device: str = "cpu") -> Network:
    """The module of `spec` with the weights of a file, in evaluation mode and float32.

    Raises ModelFault (BAD_FORMAT, SHAPE_MISMATCH) for a file that does not fit, OSError for one that cannot be read.
    """
    module = build_empty(spec)
    tensors = _read(module, path)
    module.load_state_dict(tensors, assign=True)
    module.to(device).eval()
    return module.requires_grad_(False)


def load_weights(module: nn.Module, path: Path) -> None:
    """Put the weights of a file into a module, strictly: every tensor, no other, each of its shape.

    Raises ModelFault (BAD_FORMAT, SHAPE_MISMATCH), and then the module is as before; OSError when it cannot be read.
    """
    module.load_state_dict(_read(module, path))


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the weights as float32; the file appears whole or not at all, and the same weights give the same bytes."""
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in module.state_dict().items()
    }
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(safetensors.torch.save(tensors))
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def _read(module: nn.Module, path: Path) -> dict[str, Tensor]:
    """The file's tensors as float32, after they were found to be the module's."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, KeyError) as error:
        raise ModelFault(FaultCode.BAD_FORMAT, f"not a safetensors file: {str(error)[:200]}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ModelFault(
                FaultCode.BAD_FORMAT, f"tensor {name[:80]!r} is {tensor.dtype}, not float32, float16 or bfloat16"
            )
    compare_shapes(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()},
    )
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
