"""A training's state on disk: one safetensors file that appears whole or not at all; nothing here unpickles."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from tiltyard.foldersync import sync_folder

_FACTS = "facts"
# Of facts and tensors: a disk may give back other bytes than it took, and nobody would see it in the model.
_DIGEST = "sha256"
# What a state is made of, in the format's words.
_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# What a disk, or a file system that keeps sums, answers for bytes that it has lost.
_LOST = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
_READ_BYTES = 1 << 20


class CheckpointUnreadable(Exception):
    """The file is no checkpoint, or not a whole one."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and beside them what is no tensor, as JSON."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes and syncs the file, then puts it in the place of the one before. Raises OSError, and that one stays."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("wb") as file:
            _write(file, checkpoint)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a file, None when there is no file. Raises CheckpointUnreadable, OSError for other trouble."""
    try:
        _read_through(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _LOST:
            raise
        raise CheckpointUnreadable(f"{path.name} is not given back by the disk ({error.strerror})") from error
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            facts = json.loads(told[_FACTS])
            # Copies: what torch gets must outlive the file, which the next checkpoint replaces.
            tensors = {name: torch.clone(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointUnreadable(f"{path.name} is not a checkpoint: {error}") from error
    # Those of earlier versions have no digest.
    if told.get(_DIGEST, "") not in ("", _digest(told[_FACTS], tensors)):
        raise CheckpointUnreadable(f"{path.name} was damaged on the disk")
    return Checkpoint(tensors, facts)


def _read_through(path: Path) -> None:
    """Raises OSError for what the disk does not give back: read through a memory map, it would end the process."""
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _write(file: BinaryIO, checkpoint: Checkpoint) -> None:
    """The format of safetensors, tensor by tensor: the package would hold all of them in memory once more."""
    facts = json.dumps(checkpoint.facts)
    told = {_FACTS: facts, _DIGEST: _digest(facts, checkpoint.tensors)}
    header: dict[str, object] = {"__metadata__": told}
    position = 0
    for name, tensor in _in_order(checkpoint.tensors):
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]
        }  # fmt: skip
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for data in _contents(checkpoint.tensors):
        file.write(data)


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Those of large elements first, so that each lies at a multiple of its own."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _contents(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of each tensor, in their order."""
    for _, tensor in _in_order(tensors):
        if tensor.numel():
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for data in _contents(tensors):
        digest.update(data)
    return digest.hexdigest()
