"""MembershipService over a real server: one role each, decided by the selector, recorded either way."""

from pathlib import Path

import grpc
import pytest

from services.registry.states import Role
from services.runtime.errors import Unavailable
from tests.support.registry_server import ORIGIN, RegistryServer, dataset_bytes, join_request, refused
from tiltyard.client import Client
from tiltyard.identity import Key
from tiltyard.registry.v1 import membership_pb2
from tiltyard.registry.v1.membership_pb2 import (
    JoinTaskRequest,
    LeaveTaskRequest,
    ListEligibilityVerdictsRequest,
    ListMembersRequest,
    PauseMembershipRequest,
    ResumeMembershipRequest,
)
from tiltyard.registry.v1.participant_pb2 import BindOwnerRequest, EndorseParticipantRequest
from tiltyard.registry.v1.task_pb2 import CancelTaskRequest, CloseTaskRequest, GetTaskRequest
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2
from tiltyard.type.v1.participation_pb2 import (
    MEMBERSHIP_STATE_ACTIVE,
    MEMBERSHIP_STATE_LEFT,
    MEMBERSHIP_STATE_PAUSED,
    MEMBERSHIP_STATE_PENDING,
    MEMBERSHIP_STATE_REFUSED,
    ROLE_TASK_CREATOR,
    ROLE_TRAINING_NODE,
    ROLE_VALIDATOR,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
EXISTS = grpc.StatusCode.ALREADY_EXISTS
DENIED = grpc.StatusCode.PERMISSION_DENIED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
async def creator(arena: RegistryServer, tmp_path: Path) -> Client:
    """The creator of task t, which is OPEN."""
    creator = await arena.participant("creator")
    await arena.open_task(creator, dataset_bytes(tmp_path))
    return creator


def name_of(client: Client) -> str:
    return f"tasks/t/members/{client.key.id}"


async def members(client: Client) -> dict[str, membership_pb2.Member]:
    page = await client.memberships.ListMembers(ListMembersRequest(parent="tasks/t"))
    return {member.participant.removeprefix("participants/"): member for member in page.members}


async def counts(client: Client) -> tuple[int, int]:
    task = (await client.tasks.GetTask(GetTaskRequest(name="tasks/t"))).task
    return task.training_nodes, task.validators


async def test_joining_locks_the_stake_and_is_recorded(arena: RegistryServer, creator: Client) -> None:
    node, validator = await arena.participant("node"), await arena.participant("validator")
    await arena.join(node, ROLE_TRAINING_NODE)
    answer = await arena.join(validator, ROLE_VALIDATOR, request_id="r")
    assert answer.verdict.eligible
    assert answer.member.state == MEMBERSHIP_STATE_ACTIVE
    assert answer.member.locked_micros == 100
    assert answer.member.weight == 1 << 32
    assert arena.selection.pools["t"].candidates.keys() == {node.key.id, validator.key.id}
    assert await counts(creator) == (1, 1)
    assert await arena.join(validator, ROLE_VALIDATOR, request_id="r") == answer
    found = await members(creator)
    assert list(found) == [creator.key.id, node.key.id, validator.key.id]
    assert found[creator.key.id].role == ROLE_TASK_CREATOR
    assert found[validator.key.id] == answer.member
    last = (await arena.entries())[-3:]
    changed = next(entry.membership_changed for entry in reversed(last) if entry.HasField("membership_changed"))
    assert changed.statement == join_request(validator.key, ROLE_VALIDATOR).statement
    verdicts = await creator.memberships.ListEligibilityVerdicts(ListEligibilityVerdictsRequest(parent="tasks/t"))
    assert [verdict.role for verdict in verdicts.verdicts] == [ROLE_TASK_CREATOR, ROLE_TRAINING_NODE, ROLE_VALIDATOR]


async def test_a_second_role_is_refused(arena: RegistryServer, creator: Client) -> None:
    node = await arena.participant()
    await arena.join(node, ROLE_TRAINING_NODE)
    for client, role in ((node, ROLE_VALIDATOR), (node, ROLE_TRAINING_NODE), (creator, ROLE_VALIDATOR)):
        with refused(EXISTS, "ROLE_TAKEN"):
            await arena.join(client, role)
    assert await counts(creator) == (1, 0)
    assert (await arena.kinds()).count("membership_changed") == 1


async def test_a_refusal_is_recorded_and_may_be_tried_again(arena: RegistryServer, creator: Client) -> None:
    node = await arena.participant()
    arena.selection.refused.add(node.key.id)
    with refused(PRECONDITION, "NOT_ELIGIBLE"):
        await arena.join(node, ROLE_TRAINING_NODE, request_id="r")
    assert (await members(creator))[node.key.id].state == MEMBERSHIP_STATE_REFUSED
    assert await counts(creator) == (0, 0)
    arena.selection.refused.clear()
    # A failed call is not remembered: the same request now succeeds, in another role too.
    answer = await arena.join(node, ROLE_TRAINING_NODE, request_id="r")
    assert answer.member.state == MEMBERSHIP_STATE_ACTIVE
    verdicts = await creator.memberships.ListEligibilityVerdicts(ListEligibilityVerdictsRequest(parent="tasks/t"))
    assert [verdict.eligible for verdict in verdicts.verdicts] == [True, False, True]


async def test_statements_of_others_are_refused(arena: RegistryServer, creator: Client) -> None:
    node, other = await arena.participant(), Key.generate()
    named_other = envelope_pb2.JoinStatement(
        origin=ORIGIN, task="tasks/t", participant=f"participants/{other.id}", role=ROLE_VALIDATOR
    )
    no_role = envelope_pb2.JoinStatement(origin=ORIGIN, task="tasks/t", participant=f"participants/{node.key.id}")
    broken = join_request(node.key, ROLE_VALIDATOR)
    broken.statement.payload += b"\x00"
    for request, field in (
        (join_request(other, ROLE_VALIDATOR), "statement"),
        (join_request(node.key, ROLE_VALIDATOR, origin="else.where"), "statement.origin"),
        (join_request(node.key, ROLE_TASK_CREATOR), "statement.role"),
        (join_request(node.key, ROLE_VALIDATOR, task="No Task"), "statement.task"),
        (JoinTaskRequest(statement=sign_statement(node.key, named_other)), "statement.participant"),
        (JoinTaskRequest(statement=sign_statement(node.key, no_role)), "statement.role"),
        (broken, "statement"),
        (JoinTaskRequest(), "statement"),
    ):
        with refused(INVALID, field=field):
            await node.memberships.JoinTask(request)
    assert node.key.id not in await members(creator)


async def test_tasks_that_are_not_open_take_nobody(arena: RegistryServer, creator: Client, tmp_path: Path) -> None:
    node, validator = await arena.participant(), await arena.participant()
    await arena.create_task(creator, dataset_bytes(tmp_path), task="preparing")
    with refused(PRECONDITION, "TASK_NOT_OPEN"):
        await arena.join(node, ROLE_TRAINING_NODE, task="preparing")
    with refused(grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND"):
        await arena.join(node, ROLE_TRAINING_NODE, task="none")
    stranger = await arena.client(Key.generate())
    with refused(PRECONDITION, "NOT_REGISTERED"):
        await arena.join(stranger, ROLE_TRAINING_NODE)
    await creator.tasks.CancelTask(CancelTaskRequest(name="tasks/t"))
    with refused(PRECONDITION, "TASK_ENDED"):
        await arena.join(validator, ROLE_VALIDATOR)


async def test_pausing_and_resuming(arena: RegistryServer, creator: Client) -> None:
    validator, other = await arena.participant(), await arena.participant()
    await arena.join(validator, ROLE_VALIDATOR)
    pause = PauseMembershipRequest(name=name_of(validator), request_id="p")
    paused = await validator.memberships.PauseMembership(pause)
    assert paused.member.state == MEMBERSHIP_STATE_PAUSED
    assert await counts(creator) == (0, 0)
    resumed = await validator.memberships.ResumeMembership(ResumeMembershipRequest(name=name_of(validator)))
    assert resumed.member.state == MEMBERSHIP_STATE_ACTIVE
    assert await validator.memberships.PauseMembership(pause) == paused
    assert (await members(creator))[validator.key.id].state == MEMBERSHIP_STATE_ACTIVE
    with refused(DENIED, "NOT_THE_MEMBER"):
        await other.memberships.PauseMembership(PauseMembershipRequest(name=name_of(validator)))
    with refused(grpc.StatusCode.NOT_FOUND):
        await other.memberships.PauseMembership(PauseMembershipRequest(name=name_of(other)))
    with refused(PRECONDITION, "CREATOR_STAYS"):
        await creator.memberships.LeaveTask(LeaveTaskRequest(name=name_of(creator)))
    with refused(INVALID, field="name"):
        await other.memberships.PauseMembership(PauseMembershipRequest(name="tasks/t"))
    assert (await arena.kinds()).count("membership_changed") == 3


async def test_leaving_unlocks_the_stake_and_joining_again_is_possible(arena: RegistryServer, creator: Client) -> None:
    validator = await arena.participant()
    await arena.join(validator, ROLE_VALIDATOR)
    answer = await validator.memberships.LeaveTask(LeaveTaskRequest(name=name_of(validator)))
    assert answer.member.state == MEMBERSHIP_STATE_LEFT
    with refused(PRECONDITION, "NOT_A_MEMBER"):
        await validator.memberships.ResumeMembership(ResumeMembershipRequest(name=name_of(validator)))
    await arena.registry.referee.turn()
    assert validator.key.id not in arena.selection.pools["t"].candidates
    assert (await members(creator))[validator.key.id].locked_micros == 0
    with refused(EXISTS, "ROLE_TAKEN"):
        await arena.join(validator, ROLE_TRAINING_NODE)
    assert (await arena.join(validator, ROLE_VALIDATOR)).member.state == MEMBERSHIP_STATE_ACTIVE


async def test_what_a_lost_call_began_is_finished_later(arena: RegistryServer, creator: Client) -> None:
    first, second = await arena.participant(), await arena.participant()

    def lose(question: str) -> None:
        if question == "add_candidate":
            raise Unavailable("SELECTOR_DOWN", "the selector cannot be reached")

    arena.selection.before = lose
    for client in (first, second):
        with refused(UNAVAILABLE):
            await arena.join(client, ROLE_VALIDATOR)
    assert (await members(creator))[first.key.id].state == MEMBERSHIP_STATE_PENDING
    await arena.restart()
    creator, first = await arena.client(creator.key), await arena.client(first.key)
    arena.selection.before = lambda question: None
    arena.selection.refused.add(second.key.id)
    # The caller itself may try again at once; for the other one the referee asks.
    assert (await arena.join(first, ROLE_VALIDATOR)).member.state == MEMBERSHIP_STATE_ACTIVE
    await arena.advance(seconds=9)
    assert (await members(creator))[second.key.id].state == MEMBERSHIP_STATE_PENDING
    await arena.advance(seconds=1)
    assert (await members(creator))[second.key.id].state == MEMBERSHIP_STATE_REFUSED
    assert await counts(creator) == (0, 1)


async def test_a_pool_that_closed_meanwhile_ends_the_joining(arena: RegistryServer, creator: Client) -> None:
    validator = await arena.participant()
    arena.selection.pools["t"].open = False
    with refused(PRECONDITION, "POOL_CLOSED"):
        await arena.join(validator, ROLE_VALIDATOR)
    assert (await members(creator))[validator.key.id].state == MEMBERSHIP_STATE_REFUSED


async def test_whom_the_selector_knows_in_another_role_does_not_wait_for_ever(
    arena: RegistryServer, creator: Client
) -> None:
    validator = await arena.participant()
    arena.selection.pools["t"].candidates[validator.key.id] = Role.TRAINING_NODE
    with refused(EXISTS, "ROLE_TAKEN"):
        await arena.join(validator, ROLE_VALIDATOR)
    assert (await members(creator))[validator.key.id].state == MEMBERSHIP_STATE_REFUSED


async def test_the_selector_hears_of_owner_and_trusted_endorsers(arena: RegistryServer, creator: Client) -> None:
    validator, owner = await arena.participant(), Key.generate()
    trusted, stranger = await arena.participant(key=arena.trusted), await arena.participant()
    me = f"participants/{validator.key.id}"
    owned = envelope_pb2.OwnerStatement(origin=ORIGIN, owner=f"participants/{owner.id}", participant=me)
    await validator.participants.BindOwner(BindOwnerRequest(statement=sign_statement(owner, owned)))
    for endorser, field in ((trusted, "general"), (stranger, "general"), (trusted, "vision")):
        word = envelope_pb2.EndorsementStatement(
            origin=ORIGIN, endorser=f"participants/{endorser.key.id}", subject=me, field=field
        )
        request = EndorseParticipantRequest(statement=sign_statement(endorser.key, word))
        await endorser.participants.EndorseParticipant(request)
    answer = await arena.join(validator, ROLE_VALIDATOR)
    assert answer.member.owner_group == owner.id
    assert arena.selection.facts_seen[-1].endorsers == (trusted.key.id,)


async def test_members_of_an_ended_task_keep_nothing_locked(arena: RegistryServer, creator: Client) -> None:
    validator = await arena.participant()
    await arena.join(validator, ROLE_VALIDATOR)
    await creator.tasks.CloseTask(CloseTaskRequest(name="tasks/t"))
    await arena.registry.referee.turn()
    await arena.registry.referee.turn()
    assert not arena.selection.pools["t"].open
    assert (await members(creator))[validator.key.id].locked_micros == 0


async def test_lists_are_paged_and_their_tokens_are_their_own(arena: RegistryServer, creator: Client) -> None:
    for _ in range(3):
        await arena.join(await arena.participant(), ROLE_VALIDATOR)
    first = await creator.memberships.ListMembers(ListMembersRequest(parent="tasks/t", page_size=3))
    rest = await creator.memberships.ListMembers(ListMembersRequest(parent="tasks/t", page_token=first.next_page_token))
    assert (len(first.members), len(rest.members), rest.next_page_token) == (3, 1, "")
    with refused(INVALID, field="page_token"):
        await creator.memberships.ListEligibilityVerdicts(
            ListEligibilityVerdictsRequest(parent="tasks/t", page_token=first.next_page_token)
        )
    with refused(INVALID, field="page_token"):
        await creator.memberships.ListMembers(
            ListMembersRequest(parent="tasks/other", page_token=first.next_page_token)
        )
