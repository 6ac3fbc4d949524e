"""MembershipService over the domain's memberships."""

from typing import Any

from services.registry.convert import listings
from services.registry.convert import memberships as convert
from services.registry.convert.pages import open_page
from services.registry.memberships import Joined, Memberships
from services.registry.records import Member
from services.runtime.auth import current_caller
from services.runtime.idempotency import idempotent
from services.runtime.names import parse_member, parse_task
from services.runtime.paging import PageTokens
from tiltyard.registry.v1 import membership_pb2, membership_pb2_grpc


class MembershipServicer(membership_pb2_grpc.MembershipServiceServicer):
    """Who takes part in a task, and the verdicts on who may."""

    def __init__(self, memberships: Memberships, *, origin: str, tokens: PageTokens) -> None:
        self._memberships = memberships
        self._origin = origin
        self._tokens = tokens

    @idempotent(answer=convert.joined_message)
    async def JoinTask(self, request: membership_pb2.JoinTaskRequest, context: Any) -> Joined:
        caller = current_caller().id
        task, role, statement = convert.join_of(request, origin=self._origin, caller=caller)
        return await self._memberships.join(caller, task=task, role=role, statement=statement)

    @idempotent(answer=convert.paused_message)
    async def PauseMembership(self, request: membership_pb2.PauseMembershipRequest, context: Any) -> Member:
        return await self._memberships.pause(current_caller().id, *parse_member(request.name))

    @idempotent(answer=convert.resumed_message)
    async def ResumeMembership(self, request: membership_pb2.ResumeMembershipRequest, context: Any) -> Member:
        return await self._memberships.resume(current_caller().id, *parse_member(request.name))

    @idempotent(answer=convert.left_message)
    async def LeaveTask(self, request: membership_pb2.LeaveTaskRequest, context: Any) -> Member:
        return await self._memberships.leave(current_caller().id, *parse_member(request.name))

    async def ListMembers(
        self, request: membership_pb2.ListMembersRequest, context: Any
    ) -> membership_pb2.ListMembersResponse:
        task = parse_task(request.parent, "parent")
        page = listings.MEMBERS.open(request, self._tokens, parent=task)
        return convert.members_message(page, await self._memberships.members(task, page.listing), self._tokens)

    async def ListEligibilityVerdicts(
        self, request: membership_pb2.ListEligibilityVerdictsRequest, context: Any
    ) -> membership_pb2.ListEligibilityVerdictsResponse:
        task = parse_task(request.parent, "parent")
        query = f"ListEligibilityVerdicts {task}"
        page = open_page(query, self._tokens, size=request.page_size, token=request.page_token)
        found = await self._memberships.verdicts(task, after=page.after, limit=page.limit)
        return convert.verdicts_message(page, found, self._tokens)
