"""EvaluationService over the domain's evaluations."""

from typing import Any

from services.registry.convert import evaluations as convert
from services.registry.convert import listings
from services.registry.evaluations import Evaluations
from services.registry.faults import ValidatorFaults
from services.registry.records import Evaluation
from services.runtime.auth import current_caller
from services.runtime.idempotency import idempotent
from services.runtime.names import parse_evaluation
from services.runtime.paging import PageTokens
from tiltyard.registry.v1 import evaluation_pb2, evaluation_pb2_grpc


class EvaluationServicer(evaluation_pb2_grpc.EvaluationServiceServicer):
    """Reports sealed first and opened later."""

    def __init__(self, evaluations: Evaluations, faults: ValidatorFaults, *, origin: str, tokens: PageTokens) -> None:
        self._evaluations = evaluations
        self._faults = faults
        self._origin = origin
        self._tokens = tokens

    @idempotent(answer=convert.committed_message)
    async def CommitEvaluation(self, request: evaluation_pb2.CommitEvaluationRequest, context: Any) -> Evaluation:
        caller = current_caller().id
        draft = convert.seal_of(request, origin=self._origin, caller=caller)
        return await self._evaluations.commit(
            caller, draft.assignment, seal=draft.seal, statement=draft.statement, token=draft.token
        )

    @idempotent(answer=convert.opened_message)
    async def OpenEvaluation(self, request: evaluation_pb2.OpenEvaluationRequest, context: Any) -> Evaluation:
        caller = current_caller().id
        draft = convert.report_of(request, origin=self._origin, caller=caller)
        return await self._evaluations.open(
            caller, draft.assignment, report=draft.report, envelope=draft.envelope, salt=draft.salt
        )

    async def GetEvaluation(
        self, request: evaluation_pb2.GetEvaluationRequest, context: Any
    ) -> evaluation_pb2.GetEvaluationResponse:
        hashes = request.view == evaluation_pb2.EVALUATION_VIEW_FULL
        view = await self._evaluations.get(current_caller().id, parse_evaluation(request.name), hashes=hashes)
        return convert.viewed_message(view)

    async def ListEvaluations(
        self, request: evaluation_pb2.ListEvaluationsRequest, context: Any
    ) -> evaluation_pb2.ListEvaluationsResponse:
        query = convert.query_of(request, self._tokens)
        found = await self._evaluations.page(
            current_caller().id, query.task, query.number, after=query.after, limit=query.limit
        )
        return convert.page_message(query, found, self._tokens)

    async def ListValidatorFaults(
        self, request: evaluation_pb2.ListValidatorFaultsRequest, context: Any
    ) -> evaluation_pb2.ListValidatorFaultsResponse:
        task, validator = convert.faults_of(request)
        page = listings.VALIDATOR_FAULTS.open(request, self._tokens, parent=request.parent)
        found = await self._faults.page(page.listing, task=task, validator=validator)
        return convert.faults_message(page, found, self._tokens)
