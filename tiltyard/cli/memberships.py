"""`tiltyard task join`, `members` and `verdicts`: who takes part in a task, and who may."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    JsonOption,
    KeyOption,
    OriginOption,
    RegistryOption,
    TaskArgument,
    connect,
    run,
    task_name,
)
from tiltyard.cli.output import as_json, enum_word, print_json, print_message, print_table

if TYPE_CHECKING:
    from tiltyard.client import Client
    from tiltyard.registry.v1 import membership_pb2

ROLES = {"training-node": "ROLE_TRAINING_NODE", "validator": "ROLE_VALIDATOR"}


def members(
    task: TaskArgument,
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """List who takes part."""
    from tiltyard.client import pages
    from tiltyard.registry.v1 import membership_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            request = membership_pb2.ListMembersRequest(parent=task_name(task), page_size=1000)
            found = [each async for page in pages(client.memberships.ListMembers, request) for each in page.members]
        if json:
            print_json({"members": [as_json(each) for each in found]})
        else:
            print_table(
                ("participant", "role", "state", "locked", "weight", "owner group"),
                (
                    (
                        each.participant,
                        enum_word(each, "role"),
                        enum_word(each, "state"),
                        each.locked_micros,
                        each.weight,
                        each.owner_group,
                    )
                    for each in found
                ),
            )

    run(work())


def verdicts(
    task: TaskArgument,
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """List the eligibility verdicts, refusals included."""
    from tiltyard.client import pages
    from tiltyard.registry.v1 import membership_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            request = membership_pb2.ListEligibilityVerdictsRequest(parent=task_name(task), page_size=1000)
            listed = pages(client.memberships.ListEligibilityVerdicts, request)
            found = [each async for page in listed for each in page.verdicts]
        if json:
            print_json({"verdicts": [as_json(each) for each in found]})
        else:
            print_table(
                ("participant", "role", "eligible", "explanation"),
                (
                    (
                        each.participant,
                        enum_word(each, "role"),
                        "yes" if each.eligible else "no",
                        each.explanation,
                    )
                    for each in found
                ),
            )

    run(work())


async def join_task(client: "Client", task: str, role: str) -> "membership_pb2.JoinTaskResponse":
    """Joins as `role`, one of ROLES, with the client's key."""
    from tiltyard.client import new_request_id, persist
    from tiltyard.registry.v1 import membership_pb2
    from tiltyard.statements import sign_statement
    from tiltyard.type.v1 import envelope_pb2, participation_pb2

    statement = envelope_pb2.JoinStatement(
        origin=client.origin,
        task=task,
        participant=client.participant,
        role=participation_pb2.Role.Value(ROLES[role]),
    )
    request = membership_pb2.JoinTaskRequest(
        statement=sign_statement(client.key, statement), request_id=new_request_id()
    )
    return await persist(lambda: client.memberships.JoinTask(request))


def join(
    task: TaskArgument,
    key: KeyOption,
    role: Annotated[str, typer.Option(help="training-node or validator.")] = "training-node",
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Take a role in a task; one role per participant and task."""
    if role not in ROLES:
        raise typer.BadParameter(f"{role!r} is neither training-node nor validator", param_hint="--role")

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            answer = await join_task(client, task_name(task), role)
        print_message(answer.member, as_document=json)

    run(work())


def _take_step(
    step: Callable[["Client", str], Awaitable["membership_pb2.Member"]],
    task: str,
    key: Path,
    origin: str,
    registry: str,
    *,
    json: bool,
) -> None:
    """Does something to the key's own membership of the task, and prints what it is then."""

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            print_message(await step(client, f"{task_name(task)}/members/{client.key.id}"), as_document=json)

    run(work())


def pause(
    task: TaskArgument,
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Be left out of new draws; duties that you have stay."""
    from tiltyard.client import new_request_id
    from tiltyard.registry.v1 import membership_pb2

    async def step(client: "Client", name: str) -> "membership_pb2.Member":
        request = membership_pb2.PauseMembershipRequest(name=name, request_id=new_request_id())
        return (await client.memberships.PauseMembership(request)).member

    _take_step(step, task, key, origin, registry, json=json)


def resume(
    task: TaskArgument,
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Take part in new draws again."""
    from tiltyard.client import new_request_id
    from tiltyard.registry.v1 import membership_pb2

    async def step(client: "Client", name: str) -> "membership_pb2.Member":
        request = membership_pb2.ResumeMembershipRequest(name=name, request_id=new_request_id())
        return (await client.memberships.ResumeMembership(request)).member

    _take_step(step, task, key, origin, registry, json=json)


def leave(
    task: TaskArgument,
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """End your part in a task.

    The stake is free once your last duty in it has ended.
    """
    from tiltyard.client import new_request_id
    from tiltyard.registry.v1 import membership_pb2

    async def step(client: "Client", name: str) -> "membership_pb2.Member":
        request = membership_pb2.LeaveTaskRequest(name=name, request_id=new_request_id())
        return (await client.memberships.LeaveTask(request)).member

    _take_step(step, task, key, origin, registry, json=json)
