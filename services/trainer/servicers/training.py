"""TrainingService over the node's trainings."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from services.runtime.idempotency import idempotent
from services.runtime.names import parse_training
from services.runtime.paging import PageTokens, page_size
from services.runtime.server import Mount
from services.trainer import convert
from services.trainer.training import Training
from services.trainer.trainings import Trainings
from tiltyard.trainer.v1 import trainer_pb2 as pb
from tiltyard.trainer.v1 import trainer_pb2_grpc as rpc

SERVICE = "tiltyard.trainer.v1.TrainingService"
_LIST = "ListTrainings"


class TrainingServicer(rpc.TrainingServiceServicer):
    """tiltyard.trainer.v1.TrainingService."""

    def __init__(self, trainings: Trainings, tokens: PageTokens) -> None:
        self._trainings = trainings
        self._tokens = tokens

    @idempotent(convert.start_response)
    async def StartTraining(self, request: pb.StartTrainingRequest, context: Any) -> Training:
        """Write a training down and queue it."""
        return await self._trainings.start(convert.new_training(request))

    async def GetTraining(self, request: pb.GetTrainingRequest, context: Any) -> pb.GetTrainingResponse:
        """Read one training."""
        training = await self._trainings.get(parse_training(request.name))
        return pb.GetTrainingResponse(training=convert.training_to_proto(training))

    async def ListTrainings(self, request: pb.ListTrainingsRequest, context: Any) -> pb.ListTrainingsResponse:
        """List trainings, newest first."""
        cursor = self._tokens.decode(request.page_token, _LIST)
        page = await self._trainings.page(cursor=cursor, size=page_size(request.page_size))
        return convert.list_response(page, partial(self._tokens.encode, _LIST))

    async def WatchTraining(
        self, request: pb.WatchTrainingRequest, context: Any
    ) -> AsyncIterator[pb.WatchTrainingResponse]:
        """Stream the history, then every change until the end."""
        async with aclosing(self._trainings.watch(parse_training(request.name))) as states:
            async for training in states:
                yield pb.WatchTrainingResponse(training=convert.training_to_proto(training))

    @idempotent(convert.cancel_response)
    async def CancelTraining(self, request: pb.CancelTrainingRequest, context: Any) -> Training:
        """Ask a training to stop."""
        return await self._trainings.cancel(parse_training(request.name))


def mount(trainings: Trainings, tokens: PageTokens) -> Mount:
    """What a server mounts to serve these trainings."""
    servicer = TrainingServicer(trainings, tokens)
    return Mount(SERVICE, lambda server: rpc.add_TrainingServiceServicer_to_server(servicer, server))
