"""Members and verdicts in the contract's words."""

from collections.abc import Sequence

from services.registry.convert.enums import MEMBERSHIP_STATE, ROLE
from services.registry.convert.envelopes import envelope, open_own_statement
from services.registry.convert.listings import ListedPage
from services.registry.convert.pages import Page, close_page
from services.registry.convert.times import timestamp
from services.registry.convert.verdicts import verdict_message
from services.registry.listing import Place
from services.registry.memberships import Joined
from services.registry.records import Member, Verdict
from services.registry.states import Role
from services.runtime import names
from services.runtime.fields import FieldChecks
from services.runtime.paging import PageTokens
from tiltyard.identity import Envelope
from tiltyard.registry.v1 import membership_pb2
from tiltyard.type.v1 import envelope_pb2


def join_of(request: membership_pb2.JoinTaskRequest, *, origin: str, caller: str) -> tuple[str, Role, Envelope]:
    """The task, the role, and the statement as it came."""
    statement = open_own_statement(request.statement, envelope_pb2.JoinStatement, origin=origin, caller=caller)
    checks = FieldChecks()
    checks.require(
        "statement.participant", statement.participant == names.format_participant(caller), "is not the signer"
    )
    known = checks.one_of("statement.role", statement.role, ROLE.numbers)
    if known and ROLE.member(statement.role) is Role.TASK_CREATOR:
        checks.fail("statement.role", "a task has one creator, who does not join")
    checks.finish()
    return names.parse_task(statement.task, "statement.task"), ROLE.member(statement.role), envelope(request.statement)


def member_message(member: Member) -> membership_pb2.Member:
    """A member as it is."""
    return membership_pb2.Member(
        name=names.format_member(member.task, member.participant),
        participant=names.format_participant(member.participant),
        role=ROLE.number(member.role),
        state=MEMBERSHIP_STATE.number(member.state),
        locked_micros=member.locked_micros,
        weight=member.weight,
        owner_group=member.owner_group,
        create_time=timestamp(member.create_time),
    )


def joined_message(joined: Joined) -> membership_pb2.JoinTaskResponse:
    """The answer of JoinTask."""
    return membership_pb2.JoinTaskResponse(
        member=member_message(joined.member), verdict=verdict_message(joined.verdict)
    )


def paused_message(member: Member) -> membership_pb2.PauseMembershipResponse:
    """The answer of PauseMembership."""
    return membership_pb2.PauseMembershipResponse(member=member_message(member))


def resumed_message(member: Member) -> membership_pb2.ResumeMembershipResponse:
    """The answer of ResumeMembership."""
    return membership_pb2.ResumeMembershipResponse(member=member_message(member))


def left_message(member: Member) -> membership_pb2.LeaveTaskResponse:
    """The answer of LeaveTask."""
    return membership_pb2.LeaveTaskResponse(member=member_message(member))


def members_message(
    page: ListedPage, found: Sequence[tuple[Place, Member]], tokens: PageTokens
) -> membership_pb2.ListMembersResponse:
    """One page of ListMembers."""
    members, token = page.close(tokens, found, member_message)
    return membership_pb2.ListMembersResponse(members=members, next_page_token=token)


def verdicts_message(
    page: Page, found: Sequence[tuple[int, Verdict]], tokens: PageTokens
) -> membership_pb2.ListEligibilityVerdictsResponse:
    """One page of ListEligibilityVerdicts."""
    verdicts, token = close_page(page, tokens, found, verdict_message)
    return membership_pb2.ListEligibilityVerdictsResponse(verdicts=verdicts, next_page_token=token)
