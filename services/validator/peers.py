"""The registry over gRPC, as the domain sees it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog

from services.runtime.errors import InvalidArgument
from services.runtime.names import format_artifact, format_task, parse_artifact, parse_assignment, parse_participant
from services.runtime.rpc_errors import from_rpc_error
from services.validator.assignments import Assignment, AssignmentState, DigestMismatch, Lease, Node, Order
from services.validator.evaluation import MAX_PARAMETERS
from services.validator.leavings import TaskDatasets
from tiltyard.chunks import ArtifactStub
from tiltyard.client import new_request_id
from tiltyard.counting import Metric
from tiltyard.modelspec import Onnx, validate
from tiltyard.registry.v1 import (
    assignment_pb2,
    assignment_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    task_pb2_grpc,
)
from tiltyard.registry.v1 import task_pb2 as registry_task_pb2
from tiltyard.transfers import DigestMismatch as TransferMismatch
from tiltyard.transfers import download
from tiltyard.type.v1 import envelope_pb2, model_pb2, task_pb2
from tiltyard.type.v1 import evaluation_pb2 as evaluation_types_pb2
from tiltyard.wire import WireError, model_spec_from_proto

_PAGE_SIZE = 1000
_SHORTEST_LEASE_S = 1.0
# A proxy that has lost the registry may hold a stream open and say nothing, and an offer may run out within a minute.
_LONGEST_SILENCE_S = 20.0
_STATES = {
    evaluation_types_pb2.AssignmentState.Value(f"ASSIGNMENT_STATE_{state.value}"): state for state in AssignmentState
}
_log = structlog.get_logger("tiltyard.validator")

_SAFETENSORS = model_pb2.MODEL_FORMAT_SAFETENSORS

_ENDED_TASKS = (task_pb2.TASK_STATE_FINAL, task_pb2.TASK_STATE_CANCELLED)

_METRIC_OF = {
    task_pb2.METRIC_UNSPECIFIED: Metric.ACCURACY,
    task_pb2.METRIC_ACCURACY: Metric.ACCURACY,
    task_pb2.METRIC_TOP_K_ACCURACY: Metric.TOP_K_ACCURACY,
    task_pb2.METRIC_WITHIN_BOUND: Metric.WITHIN_BOUND,
}


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


class RegistryPeer:
    """The registry at the other end of `channel`, which signs every call."""

    def __init__(
        self, channel: grpc.aio.Channel, *, clock: Callable[[], datetime], silence_s: float = _LONGEST_SILENCE_S
    ) -> None:
        self._assignments = assignment_pb2_grpc.AssignmentServiceStub(channel)
        self._evaluations = evaluation_pb2_grpc.EvaluationServiceStub(channel)
        self._artifacts = ArtifactStub(channel)
        self._tasks = task_pb2_grpc.TaskServiceStub(channel)
        self._clock = clock
        self._silence_s = silence_s
        self._unknown: set[object] = set()

    async def watch(self, cursor: str) -> AsyncIterator[tuple[Assignment, str]]:
        """Own assignments that have not ended, then each change, with the cursor to resume after it.

        A stream that says nothing for `silence_s` seconds is given up for another one, since it may be broken.
        """
        async with _translated():
            while True:
                call = self._assignments.WatchAssignments(assignment_pb2.WatchAssignmentsRequest(cursor=cursor))
                try:
                    messages = aiter(call)
                    while (message := await self._next(messages)) is not None:
                        cursor = message.cursor
                        if (assignment := self._known(message.assignment)) is not None:
                            yield assignment, cursor
                    return
                except TimeoutError:
                    continue
                finally:
                    call.cancel()

    async def _next(
        self, messages: AsyncIterator[assignment_pb2.WatchAssignmentsResponse]
    ) -> assignment_pb2.WatchAssignmentsResponse | None:
        """The next message of a watch, None at its end. Raises TimeoutError."""
        async with asyncio.timeout(self._silence_s):
            return await anext(messages, None)

    async def assignments(self, submission: str = "") -> list[Assignment]:
        """All own assignments, those that have ended too; of one submission, where it is named, everybody's."""
        found: list[Assignment] = []
        token = ""
        while True:
            request = assignment_pb2.ListAssignmentsRequest(parent=submission, page_size=_PAGE_SIZE, page_token=token)
            async with _translated():
                page = await self._assignments.ListAssignments(request)
            found += filter(None, map(self._known, page.assignments))
            token = page.next_page_token
            if not token:
                return found

    async def accept(self, assignment: str, lease_holder: bytes) -> Lease:
        """Takes the lease, or takes it again with the same holder's secret."""
        request = assignment_pb2.AcceptAssignmentRequest(
            name=assignment, lease_holder=lease_holder, request_id=new_request_id()
        )
        async with _translated():
            answer = await self._assignments.AcceptAssignment(request)
        order, refusal = _order(answer.order)
        return Lease(token=answer.lease_token, left_s=self._left_s(answer.assignment), order=order, refusal=refusal)

    async def renew(self, assignment: str, token: str) -> float:
        """Prolongs the lease and returns the seconds that it runs from now on."""
        request = assignment_pb2.RenewAssignmentRequest(name=assignment, lease_token=token, request_id=new_request_id())
        async with _translated():
            answer = await self._assignments.RenewAssignment(request)
        return self._left_s(answer.assignment)

    async def decline(self, assignment: str, token: str, reason: str) -> None:
        """Gives the duty back."""
        request = assignment_pb2.DeclineAssignmentRequest(
            name=assignment, lease_token=token, reason=reason, request_id=new_request_id()
        )
        async with _translated():
            await self._assignments.DeclineAssignment(request)

    async def fetch(self, digest: str, size_bytes: int, destination: Path) -> None:
        """Brings an artifact, its digest checked. Raises DigestMismatch too."""
        async with _translated():
            try:
                await download(self._artifacts, format_artifact(digest), destination, size_bytes=size_bytes)
            except TransferMismatch as error:
                raise DigestMismatch(str(error)) from error

    async def seal(self, statement: bytes, token: str) -> None:
        """Records a seal: a signed envelope, serialised."""
        request = evaluation_pb2.CommitEvaluationRequest(
            statement=envelope_pb2.Envelope.FromString(statement), lease_token=token, request_id=new_request_id()
        )
        async with _translated():
            await self._evaluations.CommitEvaluation(request)

    async def open(self, report: bytes, salt: bytes, hashes: bytes) -> None:
        """Lays a sealed report open: the signed envelope, serialised, the seal's salt, the hashes under its root."""
        request = evaluation_pb2.OpenEvaluationRequest(
            report=envelope_pb2.Envelope.FromString(report),
            salt=salt,
            prediction_hashes=hashes,
            request_id=new_request_id(),
        )
        async with _translated():
            await self._evaluations.OpenEvaluation(request)

    async def datasets(self, task: str) -> TaskDatasets:
        """The hidden datasets of a task, and whether it has ended."""
        async with _translated():
            found = (await self._tasks.GetTask(registry_task_pb2.GetTaskRequest(name=format_task(task)))).task
        digests = (found.config.evaluation_dataset.sha256, found.config.holdout.sha256)
        return TaskDatasets(
            digests=frozenset(digest.hex() for digest in digests if digest), ended=found.state in _ENDED_TASKS
        )

    def _known(self, message: assignment_pb2.Assignment) -> Assignment | None:
        """An assignment of a name and a state known to this validator; others, of a newer registry, are passed over."""
        try:
            task = parse_assignment(message.name).task
        except InvalidArgument:
            self._pass_over("a name of assignments", "", message.name)
            return None
        if message.state not in _STATES:
            self._pass_over("a state of assignments", message.state, message.name)
            return None
        return _assignment(message, task)

    def _pass_over(self, what: str, value: object, name: str) -> None:
        if value not in self._unknown:
            self._unknown.add(value)
            _log.warning(f"{what} is not known to this version", state=value, first=name)

    def _left_s(self, assignment: assignment_pb2.Assignment) -> float:
        """Seconds that a lease taken or renewed just now runs, by the registry's clock: ours may be wrong, or set."""
        now = assignment.update_time.ToDatetime(tzinfo=UTC) if assignment.HasField("update_time") else self._clock()
        return max((assignment.deadline.ToDatetime(tzinfo=UTC) - now).total_seconds(), _SHORTEST_LEASE_S)


def _assignment(message: assignment_pb2.Assignment, task: str) -> Assignment:
    return Assignment(
        name=message.name,
        task=task,
        state=_STATES[message.state],
        opening=message.opening,
        deadline=message.deadline.ToDatetime(tzinfo=UTC) if message.HasField("deadline") else None,
        trace=message.traceparent,
    )


def _order(message: assignment_pb2.EvaluationOrder) -> tuple[Order | None, str]:
    """The order, or None and why this validator cannot follow it."""
    try:
        spec = model_spec_from_proto(message.spec)
    except WireError as error:
        return None, f"the task's model is not known to this validator: {error}"
    # The registry checks a task's model as well, but what it sends is not to be worked on unseen.
    if violations := validate(spec, max_parameters=MAX_PARAMETERS):
        return None, f"the task's model is not good: {violations[0].field} {violations[0].description}"
    expected = model_pb2.MODEL_FORMAT_ONNX if isinstance(spec.architecture, Onnx) else _SAFETENSORS
    if (message.format or _SAFETENSORS) != expected:
        return None, "the order's format is not that of the task's model"
    try:
        order = Order(
            dataset_digest=parse_artifact(message.dataset, "order.dataset"),
            dataset_bytes=message.dataset_size_bytes,
            model_digest=parse_artifact(message.model, "order.model"),
            model_bytes=message.model_size_bytes,
            spec=spec,
            max_cpu_s=message.max_cpu_time.ToTimedelta().total_seconds(),
            max_memory_bytes=message.max_memory_bytes,
            metric=_METRIC_OF.get(message.metric),
            top_k=message.top_k or 1,
            bound=message.bound,
            node=Node(parse_participant(message.node, "order.node"), message.node_endpoint)
            if message.node_endpoint
            else None,
        )
    except InvalidArgument as error:
        return None, f"the order is not known to this validator: {error.message}"
    return order, ""
