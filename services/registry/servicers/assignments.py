"""AssignmentService over the domain's assignments."""

from collections.abc import AsyncIterator
from typing import Any

from services.registry.assignments import Assignments, Lease
from services.registry.convert import assignments as convert
from services.registry.records import Assignment
from services.runtime.auth import current_caller
from services.runtime.idempotency import idempotent
from services.runtime.paging import PageTokens
from tiltyard.registry.v1 import assignment_pb2, assignment_pb2_grpc


class AssignmentServicer(assignment_pb2_grpc.AssignmentServiceServicer):
    """Duties of validators as leases."""

    def __init__(self, assignments: Assignments, *, tokens: PageTokens) -> None:
        self._assignments = assignments
        self._tokens = tokens

    async def WatchAssignments(
        self, request: assignment_pb2.WatchAssignmentsRequest, context: Any
    ) -> AsyncIterator[assignment_pb2.WatchAssignmentsResponse]:
        async for assignment, told in self._assignments.watch(current_caller().id, after=convert.told_of(request)):
            yield convert.watched_message(assignment, told)

    async def ListAssignments(
        self, request: assignment_pb2.ListAssignmentsRequest, context: Any
    ) -> assignment_pb2.ListAssignmentsResponse:
        caller = current_caller().id
        query = convert.query_of(request, self._tokens, caller=caller)
        found = await self._assignments.page(caller, query.submission, after=query.after, limit=query.limit)
        return convert.page_message(query, found, self._tokens)

    @idempotent(answer=convert.accepted_message)
    async def AcceptAssignment(self, request: assignment_pb2.AcceptAssignmentRequest, context: Any) -> Lease:
        assignment, holder = convert.accept_of(request)
        return await self._assignments.accept(current_caller().id, assignment, holder=holder)

    @idempotent(answer=convert.renewed_message)
    async def RenewAssignment(self, request: assignment_pb2.RenewAssignmentRequest, context: Any) -> Assignment:
        assignment, token = convert.renew_of(request)
        return await self._assignments.renew(current_caller().id, assignment, token=token)

    @idempotent(answer=convert.declined_message)
    async def DeclineAssignment(self, request: assignment_pb2.DeclineAssignmentRequest, context: Any) -> Assignment:
        assignment, token = convert.decline_of(request)
        return await self._assignments.decline(current_caller().id, assignment, token=token)
