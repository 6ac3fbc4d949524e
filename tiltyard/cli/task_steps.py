"""`tiltyard task amend`, `close`, `holdout`, `cancel`: the steps that a task's creator takes once it is there."""

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
from tiltyard.cli.output import ProgressLine, enum_word, print_message

if TYPE_CHECKING:
    from tiltyard.registry.v1 import task_pb2


def describe(task: "task_pb2.Task") -> str:
    """One line on where a task stands."""
    state = enum_word(task, "state")
    line = (
        f"{task.name} {state}: {task.training_nodes} training nodes, {task.validators} validators, "
        f"{task.submissions} submissions"
    )
    return f"{line} ({task.state_reason})" if task.state_reason else line


def _tell(task: "task_pb2.Task", *, json: bool) -> None:
    print_message(task, as_document=True) if json else print(describe(task))


def amend(
    task: TaskArgument,
    key: KeyOption,
    display_name: Annotated[str | None, typer.Option(help="Another name for people.")] = None,
    description: Annotated[str | None, typer.Option(help="Another longer text; '' for none.")] = None,
    close_time: Annotated[str | None, typer.Option(help="A later end, as 2027-01-31T12:00:00Z.")] = None,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Change what may change of a task; the amendment is recorded. For the creator."""
    from tiltyard.client import new_request_id
    from tiltyard.registry.v1 import task_pb2

    request = task_pb2.UpdateTaskRequest(request_id=new_request_id())
    request.task.name = task_name(task)
    if display_name is not None:
        request.task.config.display_name = display_name
        request.update_mask.paths.append("config.display_name")
    if description is not None:
        request.task.config.description = description
        request.update_mask.paths.append("config.description")
    if close_time is not None:
        try:
            request.task.config.schedule.close_time.FromJsonString(close_time)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--close-time") from None
        request.update_mask.paths.append("config.schedule.close_time")
    if not request.update_mask.paths:
        raise typer.BadParameter("nothing is to be changed", param_hint="--display-name")

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            _tell((await client.tasks.UpdateTask(request)).task, json=json)

    run(work())


def close(
    task: TaskArgument,
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Take no more submissions. For the creator."""
    from tiltyard.client import new_request_id
    from tiltyard.registry.v1 import task_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            request = task_pb2.CloseTaskRequest(name=task_name(task), request_id=new_request_id())
            answer = await client.tasks.CloseTask(request)
        _tell(answer.task, json=json)

    run(work())


def cancel(
    task: TaskArgument,
    key: KeyOption,
    reason: Annotated[str, typer.Option(help="Why, up to 500 characters.")] = "",
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """End a task without a result. For the creator and operators."""
    from tiltyard.client import new_request_id
    from tiltyard.registry.v1 import task_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            request = task_pb2.CancelTaskRequest(name=task_name(task), reason=reason, request_id=new_request_id())
            answer = await client.tasks.CancelTask(request)
        _tell(answer.task, json=json)

    run(work())


def holdout(
    task: TaskArgument,
    dataset: Annotated[Path, typer.Argument(help="The file whose digest the task was created with.")],
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Publish the holdout of a closed task. For the creator.

    It is uploaded, and decides the final ranking.
    """
    from tiltyard.client import new_request_id
    from tiltyard.registry.v1 import task_pb2
    from tiltyard.transfers import upload

    async def work() -> None:
        name = task_name(task)
        async with connect(key, origin, registry) as client:
            with ProgressLine("uploading", unit="bytes") as line:
                await upload(client.artifacts, dataset, task=name, progress=line.update)
            request = task_pb2.PublishHoldoutRequest(name=name, request_id=new_request_id())
            _tell((await client.tasks.PublishHoldout(request)).task, json=json)

    run(work())
