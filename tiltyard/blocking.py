"""The client for programs without an event loop: the same services, each call waits for its answer.

It is `tiltyard.client` on a thread of its own, so that tokens, TLS, deadlines and retries are the same.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
)
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import grpc

from tiltyard.calls.errors import ClientError, client_errors
from tiltyard.client import PATIENCE_S, Client, Node, pages, watch
from tiltyard.identity import Key
from tiltyard.submitting import submit_model
from tiltyard.transfers import Progress, download, upload
from tiltyard.type.v1 import model_pb2

if TYPE_CHECKING:
    from tiltyard.calls.tls import ChannelTls
    from tiltyard.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
    from tiltyard.registry.v1.artifact_pb2_grpc import ArtifactServiceStub
    from tiltyard.registry.v1.assignment_pb2_grpc import AssignmentServiceStub
    from tiltyard.registry.v1.evaluation_pb2_grpc import EvaluationServiceStub
    from tiltyard.registry.v1.leaderboard_pb2_grpc import LeaderboardServiceStub
    from tiltyard.registry.v1.log_pb2_grpc import LogServiceStub
    from tiltyard.registry.v1.membership_pb2_grpc import MembershipServiceStub
    from tiltyard.registry.v1.participant_pb2_grpc import ParticipantServiceStub
    from tiltyard.registry.v1.submission_pb2_grpc import SubmissionServiceStub
    from tiltyard.registry.v1.task_pb2_grpc import TaskServiceStub
    from tiltyard.selector.v1.draw_pb2_grpc import DrawServiceStub
    from tiltyard.selector.v1.stake_pb2_grpc import StakeServiceStub
    from tiltyard.trainer.v1.trainer_pb2_grpc import TrainingServiceStub
    from tiltyard.validator.v1.validator_pb2_grpc import ValidationServiceStub

T = TypeVar("T")
Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

_END = object()


class _ClientClosed(RuntimeError):
    """A call after `close`."""


class _NeverAnswered(RuntimeError):
    """A call that nobody would answer: of what the client itself calls back, or of a process that was forked off."""


class _Loop:
    """An event loop on a thread of its own. What is awaited there raises ClientError for what a server refuses."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tiltyard-client", daemon=True)
        self._thread.start()
        self._process = os.getpid()
        self._closing = threading.Lock()
        self._closed = False

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns; an interrupt of the waiting thread cancels it.

        Raises ClientError with CANCELLED where the client is closed meanwhile, RuntimeError where it was before, or
        where it would wait for ever: in a callback of the client's own, which holds everything up while it runs, and in
        a process that was forked off, in which the thread does not run.
        """
        try:
            self._check_caller()
        except _NeverAnswered:
            work.close()
            raise
        with self._closing:
            if self._closed:
                work.close()
                raise _ClientClosed("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            with client_errors():
                return future.result()
        except (concurrent.futures.CancelledError, asyncio.CancelledError, grpc.aio.UsageError):
            if not self._closed:
                raise
            raise ClientError(code=grpc.StatusCode.CANCELLED, message="the client was closed") from None
        finally:
            future.cancel()

    def _check_caller(self) -> None:
        if os.getpid() != self._process:
            raise _NeverAnswered("the client was opened by the process that this one was forked from: open another")
        if threading.current_thread() is self._thread:
            raise _NeverAnswered("a progress callback can't use the client that calls it")

    def iterate(self, stream: Callable[[], AsyncIterable[T]]) -> Iterator[T]:
        """What the stream yields; leaving the loop over it early ends the stream."""
        flow = _closing(stream)
        try:
            while (message := self.wait(_next(flow))) is not _END:
                yield cast("T", message)
        finally:
            # A client that is closed has ended its streams. Its loop ends those that are collected on its thread.
            with contextlib.suppress(_ClientClosed, _NeverAnswered):
                self.wait(_close(flow))

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Awaits `last`, cancels what others wait for, and ends the thread. A second time does nothing.

        Nor does it in a process that was forked off: the connections are its parent's.
        """
        if os.getpid() != self._process:
            return
        self._check_caller()
        with self._closing:
            if self._closed:
                return
            self._closed = True
        try:
            asyncio.run_coroutine_threadsafe(_ended(last), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _ended(last: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        await last()
    finally:
        # What waits for its next try would wait for ever in a loop that has stopped.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()


async def _next(flow: AsyncGenerator[T, None]) -> object:
    return await anext(flow, _END)


async def _close(flow: AsyncGenerator[T, None]) -> None:
    await flow.aclose()


async def _closing(stream: Callable[[], AsyncIterable[T]]) -> AsyncGenerator[T, None]:
    call = stream()
    try:
        async for message in call:
            yield message
    finally:
        if isinstance(call, grpc.aio.Call):
            call.cancel()


class _Requests:
    """The requests of one stream. What ends them early is kept: grpc.aio makes a cancelled call of it."""

    def __init__(self, requests: Iterable[object]) -> None:
        self._requests = requests
        self._failure: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[object]:
        try:
            iterator = iter(self._requests)
            # The program may take its time for the next one; the loop must not.
            while (request := await asyncio.to_thread(next, iterator, _END)) is not _END:
                yield request
        except Exception as error:
            self._failure = error
            raise

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Within it that is raised as it is."""
        try:
            yield
        except (asyncio.CancelledError, concurrent.futures.CancelledError, ClientError):
            if self._failure is None:
                raise
            raise self._failure from None


class _Method:
    """One method, blocking: an answer, or an iterator where the server streams. A stream of requests is an iterable."""

    def __init__(self, loop: _Loop, method: Any) -> None:
        self._loop = loop
        self.asynchronous = method

    def __call__(self, request: Any, **options: Any) -> Any:
        method = self.asynchronous
        streams_in = isinstance(method, grpc.aio.StreamUnaryMultiCallable | grpc.aio.StreamStreamMultiCallable)
        streams_out = isinstance(method, grpc.aio.UnaryStreamMultiCallable | grpc.aio.StreamStreamMultiCallable)

        requests = _Requests(request) if streams_in else None

        def call() -> Any:
            return method(aiter(requests) if requests is not None else request, **options)

        if streams_out:
            answers = self._loop.iterate(call)
            return answers if requests is None else _told(requests, answers)
        with requests.told() if requests is not None else contextlib.nullcontext():
            return self._loop.wait(_answer(call))


def _told(requests: _Requests, answers: Iterator[T]) -> Iterator[T]:
    with requests.told():
        yield from answers


async def _answer(call: Callable[[], Awaitable[T]]) -> T:
    return await call()


class _Service:
    """The methods of a stub, blocking."""

    def __init__(self, loop: _Loop, stub: object) -> None:
        self._loop = loop
        self._stub = stub

    def __getattr__(self, name: str) -> _Method:
        return _Method(self._loop, getattr(self._stub, name))


class _Blocking:
    """Connections on a loop's thread, opened on first use and closed with the context."""

    def __init__(self, connections: Client | Node) -> None:
        self._connections = connections
        self._loop = _Loop()

    @property
    def key(self) -> Key:
        """The key that signs the calls."""
        return self._connections.key

    @property
    def participant(self) -> str:
        """Resource name of the key's holder."""
        return self._connections.participant

    def _service(self, name: str) -> Any:
        # A channel belongs to the loop in which it is opened.
        async def opened() -> object:
            return getattr(self._connections, name)

        return _Service(self._loop, self._loop.wait(opened()))

    def pages(self, method: "grpc.UnaryUnaryMultiCallable[Asked, Answered]", request: Asked) -> Iterator[Answered]:
        """All pages of a list method of this client, in order. `request` is copied, not changed."""
        listing = cast("_Method", method).asynchronous
        return self._loop.iterate(lambda: pages(listing, cast("Any", request)))

    def watch(
        self,
        method: "grpc.UnaryStreamMultiCallable[Asked, Answered]",
        request: Asked,
        *,
        patience_s: float = PATIENCE_S,
    ) -> Iterator[Answered]:
        """The messages of a watch method of this client; a stream that breaks goes on after its last cursor.

        Raises ClientError when it fails for good, or when broken streams bring nothing for `patience_s`.
        """
        watching = cast("_Method", method).asynchronous
        return self._loop.iterate(lambda: watch(watching, cast("Any", request), patience_s=patience_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channels; calls in flight raise ClientError with CANCELLED, further ones RuntimeError."""
        self._loop.close(self._connections.close)


class BlockingClient(_Blocking):
    """`tiltyard.Client` without await: the same arguments, services and deadlines. Calls raise ClientError.

    May be used from several threads, but not in a process that is forked off. Close it, or use it as a context: it has
    a thread of its own.
    """

    _connections: Client

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
        super().__init__(
            Client(key, origin=origin, registry=registry, selector=selector, tls=tls, deadline_s=deadline_s)
        )

    def upload(
        self, path: Path, *, task: str | None = None, submission: str | None = None, progress: Progress | None = None
    ) -> str:
        """Uploads a file for a task or a submission and returns the artifact's name, as `tiltyard.transfers.upload`."""

        async def uploading() -> str:
            return await upload(self._connections.artifacts, path, task=task, submission=submission, progress=progress)

        return self._loop.wait(uploading())

    def download(self, artifact: str, destination: Path, *, progress: Progress | None = None) -> None:
        """Downloads an artifact, which appears at `destination` whole or not at all: `tiltyard.transfers.download`."""

        async def downloading() -> None:
            await download(self._connections.artifacts, artifact, destination, progress=progress)

        self._loop.wait(downloading())

    def submit(
        self,
        *,
        task: str,
        model: Path,
        journal: Path,
        model_index: int = 0,
        format: model_pb2.ModelFormat.ValueType = model_pb2.MODEL_FORMAT_SAFETENSORS,
        progress: Progress | None = None,
    ) -> str:
        """Commits to a model, uploads and reveals it, and returns the submission's name: `submit_model`."""
        return self._loop.wait(
            submit_model(
                self._connections,
                task=task,
                model=model,
                model_index=model_index,
                format=format,
                journal=journal,
                progress=progress,
            )
        )

    @cached_property
    def participants(self) -> "ParticipantServiceStub":
        """ParticipantService of the registry."""
        return cast("ParticipantServiceStub", self._service("participants"))

    @cached_property
    def tasks(self) -> "TaskServiceStub":
        """TaskService of the registry."""
        return cast("TaskServiceStub", self._service("tasks"))

    @cached_property
    def memberships(self) -> "MembershipServiceStub":
        """MembershipService of the registry."""
        return cast("MembershipServiceStub", self._service("memberships"))

    @cached_property
    def submissions(self) -> "SubmissionServiceStub":
        """SubmissionService of the registry."""
        return cast("SubmissionServiceStub", self._service("submissions"))

    @cached_property
    def assignments(self) -> "AssignmentServiceStub":
        """AssignmentService of the registry."""
        return cast("AssignmentServiceStub", self._service("assignments"))

    @cached_property
    def evaluations(self) -> "EvaluationServiceStub":
        """EvaluationService of the registry."""
        return cast("EvaluationServiceStub", self._service("evaluations"))

    @cached_property
    def leaderboard(self) -> "LeaderboardServiceStub":
        """LeaderboardService of the registry."""
        return cast("LeaderboardServiceStub", self._service("leaderboard"))

    @cached_property
    def artifacts(self) -> "ArtifactServiceStub":
        """ArtifactService of the registry."""
        return cast("ArtifactServiceStub", self._service("artifacts"))

    @cached_property
    def log(self) -> "LogServiceStub":
        """LogService of the registry."""
        return cast("LogServiceStub", self._service("log"))

    @cached_property
    def stakes(self) -> "StakeServiceStub":
        """StakeService of the selector."""
        return cast("StakeServiceStub", self._service("stakes"))

    @cached_property
    def draws(self) -> "DrawServiceStub":
        """DrawService of the selector."""
        return cast("DrawServiceStub", self._service("draws"))


class BlockingNode(_Blocking):
    """`tiltyard.Node` without await: connections to one trainer or validator. Calls raise ClientError."""

    def __init__(
        self, key: Key, *, address: str, node_id: str, tls: "ChannelTls | None" = None, deadline_s: float = 20.0
    ) -> None:
        super().__init__(Node(key, address=address, node_id=node_id, tls=tls, deadline_s=deadline_s))

    @cached_property
    def trainings(self) -> "TrainingServiceStub":
        """TrainingService of a trainer."""
        return cast("TrainingServiceStub", self._service("trainings"))

    @cached_property
    def validation(self) -> "ValidationServiceStub":
        """ValidationService of a validator."""
        return cast("ValidationServiceStub", self._service("validation"))

    @cached_property
    def inference(self) -> "GRPCInferenceServiceStub":
        """Open Inference Protocol of a trainer's trained models."""
        return cast("GRPCInferenceServiceStub", self._service("inference"))
