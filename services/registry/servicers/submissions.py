"""SubmissionService over the domain's submissions."""

from typing import Any

from services.registry.convert import listings
from services.registry.convert import submissions as convert
from services.registry.submissions import Submissions, SubmissionView
from services.runtime.auth import current_caller
from services.runtime.idempotency import idempotent
from services.runtime.names import parse_submission, parse_task
from services.runtime.paging import PageTokens
from tiltyard.registry.v1 import submission_pb2, submission_pb2_grpc


class SubmissionServicer(submission_pb2_grpc.SubmissionServiceServicer):
    """Models by commit and reveal."""

    def __init__(self, submissions: Submissions, *, origin: str, tokens: PageTokens) -> None:
        self._submissions = submissions
        self._origin = origin
        self._tokens = tokens

    @idempotent(answer=convert.committed_message)
    async def CommitSubmission(self, request: submission_pb2.CommitSubmissionRequest, context: Any) -> SubmissionView:
        caller = current_caller().id
        task, commitment, statement = convert.commit_of(request, origin=self._origin, caller=caller)
        return await self._submissions.commit(caller, task=task, commitment=commitment, statement=statement)

    @idempotent(answer=convert.revealed_message)
    async def RevealSubmission(self, request: submission_pb2.RevealSubmissionRequest, context: Any) -> SubmissionView:
        caller = current_caller().id
        reveal, statement = convert.reveal_of(request, origin=self._origin, caller=caller)
        return await self._submissions.reveal(caller, reveal=reveal, statement=statement)

    async def GetSubmission(
        self, request: submission_pb2.GetSubmissionRequest, context: Any
    ) -> submission_pb2.GetSubmissionResponse:
        view = await self._submissions.get(*parse_submission(request.name))
        return submission_pb2.GetSubmissionResponse(submission=convert.submission_message(view))

    async def ListSubmissions(
        self, request: submission_pb2.ListSubmissionsRequest, context: Any
    ) -> submission_pb2.ListSubmissionsResponse:
        task = parse_task(request.parent, "parent")
        page = listings.SUBMISSIONS.open(request, self._tokens, parent=task)
        found = await self._submissions.page(task, page.listing)
        return convert.page_message(page, found, self._tokens)
