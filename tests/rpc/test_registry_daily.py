"""What strangers and participants may add to the record in a day, over a real server."""

from pathlib import Path

import grpc

from tests.support.registry_server import ORIGIN, RegistryServer, config_of, dataset_bytes, refused
from tiltyard.client import Client
from tiltyard.identity import Key
from tiltyard.registry.v1.membership_pb2 import LeaveTaskRequest, PauseMembershipRequest, ResumeMembershipRequest
from tiltyard.registry.v1.participant_pb2 import (
    BindOwnerRequest,
    EndorseParticipantRequest,
    RegisterParticipantRequest,
    RevokeEndorsementRequest,
)
from tiltyard.registry.v1.task_pb2 import CreateTaskRequest, UpdateTaskRequest
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2
from tiltyard.type.v1.participation_pb2 import ROLE_TRAINING_NODE, ROLE_VALIDATOR

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


async def limit(arena: RegistryServer, **settings: int) -> None:
    arena.settings.update(settings)
    await arena.restart()


def endorsement(endorser: Client, subject: Key, *, revoke: bool) -> envelope_pb2.Envelope:
    statement = envelope_pb2.EndorsementStatement(
        origin=ORIGIN,
        endorser=f"participants/{endorser.key.id}",
        subject=f"participants/{subject.id}",
        field="general",
        revoke=revoke,
    )
    return sign_statement(endorser.key, statement)


def ownership(owner: Key, participant: Key) -> envelope_pb2.Envelope:
    statement = envelope_pb2.OwnerStatement(
        origin=ORIGIN, owner=f"participants/{owner.id}", participant=f"participants/{participant.id}"
    )
    return sign_statement(owner, statement)


async def test_new_keys_add_no_more_than_one_address_may(arena: RegistryServer) -> None:
    await limit(arena, strangers_per_day_per_address=3)
    for number in range(3):
        await arena.participant(f"number {number}")
    before = await arena.kinds()
    with refused(EXHAUSTED, "STRANGERS_PER_DAY_PER_ADDRESS"):
        await arena.participant("one more")
    assert await arena.kinds() == before


async def test_everything_that_a_key_alone_can_record_is_counted(arena: RegistryServer) -> None:
    one, other = await arena.participant("one"), await arena.participant("other")
    await one.participants.EndorseParticipant(
        EndorseParticipantRequest(statement=endorsement(one, other.key, revoke=False))
    )
    await limit(arena, strangers_per_day=1)
    one = await arena.client(one.key)
    # Nothing changes by it, and still its answer is kept for a week.
    await one.participants.RegisterParticipant(RegisterParticipantRequest(display_name="one", request_id="r"))
    before = await arena.kinds()
    with refused(EXHAUSTED, "STRANGERS_PER_DAY"):
        await one.participants.RegisterParticipant(RegisterParticipantRequest(display_name="another"))
    with refused(EXHAUSTED, "STRANGERS_PER_DAY"):
        await one.participants.EndorseParticipant(
            EndorseParticipantRequest(statement=endorsement(one, other.key, revoke=False))
        )
    with refused(EXHAUSTED, "STRANGERS_PER_DAY"):
        await one.participants.RevokeEndorsement(
            RevokeEndorsementRequest(statement=endorsement(one, other.key, revoke=True))
        )
    with refused(EXHAUSTED, "STRANGERS_PER_DAY"):
        await one.participants.BindOwner(BindOwnerRequest(statement=ownership(other.key, one.key)))
    assert await arena.kinds() == before
    assert arena.selection.owners == {}
    # What was answered before is answered again.
    await one.participants.RegisterParticipant(RegisterParticipantRequest(display_name="one", request_id="r"))


async def test_refused_verdicts_are_counted_and_who_has_stake_is_let_in_all_the_same(
    arena: RegistryServer, tmp_path: Path
) -> None:
    creator, poor, rich = [await arena.participant(name) for name in ("creator", "poor", "rich")]
    dataset = dataset_bytes(tmp_path)
    await arena.open_task(creator, dataset)
    arena.selection.refused.add(poor.key.id)
    await limit(arena, strangers_per_day=2)
    poor, rich = await arena.client(poor.key), await arena.client(rich.key)
    with refused(PRECONDITION, "NOT_ELIGIBLE"):
        await arena.join(poor, ROLE_VALIDATOR)
    with refused(PRECONDITION, "NOT_ELIGIBLE"):
        await poor.tasks.CreateTask(CreateTaskRequest(config=config_of(dataset)))
    before = await arena.kinds()
    for role in (ROLE_VALIDATOR, ROLE_TRAINING_NODE):
        with refused(EXHAUSTED, "STRANGERS_PER_DAY"):
            await arena.join(poor, role)
    with refused(EXHAUSTED, "STRANGERS_PER_DAY"):
        await poor.tasks.CreateTask(CreateTaskRequest(config=config_of(dataset)))
    assert await arena.kinds() == before
    await arena.join(rich, ROLE_TRAINING_NODE)
    await rich.tasks.CreateTask(CreateTaskRequest(config=config_of(dataset)))


async def test_one_participant_changes_no_more_than_it_may(arena: RegistryServer, tmp_path: Path) -> None:
    creator, node, other = [await arena.participant(name) for name in ("creator", "node", "other")]
    dataset = dataset_bytes(tmp_path)
    await limit(arena, changes_per_day=2)
    creator, node, other = [await arena.client(each.key) for each in (creator, node, other)]
    await arena.open_task(creator, dataset)
    update = UpdateTaskRequest(update_mask={"paths": ["config.description"]})
    update.task.name, update.task.config.description = "tasks/t", "news"
    await creator.tasks.UpdateTask(update)
    await arena.join(node, ROLE_VALIDATOR)
    mine = f"tasks/t/members/{node.key.id}"
    await node.memberships.PauseMembership(PauseMembershipRequest(name=mine))
    before = await arena.kinds()
    with refused(EXHAUSTED, "CHANGES_PER_DAY"):
        await node.memberships.ResumeMembership(ResumeMembershipRequest(name=mine))
    with refused(EXHAUSTED, "CHANGES_PER_DAY"):
        await node.memberships.LeaveTask(LeaveTaskRequest(name=mine))
    # Also where nothing would change.
    with refused(EXHAUSTED, "CHANGES_PER_DAY"):
        await creator.tasks.UpdateTask(update)
    with refused(EXHAUSTED, "CHANGES_PER_DAY"):
        await creator.tasks.CreateTask(CreateTaskRequest(config=config_of(dataset)))
    assert await arena.kinds() == before
    await arena.join(other, ROLE_VALIDATOR)
