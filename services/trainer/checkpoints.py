"""A training's state on disk: one safetensors file that appears whole or not at all; nothing here unpickles."""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

_FACTS = "facts"


class CheckpointUnreadable(Exception):
    """The file is no checkpoint, or not a whole one."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and beside them what is no tensor, as JSON."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes and syncs the file, then puts it in the place of the one before. Raises OSError, and that one stays."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in checkpoint.tensors.items()}
    content = safetensors.torch.save(tensors, metadata={_FACTS: json.dumps(checkpoint.facts)})
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a file, None when there is no file. Raises CheckpointUnreadable."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_FACTS])
            # Copies: what torch gets must outlive the file, which the next checkpoint replaces.
            tensors = {name: torch.clone(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointUnreadable(f"{path.name} is not a checkpoint: {error}") from error
    return Checkpoint(tensors, facts)
