"""The node's trained models behind the Open Inference Protocol; torch is loaded with the first call, not before."""

import asyncio
import importlib
from pathlib import Path
from typing import Any, Protocol, cast

import structlog

from services.runtime.errors import ArenaError
from services.runtime.server import Mount
from services.trainer.training import Training
from tiltyard.inference.v2 import inference_pb2_grpc as rpc

_log = structlog.get_logger("tiltyard.trainer")

SERVICE = "inference.GRPCInferenceService"
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_UNARY = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)


class _Models(Protocol):
    """services.modelserver.models.Models, which cannot be imported without torch."""

    async def load(self, name: str) -> None: ...

    async def load_all(self) -> None: ...

    def close(self) -> None: ...


class TrainedModels:
    """Serves each model of the runs' folder under its training's id."""

    def __init__(self, *, runs: Path, device: str) -> None:
        self._runs = runs
        self._device = device
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

    async def servicer(self) -> Any:
        """The model server's own servicer, with every model loaded."""
        async with self._opening:
            if self._servicer is None:
                models, servicers = await asyncio.to_thread(_import)
                opened = models.Models(repository=self._runs, device=self._device)
                await opened.load_all()
                self._models, self._servicer = opened, servicers.InferenceServicer(opened)
        return self._servicer

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
        self.ModelStreamInfer = _stream(models, "ModelStreamInfer")


def _unary(models: TrainedModels, name: str) -> Any:
    async def method(request: Any, context: Any) -> Any:
        return await getattr(await models.servicer(), name)(request, context)

    return method


def _stream(models: TrainedModels, name: str) -> Any:
    async def method(requests: Any, context: Any) -> Any:
        servicer = await models.servicer()
        async for answer in getattr(servicer, name)(requests, context):
            yield answer

    return method
