"""Base models: what trainings of a task begin with, fetched before they take a device."""

import asyncio
import os
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from services.runtime.errors import FailedPrecondition
from services.trainer.training import Training
from tiltyard.modelspec import KIND_OF, FaultCode, ModelFault, ModelSpec, check_safetensors, tensor_shapes
from tiltyard.tensorfile import read_header

_SUFFIX = ".safetensors"
_NAMED_TENSORS = 4


class ArtifactReader(Protocol):
    """The registry, as far as a base model needs it."""

    async def download(self, sha256: str, destination: Path) -> None:
        """Puts the artifact there, whole and of that digest or not at all; a broken download goes on where it was.

        Raises OSError, Unavailable, and ArenaError for what the registry refuses.
        """
        ...


class BaseModels:
    """One file for each base model, named by its SHA-256, for as long as a training that has not ended needs it."""

    def __init__(self, folder: Path, registry: ArtifactReader) -> None:
        self._folder = folder
        self._registry = registry
        self._fetching: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def fetch(self, training: Training) -> None:
        """Has the training's base model in its place, and refuses one that is not of the training's architecture.

        Raises FailedPrecondition (BASE_MODEL_MISMATCH) naming both shapes, and what `ArtifactReader.download` raises.
        """
        path = base_model_path(self._folder, training.base_model)
        async with self._fetching[training.base_model]:
            if not path.exists():
                self._folder.mkdir(mode=0o700, exist_ok=True)
                await self._registry.download(training.base_model, path)
        await asyncio.to_thread(_check, path, training.spec)

    async def keep(self, digests: Collection[str]) -> None:
        """Removes every base model but these, and what was downloaded of others."""
        await asyncio.to_thread(_keep, self._folder, frozenset(digests))


def base_model_path(folder: Path, sha256: str) -> Path:
    """Where the base model of this digest lies."""
    return folder / (sha256 + _SUFFIX)


def _keep(folder: Path, digests: frozenset[str]) -> None:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.partition(".")[0] not in digests:
            path.unlink(missing_ok=True)


def _check(path: Path, spec: ModelSpec) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        try:
            check_safetensors(read, size, spec, max_bytes=size)
        except ModelFault as fault:
            description = f"the task's base model is no {KIND_OF[type(spec.architecture)]} of its ModelSpec: {fault}"
            if fault.code is FaultCode.SHAPE_MISMATCH:
                held = {name: entry.shape for name, entry in read_header(read, size).tensors.items()}
                description += f"; it holds {_listed(held)}, the model has {_listed(tensor_shapes(spec))}"
            raise FailedPrecondition("BASE_MODEL_MISMATCH", description) from fault


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    named = [f"{name[:80]} {shape}" for name, shape in sorted(shapes.items())[:_NAMED_TENSORS]]
    more = len(shapes) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
