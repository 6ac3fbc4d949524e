"""Tasks in the contract's words."""

from collections.abc import Sequence

from services.registry.convert.configs import config_message
from services.registry.convert.drafts import description_of, time_of
from services.registry.convert.enums import TASK_STATE
from services.registry.convert.listings import ListedPage
from services.registry.convert.participants import MAX_NAME_CHARS
from services.registry.convert.times import timestamp
from services.registry.convert.verdicts import verdict_message
from services.registry.listing import Place
from services.registry.records import Task
from services.registry.states import TaskState
from services.registry.task_states import deadline_of
from services.registry.tasks import Amendment, CreatedTask
from services.runtime import names
from services.runtime.fields import FieldChecks
from services.runtime.paging import PageTokens
from tiltyard.registry.v1 import task_pb2

_MAX_REASON_CHARS = 500
_AMENDABLE = ("config.display_name", "config.description", "config.schedule.close_time")


def task_id_of(request: task_pb2.CreateTaskRequest) -> str:
    """The id that the creator chose; empty where the registry is to make one up."""
    return names.parse_task_id(request.task_id) if request.task_id else ""


def amendment_of(request: task_pb2.UpdateTaskRequest) -> tuple[str, Amendment]:
    """The task and what changes."""
    task = names.parse_task(request.task.name, "task.name")
    checks = FieldChecks()
    paths = frozenset(request.update_mask.paths)
    checks.require("update_mask", paths, "names no field")
    for path in sorted(paths.difference(_AMENDABLE)):
        checks.fail("update_mask", f"{path[:100]} cannot be changed")
    config = request.task.config
    display_name = description = close_time = None
    if "config.display_name" in paths:
        display_name = config.display_name
        checks.text("task.config.display_name", display_name, max_chars=MAX_NAME_CHARS)
    if "config.description" in paths:
        description = description_of(checks, "task.config.description", config.description)
    if "config.schedule.close_time" in paths:
        checks.require("task.config.schedule.close_time", config.schedule.HasField("close_time"))
        close_time = time_of(checks, "task.config.schedule.close_time", config.schedule.close_time)
    checks.finish()
    return task, Amendment(display_name, description, close_time)


def cancel_of(request: task_pb2.CancelTaskRequest) -> tuple[str, str]:
    """The task and the reason."""
    checks = FieldChecks()
    checks.text("reason", request.reason, max_chars=_MAX_REASON_CHARS, min_chars=0)
    checks.finish()
    return names.parse_task(request.name), request.reason


def page_message(
    page: ListedPage, found: Sequence[tuple[Place, Task]], tokens: PageTokens
) -> task_pb2.ListTasksResponse:
    """The page, and where the next one begins."""
    tasks, token = page.close(tokens, found, task_message)
    return task_pb2.ListTasksResponse(tasks=tasks, next_page_token=token)


def task_message(task: Task) -> task_pb2.Task:
    """A task as it is."""
    return task_pb2.Task(
        name=names.format_task(task.id),
        creator=names.format_participant(task.creator),
        config=config_message(task.config),
        state=TASK_STATE.number(task.state),
        state_reason=task.state_reason,
        evaluation_rows=task.evaluation_rows,
        training_nodes=task.training_nodes,
        validators=task.validators,
        submissions=task.submissions,
        create_time=timestamp(task.create_time),
        open_time=None if task.state is TaskState.PREPARING else timestamp(task.open_time),
        update_time=timestamp(task.update_time),
        ranking_round=task.ranking_round,
        deadline=timestamp(deadline_of(task)),
    )


def watched_message(task: Task) -> task_pb2.WatchTaskResponse:
    """One message of WatchTask."""
    return task_pb2.WatchTaskResponse(task=task_message(task), cursor=str(task.revision))


def created_message(created: CreatedTask) -> task_pb2.CreateTaskResponse:
    """The answer of CreateTask."""
    return task_pb2.CreateTaskResponse(task=task_message(created.task), verdict=verdict_message(created.verdict))


def updated_message(task: Task) -> task_pb2.UpdateTaskResponse:
    """The answer of UpdateTask."""
    return task_pb2.UpdateTaskResponse(task=task_message(task))


def closed_message(task: Task) -> task_pb2.CloseTaskResponse:
    """The answer of CloseTask."""
    return task_pb2.CloseTaskResponse(task=task_message(task))


def cancelled_message(task: Task) -> task_pb2.CancelTaskResponse:
    """The answer of CancelTask."""
    return task_pb2.CancelTaskResponse(task=task_message(task))


def published_message(task: Task) -> task_pb2.PublishHoldoutResponse:
    """The answer of PublishHoldout."""
    return task_pb2.PublishHoldoutResponse(task=task_message(task))
