"""TaskService over the domain's tasks."""

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any

from services.registry.convert import listings
from services.registry.convert import tasks as convert
from services.registry.convert.cursors import revision_of
from services.registry.convert.drafts import draft_of
from services.registry.records import Task
from services.registry.tasks import CreatedTask, Tasks
from services.runtime.auth import Role, current_caller
from services.runtime.idempotency import idempotent
from services.runtime.names import parse_task
from services.runtime.paging import PageTokens
from tiltyard.registry.v1 import task_pb2, task_pb2_grpc


class TaskServicer(task_pb2_grpc.TaskServiceServicer):
    """Tasks from their creation to their final ranking."""

    def __init__(
        self, tasks: Tasks, clock: Callable[[], datetime], *, max_dataset_bytes: int, tokens: PageTokens
    ) -> None:
        self._tasks = tasks
        self._clock = clock
        self._max_dataset_bytes = max_dataset_bytes
        self._tokens = tokens

    @idempotent(answer=convert.created_message)
    async def CreateTask(self, request: task_pb2.CreateTaskRequest, context: Any) -> CreatedTask:
        task_id = convert.task_id_of(request)
        config = draft_of(request.config, now=self._clock(), max_dataset_bytes=self._max_dataset_bytes)
        return await self._tasks.create(current_caller().id, task_id=task_id, config=config)

    async def GetTask(self, request: task_pb2.GetTaskRequest, context: Any) -> task_pb2.GetTaskResponse:
        task = await self._tasks.get(parse_task(request.name))
        return task_pb2.GetTaskResponse(task=convert.task_message(task))

    async def ListTasks(self, request: task_pb2.ListTasksRequest, context: Any) -> task_pb2.ListTasksResponse:
        page = listings.TASKS.open(request, self._tokens)
        return convert.page_message(page, await self._tasks.page(page.listing), self._tokens)

    @idempotent(answer=convert.updated_message)
    async def UpdateTask(self, request: task_pb2.UpdateTaskRequest, context: Any) -> Task:
        task, amendment = convert.amendment_of(request)
        return await self._tasks.update(current_caller().id, task, amendment)

    async def WatchTask(
        self, request: task_pb2.WatchTaskRequest, context: Any
    ) -> AsyncIterator[task_pb2.WatchTaskResponse]:
        async for task in self._tasks.watch(parse_task(request.name), after=revision_of(request.cursor)):
            yield convert.watched_message(task)

    @idempotent(answer=convert.closed_message)
    async def CloseTask(self, request: task_pb2.CloseTaskRequest, context: Any) -> Task:
        return await self._tasks.close(current_caller().id, parse_task(request.name))

    @idempotent(answer=convert.cancelled_message)
    async def CancelTask(self, request: task_pb2.CancelTaskRequest, context: Any) -> Task:
        task, reason = convert.cancel_of(request)
        caller = current_caller()
        return await self._tasks.cancel(caller.id, task, reason=reason, operator=Role.OPERATOR in caller.roles)

    @idempotent(answer=convert.published_message)
    async def PublishHoldout(self, request: task_pb2.PublishHoldoutRequest, context: Any) -> Task:
        return await self._tasks.publish_holdout(current_caller().id, parse_task(request.name))
