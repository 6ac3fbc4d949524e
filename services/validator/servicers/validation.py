"""tiltyard.validator.v1.ValidationService."""

from collections.abc import AsyncIterator
from typing import Any

from services.runtime.server import Mount
from services.validator import convert
from services.validator.validation import Validation
from tiltyard.validator.v1 import validator_pb2 as pb
from tiltyard.validator.v1 import validator_pb2_grpc as rpc

SERVICE = "tiltyard.validator.v1.ValidationService"


class ValidationServicer(rpc.ValidationServiceServicer):
    """Shows and steers this validator."""

    def __init__(self, validation: Validation, pages: convert.RunPages) -> None:
        self._validation = validation
        self._pages = pages

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """What the validator does now."""
        return convert.status_response(await self._validation.status())

    async def ListEvaluationRuns(
        self, request: pb.ListEvaluationRunsRequest, context: Any
    ) -> pb.ListEvaluationRunsResponse:
        """The history, newest first."""
        page = await self._validation.history(below=self._pages.below(request), size=self._pages.size(request))
        return self._pages.response(page)

    async def WatchEvaluationRun(
        self, request: pb.WatchEvaluationRunRequest, context: Any
    ) -> AsyncIterator[pb.WatchEvaluationRunResponse]:
        """One run until it ends."""
        async for view in self._validation.watch(convert.assignment_name(request)):
            yield pb.WatchEvaluationRunResponse(run=convert.run_message(view))

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        """Begin no further run, and stop after the last."""
        return pb.DrainResponse(active=self._validation.drain())


def mount(validation: Validation, pages: convert.RunPages) -> Mount:
    """What a server mounts."""
    servicer = ValidationServicer(validation, pages)
    return Mount(SERVICE, lambda server: rpc.add_ValidationServiceServicer_to_server(servicer, server))
