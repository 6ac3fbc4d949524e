"""AssignmentService over a real server."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from services.registry.records import Member, Participant
from services.registry.states import MembershipState, Role
from services.runtime import names
from services.runtime.errors import (
    AlreadyExists,
    ArenaError,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from services.runtime.names import AssignmentId
from tests.support.registry_arena import Arena, bad_fields, refusal, served
from tests.support.registry_fakes import START
from tests.support.registry_world import (
    D_EVAL,
    KEYS,
    NODES,
    SPEC,
    TASK,
    VALIDATORS,
    World,
    key_of,
    model_bytes,
    task_config,
)
from tiltyard.registry.v1 import assignment_pb2, assignment_pb2_grpc
from tiltyard.type.v1 import evaluation_pb2 as type_pb2
from tiltyard.wire import model_spec_from_proto

HOLDER, OTHER_HOLDER = b"h" * 32, b"o" * 32


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[Arena]:
    async with served(tmp_path) as arena:
        await arena.world.open_task()
        await arena.world.submit(NODES[0], model_bytes("a"))
        await arena.world.turn()
        yield arena


@pytest.fixture
async def duty(arena: Arena) -> AssignmentId:
    return (await arena.world.duties(1))[0]


def stub(arena: Arena, duty: AssignmentId) -> assignment_pb2_grpc.AssignmentServiceStub:
    return arena.peer(KEYS[duty.participant]).assignments


def accept(duty: AssignmentId, **changes: Any) -> assignment_pb2.AcceptAssignmentRequest:
    fields = {"name": names.format_assignment(duty), "lease_holder": HOLDER}
    return assignment_pb2.AcceptAssignmentRequest(**{**fields, **changes})


def renew(duty: AssignmentId, token: str, **changes: Any) -> assignment_pb2.RenewAssignmentRequest:
    return assignment_pb2.RenewAssignmentRequest(name=names.format_assignment(duty), lease_token=token, **changes)


def decline(duty: AssignmentId, token: str = "", **changes: Any) -> assignment_pb2.DeclineAssignmentRequest:
    return assignment_pb2.DeclineAssignmentRequest(name=names.format_assignment(duty), lease_token=token, **changes)


async def test_accepting_gives_a_lease_and_all_that_is_needed(arena: Arena, duty: AssignmentId) -> None:
    answer = await stub(arena, duty).AcceptAssignment(accept(duty))
    assert answer.assignment.state == type_pb2.ASSIGNMENT_STATE_ACCEPTED
    assert answer.assignment.deadline.ToDatetime(START.tzinfo) == START + timedelta(minutes=2)
    assert len(answer.lease_token) >= 32
    order = answer.order
    submission = await arena.world.submission(1)
    assert order.dataset == f"artifacts/{D_EVAL.hex()}"
    assert order.dataset_size_bytes == 5000
    assert order.model == f"artifacts/{submission.model_digest.hex()}"
    assert order.model_size_bytes == submission.size_bytes
    assert model_spec_from_proto(order.spec) == SPEC
    assert order.max_cpu_time.ToTimedelta() == timedelta(minutes=10)
    assert order.max_memory_bytes == 1 << 30


@pytest.mark.parametrize("allowed", [True, False])
async def test_the_order_names_the_nodes_endpoint_where_the_task_allows_it(tmp_path: Path, allowed: bool) -> None:
    endpoint = "grpc://node.example:7403"
    node = Participant(NODES[0].id, "node", NODES[0].public_bytes, None, START, endpoint=endpoint)
    async with served(tmp_path) as arena:
        await arena.world.store.write(lambda tx: tx.put_participant(node))
        await arena.world.open_task(config=task_config(allow_node_endpoint=allowed))
        await arena.world.submit(NODES[0], model_bytes("a"))
        await arena.world.turn()
        duty = (await arena.world.duties(1))[0]
        order = (await stub(arena, duty).AcceptAssignment(accept(duty))).order
    assert (order.node, order.node_endpoint) == ((f"participants/{node.id}", endpoint) if allowed else ("", ""))


async def test_one_lease_has_one_holder(arena: Arena, duty: AssignmentId) -> None:
    validator = stub(arena, duty)
    first = await validator.AcceptAssignment(accept(duty))
    held = await refusal(validator.AcceptAssignment(accept(duty, lease_holder=OTHER_HOLDER)))
    assert (type(held), held.reason) == (AlreadyExists, "LEASE_HELD")
    arena.world.clock.advance(seconds=60)
    again = await validator.AcceptAssignment(accept(duty))
    assert again.lease_token == first.lease_token
    assert again.assignment.deadline.ToDatetime(START.tzinfo) == START + timedelta(minutes=3)
    kept = (await arena.world.all_duties(1))[0]
    assert kept.lease_holder != HOLDER


async def test_accepting_is_answered_once_under_a_request_id(arena: Arena, duty: AssignmentId) -> None:
    validator = stub(arena, duty)
    first = await validator.AcceptAssignment(accept(duty, request_id="one"))
    assert await validator.AcceptAssignment(accept(duty, request_id="one")) == first


async def test_duties_of_others_unknown_ones_and_bad_holders(arena: Arena, duty: AssignmentId) -> None:
    stranger = arena.peer(key_of("stranger")).assignments
    for call in (
        stranger.AcceptAssignment(accept(duty)),
        stranger.RenewAssignment(renew(duty, "token")),
        stranger.DeclineAssignment(decline(duty)),
    ):
        assert isinstance(await refusal(call), PermissionDenied)
    validator = stub(arena, duty)
    unknown = AssignmentId(TASK, 9, 1, duty.participant)
    assert isinstance(await refusal(validator.AcceptAssignment(accept(unknown))), NotFound)
    for bad, field in [
        (accept(duty, lease_holder=b"short"), "lease_holder"),
        (accept(duty, lease_holder=b""), "lease_holder"),
        (accept(duty, name="tasks/digits"), "name"),
        (accept(duty, request_id="x" * 65), "request_id"),
    ]:
        assert bad_fields(await refusal(validator.AcceptAssignment(bad))) == [field]


@pytest.mark.parametrize(
    ("role", "state", "told"),
    [
        (Role.VALIDATOR, MembershipState.PENDING, (Unavailable, "STILL_JOINING")),
        (Role.VALIDATOR, MembershipState.REFUSED, (FailedPrecondition, "NOT_A_MEMBER")),
        (Role.TRAINING_NODE, MembershipState.ACTIVE, (FailedPrecondition, "NOT_A_MEMBER")),
    ],
)
async def test_nobody_accepts_whose_joining_is_not_in_the_log(
    arena: Arena, duty: AssignmentId, role: Role, state: MembershipState, told: tuple[type[ArenaError], str]
) -> None:
    world, key = arena.world, KEYS[duty.participant]
    await put_member(world, Member(TASK, key.id, role, state, None, world.clock()))
    refused = await refusal(stub(arena, duty).AcceptAssignment(accept(duty)))
    assert (type(refused), refused.reason) == told
    # Who has paused or left meanwhile still does what was begun.
    for state in (MembershipState.PAUSED, MembershipState.LEFT, MembershipState.ACTIVE):
        await put_member(world, Member(TASK, key.id, Role.VALIDATOR, state, None, world.clock()))
        await stub(arena, duty).AcceptAssignment(accept(duty))


async def put_member(world: World, member: Member) -> None:
    await world.store.write(lambda tx: tx.put_member(member))


async def test_an_offer_that_is_late_has_ended(arena: Arena, duty: AssignmentId) -> None:
    arena.world.clock.advance(seconds=60)
    late = await refusal(stub(arena, duty).AcceptAssignment(accept(duty)))
    assert (type(late), late.reason) == (FailedPrecondition, "ASSIGNMENT_ENDED")


async def test_a_lease_is_renewed_but_never_beyond_the_evaluations_deadline(arena: Arena, duty: AssignmentId) -> None:
    validator = stub(arena, duty)
    token = (await validator.AcceptAssignment(accept(duty))).lease_token
    deadline = START
    for _ in range(59):
        arena.world.clock.advance(seconds=60)
        renewed = (await validator.RenewAssignment(renew(duty, token))).assignment
        deadline = renewed.deadline.ToDatetime(START.tzinfo)
    assert deadline == START + timedelta(hours=1)
    arena.world.clock.advance(seconds=60)
    lost = await refusal(validator.RenewAssignment(renew(duty, token)))
    assert (type(lost), lost.reason) == (FailedPrecondition, "LEASE_LOST")


async def test_renewing_needs_the_leases_token(arena: Arena, duty: AssignmentId) -> None:
    validator = stub(arena, duty)
    assert (await refusal(validator.RenewAssignment(renew(duty, "token")))).reason == "NO_LEASE"
    token = (await validator.AcceptAssignment(accept(duty))).lease_token
    wrong = await refusal(validator.RenewAssignment(renew(duty, "wrong")))
    assert (type(wrong), wrong.reason) == (PermissionDenied, "WRONG_LEASE_TOKEN")
    assert bad_fields(await refusal(validator.RenewAssignment(renew(duty, "")))) == ["lease_token"]
    await validator.DeclineAssignment(decline(duty, token))
    assert (await refusal(validator.RenewAssignment(renew(duty, token)))).reason == "LEASE_LOST"


async def test_declining(arena: Arena, duty: AssignmentId) -> None:
    validator = stub(arena, duty)
    token = (await validator.AcceptAssignment(accept(duty))).lease_token
    assert (await refusal(validator.DeclineAssignment(decline(duty)))).reason == "WRONG_LEASE_TOKEN"
    assert bad_fields(await refusal(validator.DeclineAssignment(decline(duty, token, reason="x" * 501)))) == ["reason"]
    ended = (await validator.DeclineAssignment(decline(duty, token, reason="disk full"))).assignment
    assert ended.state == type_pb2.ASSIGNMENT_STATE_DECLINED
    assert not ended.HasField("deadline")
    assert (await refusal(validator.DeclineAssignment(decline(duty, token)))).reason == "ASSIGNMENT_ENDED"
    offered = (await arena.world.duties(1, "OFFERED"))[0]
    declined = await stub(arena, offered).DeclineAssignment(decline(offered))
    assert declined.assignment.state == type_pb2.ASSIGNMENT_STATE_DECLINED


async def test_a_watcher_sees_what_has_not_ended_then_each_change_and_resumes(arena: Arena, duty: AssignmentId) -> None:
    world, validator = arena.world, stub(arena, duty)
    stream = aiter(validator.WatchAssignments(assignment_pb2.WatchAssignmentsRequest()))
    first = await anext(stream)
    assert first.assignment.name == names.format_assignment(duty)
    assert first.assignment.state == type_pb2.ASSIGNMENT_STATE_OFFERED
    token = await world.accept(duty)
    accepted = await anext(stream)
    assert accepted.assignment.state == type_pb2.ASSIGNMENT_STATE_ACCEPTED
    await world.seal(duty, await world.report(duty, 900), token=token)
    sealed = await anext(stream)
    assert sealed.assignment.state == type_pb2.ASSIGNMENT_STATE_SEALED
    assert not sealed.assignment.opening
    for other in (await world.duties(1))[1:]:
        await world.evaluate(other, 900)
    await world.turn()
    opening = await anext(stream)
    assert opening.assignment.opening
    # After a break: what has changed since, and nothing of it twice.
    resumed = aiter(validator.WatchAssignments(assignment_pb2.WatchAssignmentsRequest(cursor=accepted.cursor)))
    assert (await anext(resumed)) == opening
    await world.open(duty, await world.report(duty, 900))
    assert (await anext(resumed)).assignment.state == type_pb2.ASSIGNMENT_STATE_OPENED


async def test_a_watcher_without_duties_waits_for_the_first(arena: Arena) -> None:
    assigned = {of.participant for of in await arena.world.duties(1)}
    free = next(validator for validator in VALIDATORS[:6] if validator.id not in assigned)
    stream = aiter(arena.peer(free).assignments.WatchAssignments(assignment_pb2.WatchAssignmentsRequest()))
    for of in await arena.world.duties(1):
        await arena.world.decline(of)
    await arena.world.turn()
    # All six are assigned now.
    assert (await anext(stream)).assignment.validator == f"participants/{free.id}"


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "9" * 30])
async def test_a_cursor_of_another_kind_is_refused(arena: Arena, duty: AssignmentId, cursor: str) -> None:
    stream = stub(arena, duty).WatchAssignments(assignment_pb2.WatchAssignmentsRequest(cursor=cursor))
    assert bad_fields(await refusal(anext(aiter(stream)))) == ["cursor"]


async def test_lists_of_a_submission_and_of_the_caller(arena: Arena, duty: AssignmentId) -> None:
    world, validator = arena.world, stub(arena, duty)
    for content in ("b", "c"):
        await world.submit(NODES[1], model_bytes(content))
    await world.turn()

    async def listed(parent: str, size: int) -> list[list[str]]:
        pages: list[list[str]] = []
        token = ""
        while not pages or token:
            page = await validator.ListAssignments(
                assignment_pb2.ListAssignmentsRequest(parent=parent, page_size=size, page_token=token)
            )
            pages.append([found.name for found in page.assignments])
            token = page.next_page_token
        return pages

    of_submission = [names.format_assignment(of) for of in await world.duties(1)]
    assert await listed(f"tasks/{TASK}/submissions/1", 2) == [of_submission[:2], of_submission[2:]]
    own = [
        names.format_assignment(of)
        for number in (1, 2, 3)
        for of in await world.duties(number)
        if of.participant == duty.participant
    ]
    assert await listed("", 1) == [[name] for name in own]
    unknown = assignment_pb2.ListAssignmentsRequest(parent=f"tasks/{TASK}/submissions/9")
    assert isinstance(await refusal(validator.ListAssignments(unknown)), NotFound)
    page = await validator.ListAssignments(
        assignment_pb2.ListAssignmentsRequest(parent=f"tasks/{TASK}/submissions/1", page_size=1)
    )
    other = assignment_pb2.ListAssignmentsRequest(parent=f"tasks/{TASK}/submissions/2", page_token=page.next_page_token)
    assert bad_fields(await refusal(validator.ListAssignments(other))) == ["page_token"]
