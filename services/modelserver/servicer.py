"""The Open Inference Protocol over the loaded models."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from services.modelserver import convert
from services.modelserver.models import Models
from services.modelserver.pipeline import answered_in_order
from services.runtime.errors import ArenaError
from services.runtime.server import Mount
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc

SERVICE = "inference.GRPCInferenceService"
SERVER_NAME = "tiltyard"


class InferenceServicer(rpc.GRPCInferenceServiceServicer):
    """inference.GRPCInferenceService."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        """True: the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        """True: the server takes calls only after its models are loaded."""
        return pb.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        """Whether a model is loaded."""
        return pb.ModelReadyResponse(ready=self._models.ready(request.name))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        """Name, version, extensions."""
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=_version(), extensions=["model_repository"])

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        """A model's tensors."""
        return convert.model_metadata(request.name, self._models.spec(request.name, request.version))

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        """Run one batch."""
        batch = convert.batch_of(request, request.raw_input_contents)
        logits = await self._models.infer(request.model_name, request.model_version, batch)
        return convert.infer_response(request, logits)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Run batches as they come and answer them in order."""
        async with aclosing(answered_in_order(request_iterator, self._stream_answer)) as answers:
            async for answer in answers:
                yield answer

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        """The repository's models."""
        return convert.repository_index(self._models.index(ready_only=request.ready))

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Any
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model from the repository."""
        await self._models.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Any
    ) -> pb.RepositoryModelUnloadResponse:
        """Let a model go."""
        await self._models.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def _stream_answer(self, request: pb.ModelInferRequest) -> pb.ModelStreamInferResponse:
        # The protocol answers a wrong request inside the stream, which an interceptor cannot do.
        try:
            return pb.ModelStreamInferResponse(infer_response=await self.ModelInfer(request, None))
        except ArenaError as error:
            return convert.stream_error(request, error)


def mounts(models: Models) -> list[Mount]:
    """What a server mounts to serve these models."""
    servicer = InferenceServicer(models)
    return [Mount(SERVICE, lambda server: rpc.add_GRPCInferenceServiceServicer_to_server(servicer, server))]


def _version() -> str:
    try:
        return version("tiltyard")
    except PackageNotFoundError:
        return "0"
