"""The node's trained models behind the Open Inference Protocol; torch is loaded with the first call, not before.

The owner asks a model by its training's id; a validator that judges a submitted one, by the hex digits of its digest.
"""

import asyncio
import importlib
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol, cast

import structlog

from services.runtime.auth import Role, current_caller
from services.runtime.errors import ArenaError
from services.runtime.server import Mount
from services.trainer.judges import Judges
from services.trainer.training import Training
from tiltyard.inference.v2 import inference_pb2_grpc as rpc

_log = structlog.get_logger("tiltyard.trainer")

SERVICE = "inference.GRPCInferenceService"
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_UNARY = (
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)
# The field of each method's request that names the model.
_NAMED_BY = {"ModelReady": "name", "ModelMetadata": "name", "ModelInfer": "model_name"}
_STREAM = "ModelStreamInfer"
FOR_JUDGES = (*_NAMED_BY, _STREAM)
"""The methods that a validator may call."""


class _Models(Protocol):
    """services.modelserver.models.Models, which cannot be imported without torch."""

    async def load(self, name: str) -> None: ...

    async def load_all(self, *, lazily: bool = False) -> None: ...

    async def unload(self, name: str) -> None: ...

    def close(self) -> None: ...


class TrainedModels:
    """Serves each model of the runs' folder under its training's id, at most `memory_bytes` of weights at once."""

    def __init__(self, *, runs: Path, device: str, memory_bytes: int, judges: Judges) -> None:
        self._runs = runs
        self._device = device
        self._memory_bytes = memory_bytes
        self._judges = judges
        self._models: _Models | None = None
        self._servicer: Any = None
        self._opening = asyncio.Lock()

    def mount(self) -> Mount:
        """What a server mounts to serve the models."""
        servicer = cast(rpc.GRPCInferenceServiceServicer, _LazyServicer(self))
        return Mount(SERVICE, lambda server: rpc.add_GRPCInferenceServiceServicer_to_server(servicer, server))

    async def add(self, training: Training) -> None:
        """Serves a model that has just been trained, where anybody has asked for models before."""
        if self._models is None:
            return
        try:
            await self._models.load(training.id)
        except (ArenaError, MemoryError) as error:
            # The model is trained and can be submitted all the same.
            _log.warning("a trained model cannot be served", training=training.id, error=str(error))

    async def forget(self, training: str) -> None:
        """Serves a training's model no longer."""
        if self._models is not None:
            await self._models.unload(training)

    async def servicer(self) -> Any:
        """The model server's own servicer."""
        async with self._opening:
            if self._servicer is None:
                models, servicers = await asyncio.to_thread(_import)
                opened = models.Models(repository=self._runs, device=self._device, memory_bytes=self._memory_bytes)
                await opened.load_all(lazily=True)
                self._models, self._servicer = opened, servicers.InferenceServicer(opened)
        return self._servicer

    async def name_for_caller(self, model: str) -> str:
        """The name under which a model is served, for a caller who may ask it. Raises PermissionDenied, Unavailable."""
        caller = current_caller()
        if Role.OPERATOR in caller.roles:
            return model
        return await self._judges.training_for(caller.id, model)

    async def close(self) -> None:
        """Ends the threads that run models."""
        if self._models is not None:
            await asyncio.to_thread(self._models.close)


def _import() -> tuple[Any, Any]:
    return (
        importlib.import_module("services.modelserver.models"),
        importlib.import_module("services.modelserver.servicer"),
    )


class _LazyServicer:
    """Hands every method of the protocol on to the servicer that the first call opens."""

    def __init__(self, models: TrainedModels) -> None:
        for name in _UNARY:
            setattr(self, name, _unary(models, name))
        for name, field in _NAMED_BY.items():
            setattr(self, name, _unary(models, name, named_by=field))
        self.ModelStreamInfer = _stream(models, _STREAM)


def _unary(models: TrainedModels, name: str, *, named_by: str = "") -> Any:
    async def method(request: Any, context: Any) -> Any:
        if named_by:
            setattr(request, named_by, await models.name_for_caller(getattr(request, named_by)))
        return await getattr(await models.servicer(), name)(request, context)

    return method


def _stream(models: TrainedModels, name: str) -> Any:
    async def named(requests: Any) -> Any:
        async for request in requests:
            request.model_name = await models.name_for_caller(request.model_name)
            yield request

    async def method(requests: Any, context: Any) -> Any:
        servicer = await models.servicer()
        async with aclosing(getattr(servicer, name)(named(requests), context)) as answers:
            async for answer in answers:
                yield answer

    return method
