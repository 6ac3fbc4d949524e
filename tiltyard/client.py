"""The public client: typed stubs of an arena's services over channels that sign every call."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from tiltyard.channel import open_channel
from tiltyard.identity import Key, TokenSource
from tiltyard.inference.v2 import inference_pb2_grpc
from tiltyard.registry.v1 import (
    artifact_pb2_grpc,
    assignment_pb2_grpc,
    evaluation_pb2_grpc,
    leaderboard_pb2_grpc,
    log_pb2_grpc,
    membership_pb2_grpc,
    participant_pb2_grpc,
    submission_pb2_grpc,
    task_pb2_grpc,
)
from tiltyard.selector.v1 import draw_pb2_grpc, pool_pb2_grpc, stake_pb2_grpc
from tiltyard.trainer.v1 import trainer_pb2_grpc
from tiltyard.validator.v1 import validator_pb2_grpc

if TYPE_CHECKING:
    # Types that exist in the stubs' .pyi files only.
    from tiltyard.inference.v2.inference_pb2_grpc import GRPCInferenceServiceAsyncStub
    from tiltyard.registry.v1.artifact_pb2_grpc import ArtifactServiceAsyncStub
    from tiltyard.registry.v1.assignment_pb2_grpc import AssignmentServiceAsyncStub
    from tiltyard.registry.v1.evaluation_pb2_grpc import EvaluationServiceAsyncStub
    from tiltyard.registry.v1.leaderboard_pb2_grpc import LeaderboardServiceAsyncStub
    from tiltyard.registry.v1.log_pb2_grpc import LogServiceAsyncStub
    from tiltyard.registry.v1.membership_pb2_grpc import MembershipServiceAsyncStub
    from tiltyard.registry.v1.participant_pb2_grpc import ParticipantServiceAsyncStub
    from tiltyard.registry.v1.submission_pb2_grpc import SubmissionServiceAsyncStub
    from tiltyard.registry.v1.task_pb2_grpc import TaskServiceAsyncStub
    from tiltyard.selector.v1.draw_pb2_grpc import DrawServiceAsyncStub
    from tiltyard.selector.v1.pool_pb2_grpc import EligibilityServiceAsyncStub, PoolServiceAsyncStub
    from tiltyard.selector.v1.stake_pb2_grpc import StakeServiceAsyncStub
    from tiltyard.trainer.v1.trainer_pb2_grpc import TrainingServiceAsyncStub
    from tiltyard.validator.v1.validator_pb2_grpc import ValidationServiceAsyncStub

T = TypeVar("T")
PATIENCE_S = 60.0
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
# What a server that restarts answers with, or leaves unanswered.
_TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request that was refused, by its path, and why."""

    field: str
    description: str


class ClientError(Exception):
    """What a server answered instead of a result, taken apart.

    `code` is the status code, `reason` the machine-readable reason (`NOT_ELIGIBLE`; empty when none was given),
    `retry_after_s` the wait in seconds that the server named, or None.
    """

    def __init__(
        self,
        *,
        code: grpc.StatusCode,
        message: str,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = metadata or {}
        self.violations = violations
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> "ClientError":
        """The error of a call with its google.rpc details (ErrorInfo, BadRequest, RetryInfo) read."""
        reason, metadata, retry_after_s = "", dict[str, str](), None
        violations: list[FieldViolation] = []
        for detail in _details(error).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo()
                detail.Unpack(info)
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                refused = error_details_pb2.BadRequest()
                detail.Unpack(refused)
                violations += [FieldViolation(each.field, each.description) for each in refused.field_violations]
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo()
                detail.Unpack(retry)
                retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        return cls(
            code=error.code(),
            message=error.details() or "",
            reason=reason,
            metadata=metadata,
            violations=tuple(violations),
            retry_after_s=retry_after_s,
        )


def _details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    status = status_pb2.Status()
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin" and isinstance(value, bytes):
            status.ParseFromString(value)
    return status


def explain(error: BaseException) -> str:
    """One clear line for people on what went wrong."""
    if isinstance(error, grpc.aio.AioRpcError):
        error = ClientError.of(error)
    if not isinstance(error, ClientError):
        return str(error).replace("\n", " ") or type(error).__name__
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        return f"the service cannot be reached: {_one_line(error.message)}"
    if error.code is grpc.StatusCode.UNIMPLEMENTED:
        return "this service does not offer that yet (UNIMPLEMENTED)"
    if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "the service did not answer in time (DEADLINE_EXCEEDED)"
    line = f"{error.code.name}{f' ({error.reason})' if error.reason else ''}: {_one_line(error.message)}"
    fields = "; ".join(f"{each.field}: {each.description}" for each in error.violations)
    if fields and fields not in line:
        line += f" [{fields}]"
    if error.retry_after_s is not None:
        line += f" (try again in {error.retry_after_s:g} s)"
    return line


def _one_line(text: str) -> str:
    return " ".join(text.split())


def new_request_id() -> str:
    """A fresh idempotency key."""
    return secrets.token_hex(16)


def is_transient(error: grpc.aio.AioRpcError) -> bool:
    """Whether the same call may well succeed a little later, as after a restart of the server."""
    return error.code() in _TRANSIENT


async def persist(call: Callable[[], Awaitable[T]], *, patience_s: float = PATIENCE_S) -> T:
    """Awaits `call()`, again and again with growing pauses while it fails for a transient reason, `patience_s` at most.

    A mutating call must carry one request id through all of them. Raises the last grpc.aio.AioRpcError.
    """
    give_up = time.monotonic() + patience_s
    wait_s = _FIRST_WAIT_S
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if not is_transient(error) or time.monotonic() + wait_s > give_up:
                raise
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


class _WatchRequest(Protocol):
    cursor: str


class _Seen(Protocol):
    @property
    def cursor(self) -> str: ...


Watched = TypeVar("Watched", bound=_WatchRequest)
Seen = TypeVar("Seen", bound=_Seen)


async def watch(
    method: Callable[[Watched], AsyncIterable[Seen]], request: Watched, *, patience_s: float = PATIENCE_S
) -> AsyncIterator[Seen]:
    """The messages of a watch that resumes by cursor: a stream that breaks is started again where it was.

    `request` is copied, not changed. Raises grpc.aio.AioRpcError when it fails for good, or when broken streams bring
    nothing for `patience_s`.
    """
    asked = _copy(request)
    wait_s, give_up = _FIRST_WAIT_S, time.monotonic() + patience_s
    while True:
        try:
            async for message in method(asked):
                asked.cursor, wait_s = message.cursor, _FIRST_WAIT_S
                yield message
                give_up = time.monotonic() + patience_s
            return
        except grpc.aio.AioRpcError as error:
            if not is_transient(error) or time.monotonic() + wait_s > give_up:
                raise
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


class _PageRequest(Protocol):
    page_token: str


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


Asked = TypeVar("Asked", bound=_PageRequest)
Page = TypeVar("Page", bound=_Page)


async def pages(
    method: Callable[[Asked], Awaitable[Page]], request: Asked, *, patience_s: float = 0.0
) -> AsyncIterator[Page]:
    """All pages of a list method, in order, each asked for as `persist` does. `request` is copied, not changed."""
    asked = _copy(request)
    while True:
        page = await persist(lambda: method(asked), patience_s=patience_s)
        yield page
        if not page.next_page_token:
            return
        asked.page_token = page.next_page_token


def _copy(request: T) -> T:
    copy = type(request)()
    assert isinstance(copy, Message)
    assert isinstance(request, Message)
    copy.CopyFrom(request)
    return copy


class _Connections:
    """Channels that open with the context and close with it."""

    def __init__(self, key: Key, *, deadline_s: float) -> None:
        self.key = key
        self._deadline_s = deadline_s
        self._channels: list[grpc.aio.Channel] = []

    @property
    def participant(self) -> str:
        """Resource name of the key's holder."""
        return f"participants/{self.key.id}"

    def _open(self, address: str, audience: str) -> grpc.aio.Channel:
        channel = open_channel(address, tokens=TokenSource(self.key, audience), deadline_s=self._deadline_s)
        self._channels.append(channel)
        return channel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channels; calls in flight are cancelled."""
        channels, self._channels = self._channels, []
        await asyncio.gather(*(channel.close() for channel in channels))


class Client(_Connections):
    """A participant's connections to one arena: the registry's services and, where given, the selector's.

    Addresses are `HOST:PORT` or `unix:PATH`. Channels open on first use; use it within one event loop. A unary call
    without a deadline of its own gets `deadline_s`. Calls raise grpc.aio.AioRpcError: see `explain`.
    """

    def __init__(
        self, key: Key, *, origin: str, registry: str, selector: str | None = None, deadline_s: float = 20.0
    ) -> None:
        super().__init__(key, deadline_s=deadline_s)
        self.origin = origin
        self._registry_address = registry
        self._selector_address = selector

    @cached_property
    def _registry(self) -> grpc.aio.Channel:
        return self._open(self._registry_address, f"{self.origin}/registry")

    @cached_property
    def _selector(self) -> grpc.aio.Channel:
        if not self._selector_address:
            raise ValueError("the selector's address is not given")
        return self._open(self._selector_address, f"{self.origin}/selector")

    @cached_property
    def participants(self) -> "ParticipantServiceAsyncStub":
        """ParticipantService of the registry."""
        return participant_pb2_grpc.ParticipantServiceStub(self._registry)

    @cached_property
    def tasks(self) -> "TaskServiceAsyncStub":
        """TaskService of the registry."""
        return task_pb2_grpc.TaskServiceStub(self._registry)

    @cached_property
    def memberships(self) -> "MembershipServiceAsyncStub":
        """MembershipService of the registry."""
        return membership_pb2_grpc.MembershipServiceStub(self._registry)

    @cached_property
    def submissions(self) -> "SubmissionServiceAsyncStub":
        """SubmissionService of the registry."""
        return submission_pb2_grpc.SubmissionServiceStub(self._registry)

    @cached_property
    def assignments(self) -> "AssignmentServiceAsyncStub":
        """AssignmentService of the registry."""
        return assignment_pb2_grpc.AssignmentServiceStub(self._registry)

    @cached_property
    def evaluations(self) -> "EvaluationServiceAsyncStub":
        """EvaluationService of the registry."""
        return evaluation_pb2_grpc.EvaluationServiceStub(self._registry)

    @cached_property
    def leaderboard(self) -> "LeaderboardServiceAsyncStub":
        """LeaderboardService of the registry."""
        return leaderboard_pb2_grpc.LeaderboardServiceStub(self._registry)

    @cached_property
    def artifacts(self) -> "ArtifactServiceAsyncStub":
        """ArtifactService of the registry."""
        return artifact_pb2_grpc.ArtifactServiceStub(self._registry)

    @cached_property
    def log(self) -> "LogServiceAsyncStub":
        """LogService of the registry."""
        return log_pb2_grpc.LogServiceStub(self._registry)

    @cached_property
    def stakes(self) -> "StakeServiceAsyncStub":
        """StakeService of the selector."""
        return stake_pb2_grpc.StakeServiceStub(self._selector)

    @cached_property
    def pools(self) -> "PoolServiceAsyncStub":
        """PoolService of the selector."""
        return pool_pb2_grpc.PoolServiceStub(self._selector)

    @cached_property
    def draws(self) -> "DrawServiceAsyncStub":
        """DrawService of the selector."""
        return draw_pb2_grpc.DrawServiceStub(self._selector)

    @cached_property
    def eligibility(self) -> "EligibilityServiceAsyncStub":
        """EligibilityService of the selector."""
        return pool_pb2_grpc.EligibilityServiceStub(self._selector)


class Node(_Connections):
    """Connections to one trainer or validator, whose tokens name the id of the key that it serves."""

    def __init__(self, key: Key, *, address: str, node_id: str, deadline_s: float = 20.0) -> None:
        super().__init__(key, deadline_s=deadline_s)
        self._address = address
        self._node_id = node_id

    @cached_property
    def _node(self) -> grpc.aio.Channel:
        return self._open(self._address, self._node_id)

    @cached_property
    def trainings(self) -> "TrainingServiceAsyncStub":
        """TrainingService of a trainer."""
        return trainer_pb2_grpc.TrainingServiceStub(self._node)

    @cached_property
    def validation(self) -> "ValidationServiceAsyncStub":
        """ValidationService of a validator."""
        return validator_pb2_grpc.ValidationServiceStub(self._node)

    @cached_property
    def inference(self) -> "GRPCInferenceServiceAsyncStub":
        """Open Inference Protocol of a trainer's trained models."""
        return inference_pb2_grpc.GRPCInferenceServiceStub(self._node)
