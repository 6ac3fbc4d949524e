"""The public client: typed stubs of an arena's services over channels that sign every call."""

import asyncio
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

import grpc

from tiltyard.calls.channel import INFERENCE_MESSAGE_BYTES, MAX_MESSAGE_BYTES, open_channel
from tiltyard.calls.errors import ClientError, FieldViolation, client_errors, explain, is_transient
from tiltyard.calls.resuming import PATIENCE_S, new_request_id, pages, persist, watch
from tiltyard.chunks import ArtifactStub
from tiltyard.endpoints import check_address
from tiltyard.identity import Key, TokenSource
from tiltyard.inference.v2 import inference_pb2_grpc
from tiltyard.registry.v1 import (
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
    from collections.abc import Callable

    # Types that exist in the stubs' .pyi files only.
    from tiltyard.calls.tls import ChannelTls
    from tiltyard.inference.v2.inference_pb2_grpc import GRPCInferenceServiceAsyncStub
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

__all__ = [
    "PATIENCE_S",
    "Client",
    "ClientError",
    "FieldViolation",
    "Node",
    "client_errors",
    "explain",
    "is_transient",
    "new_request_id",
    "pages",
    "persist",
    "watch",
]


T = TypeVar("T")


class _Stub(Generic[T]):
    """A stub that is made once, and given out in the event loop of its channel alone: gRPC would fail deep inside."""

    def __init__(self, make: "Callable[[Any], T]") -> None:
        self.__doc__ = make.__doc__
        self._make = make

    @overload
    def __get__(self, connections: None, owner: type[object]) -> Self: ...

    @overload
    def __get__(self, connections: "_Connections", owner: type[object]) -> T: ...

    def __get__(self, connections: "_Connections | None", owner: type[object]) -> Self | T:
        if connections is None:
            return self
        connections._check_loop()
        stubs = connections._stubs
        if self not in stubs:
            stubs[self] = self._make(connections)
        found: T = stubs[self]
        return found


class _Connections:
    """Channels that open with the context and close with it."""

    def __init__(self, key: Key, *, deadline_s: float, tls: "ChannelTls | None") -> None:
        self.key = key
        self._tls = tls
        self._deadline_s = deadline_s
        self._channels: list[grpc.aio.Channel] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stubs: dict[_Stub[Any], Any] = {}

    @property
    def participant(self) -> str:
        """Resource name of the key's holder."""
        return f"participants/{self.key.id}"

    def _check_loop(self) -> None:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        if self._loop is None:
            self._loop = running
        elif self._loop is not running:
            raise RuntimeError(
                f"this {type(self).__name__} belongs to another event loop, in which it was used first: open one in "
                "each (each asyncio.run has its own), or take a BlockingClient"
            )

    def _open(self, address: str, audience: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
        channel = open_channel(
            address,
            tokens=TokenSource(self.key, audience),
            tls=self._tls,
            deadline_s=self._deadline_s,
            max_message_bytes=max_message_bytes,
        )
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

    Addresses are `HOST:PORT` or `unix:PATH`; anything else raises ValueError. Channels open on first use; use it within
    one event loop: in another its stubs raise RuntimeError. A unary call without a deadline of its own gets
    `deadline_s`. Without `tls` calls go out in plaintext. Calls raise grpc.aio.AioRpcError, or ClientError within
    `client_errors()`.
    """

    def __init__(
        self,
        key: Key,
        *,
        origin: str,
        registry: str,
        selector: str | None = None,
        tls: "ChannelTls | None" = None,
        deadline_s: float = 20.0,
    ) -> None:
        super().__init__(key, deadline_s=deadline_s, tls=tls)
        self.origin = origin
        self._registry_address = registry and check_address(registry)
        self._selector_address = selector and check_address(selector)

    @cached_property
    def _registry(self) -> grpc.aio.Channel:
        if not self._registry_address:
            raise ValueError("the registry's address is not given")
        return self._open(self._registry_address, f"{self.origin}/registry")

    @cached_property
    def _selector(self) -> grpc.aio.Channel:
        if not self._selector_address:
            raise ValueError("the selector's address is not given")
        return self._open(self._selector_address, f"{self.origin}/selector")

    @_Stub
    def participants(self) -> "ParticipantServiceAsyncStub":
        """ParticipantService of the registry."""
        return participant_pb2_grpc.ParticipantServiceStub(self._registry)

    @_Stub
    def tasks(self) -> "TaskServiceAsyncStub":
        """TaskService of the registry."""
        return task_pb2_grpc.TaskServiceStub(self._registry)

    @_Stub
    def memberships(self) -> "MembershipServiceAsyncStub":
        """MembershipService of the registry."""
        return membership_pb2_grpc.MembershipServiceStub(self._registry)

    @_Stub
    def submissions(self) -> "SubmissionServiceAsyncStub":
        """SubmissionService of the registry."""
        return submission_pb2_grpc.SubmissionServiceStub(self._registry)

    @_Stub
    def assignments(self) -> "AssignmentServiceAsyncStub":
        """AssignmentService of the registry."""
        return assignment_pb2_grpc.AssignmentServiceStub(self._registry)

    @_Stub
    def evaluations(self) -> "EvaluationServiceAsyncStub":
        """EvaluationService of the registry."""
        return evaluation_pb2_grpc.EvaluationServiceStub(self._registry)

    @_Stub
    def leaderboard(self) -> "LeaderboardServiceAsyncStub":
        """LeaderboardService of the registry."""
        return leaderboard_pb2_grpc.LeaderboardServiceStub(self._registry)

    @_Stub
    def artifacts(self) -> ArtifactStub:
        """ArtifactService of the registry."""
        return ArtifactStub(self._registry)

    @_Stub
    def log(self) -> "LogServiceAsyncStub":
        """LogService of the registry."""
        return log_pb2_grpc.LogServiceStub(self._registry)

    @_Stub
    def stakes(self) -> "StakeServiceAsyncStub":
        """StakeService of the selector."""
        return stake_pb2_grpc.StakeServiceStub(self._selector)

    @_Stub
    def pools(self) -> "PoolServiceAsyncStub":
        """PoolService of the selector."""
        return pool_pb2_grpc.PoolServiceStub(self._selector)

    @_Stub
    def draws(self) -> "DrawServiceAsyncStub":
        """DrawService of the selector."""
        return draw_pb2_grpc.DrawServiceStub(self._selector)

    @_Stub
    def eligibility(self) -> "EligibilityServiceAsyncStub":
        """EligibilityService of the selector."""
        return pool_pb2_grpc.EligibilityServiceStub(self._selector)


class Node(_Connections):
    """Connections to one trainer or validator, whose tokens name the id of the key that it serves."""

    def __init__(
        self, key: Key, *, address: str, node_id: str, tls: "ChannelTls | None" = None, deadline_s: float = 20.0
    ) -> None:
        super().__init__(key, deadline_s=deadline_s, tls=tls)
        self._address = check_address(address)
        self._node_id = node_id

    @cached_property
    def _node(self) -> grpc.aio.Channel:
        return self._open(self._address, self._node_id, max_message_bytes=INFERENCE_MESSAGE_BYTES)

    @_Stub
    def trainings(self) -> "TrainingServiceAsyncStub":
        """TrainingService of a trainer."""
        return trainer_pb2_grpc.TrainingServiceStub(self._node)

    @_Stub
    def validation(self) -> "ValidationServiceAsyncStub":
        """ValidationService of a validator."""
        return validator_pb2_grpc.ValidationServiceStub(self._node)

    @_Stub
    def inference(self) -> "GRPCInferenceServiceAsyncStub":
        """Open Inference Protocol of a trainer's trained models."""
        return inference_pb2_grpc.GRPCInferenceServiceStub(self._node)
