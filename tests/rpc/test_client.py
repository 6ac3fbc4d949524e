"""The public client: errors read, pages turned, watches resumed, patience kept."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

import tiltyard
from tiltyard.calls import resuming
from tiltyard.client import Client, ClientError, FieldViolation, Node, explain, pages, persist, watch
from tiltyard.identity import Key, verify_token
from tiltyard.inference.v2 import inference_pb2, inference_pb2_grpc
from tiltyard.registry.v1 import task_pb2, task_pb2_grpc


@dataclass
class SmallTasks(task_pb2_grpc.TaskServiceServicer):
    """Tasks t0, t1, ... in pages of two, and a watch that breaks off after each of `breaks` messages, or is silent."""

    tasks: int = 5
    answers: list[grpc.StatusCode] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    cursors: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    refusal: status_pb2.Status | None = None
    details: bytes | None = None
    silences: int = 0
    """After each of the first so many messages a watch is silent."""
    holds: int = 0
    """The first so many watches bring nothing and stay open, as at a proxy that has lost its server."""
    takes_up: bool = False
    """Whether these are taken up, as by a server with nothing to tell."""
    left: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """Released by each silent watch that ends."""

    async def GetTask(self, request: Any, context: Any) -> task_pb2.GetTaskResponse:
        self.tokens.append(dict(context.invocation_metadata())["authorization"])
        if self.refusal is not None:
            await context.abort_with_status(rpc_status.to_status(self.refusal))
        if self.details is not None:
            context.set_trailing_metadata((("grpc-status-details-bin", self.details),))
        if self.answers:
            await context.abort(self.answers.pop(0), "for the test")
        return task_pb2.GetTaskResponse(task=task_pb2.Task(name=request.name))

    async def ListTasks(self, request: Any, context: Any) -> task_pb2.ListTasksResponse:
        start = int(request.page_token or 0)
        end = min(start + 2, self.tasks)
        return task_pb2.ListTasksResponse(
            tasks=[task_pb2.Task(name=f"tasks/t{n}") for n in range(start, end)],
            next_page_token=str(end) if end < self.tasks else "",
        )

    async def WatchTask(self, request: Any, context: Any) -> AsyncIterator[task_pb2.WatchTaskResponse]:
        self.cursors.append(request.cursor)
        if len(self.cursors) <= self.holds:
            try:
                if self.takes_up:
                    await context.send_initial_metadata(())
                await asyncio.Event().wait()
            finally:
                self.left.release()
        start = int(request.cursor or 0)
        limit = self.breaks.pop(0) if self.breaks else self.tasks
        for n in range(start + 1, min(start + limit, self.tasks) + 1):
            yield task_pb2.WatchTaskResponse(task=task_pb2.Task(submissions=n), cursor=str(n))
            if n <= self.silences:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.left.release()
        if start + limit < self.tasks:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")


@asynccontextmanager
async def serving(tasks: SmallTasks, address: str = "127.0.0.1:0") -> AsyncIterator[Client]:
    server = grpc.aio.server()
    task_pb2_grpc.add_TaskServiceServicer_to_server(tasks, server)
    port = server.add_insecure_port(address)
    await server.start()
    where = address if address.startswith("unix:") else f"127.0.0.1:{port}"
    try:
        async with Client(Key.generate(), origin="tiltyard.test", registry=where) as client:
            yield client
    finally:
        await server.stop(0)


async def refused(client: Client) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.tasks.GetTask(task_pb2.GetTaskRequest(name="tasks/t"))
    return caught.value


def refusal(code: int, message: str, *details: Any) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def test_every_call_is_signed_for_the_registry() -> None:
    import time

    tasks = SmallTasks()
    async with serving(tasks) as client:
        await client.tasks.GetTask(task_pb2.GetTaskRequest(name="tasks/t"))
    token = tasks.tokens[0].removeprefix("Bearer ")
    assert verify_token(token, audience="tiltyard.test/registry", now=time.time()).id == client.key.id


async def test_an_address_may_be_a_unix_socket(tmp_path: Any) -> None:
    async with serving(SmallTasks(), f"unix:{tmp_path}/registry.sock") as client:
        answer = await client.tasks.GetTask(task_pb2.GetTaskRequest(name="tasks/t"))
    assert answer.task.name == "tasks/t"


async def test_details_of_an_error_are_read() -> None:
    status = refusal(
        code_pb2.RESOURCE_EXHAUSTED,
        "20 submissions a day are allowed",
        error_details_pb2.ErrorInfo(reason="DAILY_LIMIT", domain="tiltyard", metadata={"limit": "20"}),
        error_details_pb2.RetryInfo(retry_delay={"seconds": 90}),
    )
    async with serving(SmallTasks(refusal=status)) as client:
        caught = await refused(client)
    error = ClientError.of(caught)
    assert (error.code, error.reason, error.metadata) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "DAILY_LIMIT",
        {"limit": "20"},
    )
    assert error.retry_after_s == 90.0
    assert explain(caught) == ("RESOURCE_EXHAUSTED (DAILY_LIMIT): 20 submissions a day are allowed (try again in 90 s)")


async def test_refused_fields_are_named() -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="config.models[0].mlp.hidden", description="empty")
    status = refusal(
        code_pb2.INVALID_ARGUMENT,
        "the request\nis invalid",
        error_details_pb2.BadRequest(field_violations=[violation]),
    )
    async with serving(SmallTasks(refusal=status)) as client:
        caught = await refused(client)
    assert ClientError.of(caught).violations == (FieldViolation("config.models[0].mlp.hidden", "empty"),)
    assert explain(caught) == "INVALID_ARGUMENT: the request is invalid [config.models[0].mlp.hidden: empty]"


def detail(kind: str, value: bytes) -> bytes:
    packed = AnyMessage(type_url=f"type.googleapis.com/google.rpc.{kind}", value=value)
    return status_pb2.Status(details=[packed]).SerializeToString()


@pytest.mark.parametrize(
    "details",
    [
        b"\xff" * 7,
        b"junk!",
        detail("ErrorInfo", b"\xff" * 4),
        detail("RetryInfo", b"\x0a\x0a\x08" + b"\xff" * 8 + b"\x7f"),
    ],
    ids=["no status", "text", "no message", "a wait without end"],
)
async def test_details_that_cannot_be_read_leave_the_error_what_it_is(details: bytes) -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    async with serving(SmallTasks(details=details, answers=[code] * 2)) as client:
        caught = await refused(client)
        with pytest.raises(grpc.aio.AioRpcError):
            await persist(lambda: client.tasks.GetTask(task_pb2.GetTaskRequest(name="tasks/t")))
    assert (ClientError.of(caught).code, ClientError.of(caught).reason) == (code, "")
    assert explain(caught).startswith("RESOURCE_EXHAUSTED: for the test")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, "does not offer that yet"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "did not answer in time"),
        (grpc.StatusCode.NOT_FOUND, "NOT_FOUND: for the test"),
    ],
)
async def test_bare_errors_are_explained_too(code: grpc.StatusCode, words: str) -> None:
    async with serving(SmallTasks(answers=[code])) as client:
        assert words in explain(await refused(client))


async def test_pages_follow_each_other_to_the_end() -> None:
    request = task_pb2.ListTasksRequest(page_size=2)
    async with serving(SmallTasks(tasks=5)) as client:
        found = [[task.name for task in page.tasks] async for page in pages(client.tasks.ListTasks, request)]
    assert found == [["tasks/t0", "tasks/t1"], ["tasks/t2", "tasks/t3"], ["tasks/t4"]]
    assert request.page_token == ""


async def test_a_broken_watch_resumes_without_gap_or_repeat() -> None:
    tasks = SmallTasks(tasks=6, breaks=[2, 0, 3])
    request = task_pb2.WatchTaskRequest(name="tasks/t")
    async with serving(tasks) as client:
        seen = [message.task.submissions async for message in watch(client.tasks.WatchTask, request)]
    assert seen == [1, 2, 3, 4, 5, 6]
    assert tasks.cursors == ["", "2", "2", "5"]


async def test_a_silent_watch_goes_on_without_gap_or_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "_LONGEST_SILENCE_S", 0.5)
    tasks = SmallTasks(tasks=4, silences=2)
    request = task_pb2.WatchTaskRequest(name="tasks/t")
    async with serving(tasks) as client, asyncio.timeout(60):
        seen = [message.task.submissions async for message in watch(client.tasks.WatchTask, request)]
        assert seen == [1, 2, 3, 4]
        assert {"1", "2"} <= {*tasks.cursors}
        # Nobody is left waiting at the other end.
        for _ in range(2):
            await tasks.left.acquire()


async def test_a_watch_that_brings_nothing_is_given_up() -> None:
    request = task_pb2.WatchTaskRequest(name="tasks/t")
    async with serving(SmallTasks(breaks=[0] * 100)) as client:
        with pytest.raises(grpc.aio.AioRpcError):
            [message async for message in watch(client.tasks.WatchTask, request, patience_s=0.4)]


async def test_a_watch_that_no_server_takes_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "DEADLINE_S", 0.3)
    tasks = SmallTasks(holds=100)
    request = task_pb2.WatchTaskRequest(name="tasks/t")
    async with serving(tasks) as client, asyncio.timeout(60):
        with pytest.raises(grpc.aio.AioRpcError, match=r"nothing has come for 0\.3 s"):
            [message async for message in watch(client.tasks.WatchTask, request, patience_s=1.0)]
        assert len(tasks.cursors) > 1
        for _ in tasks.cursors:
            await tasks.left.acquire()


async def test_a_watch_that_a_server_has_taken_up_may_be_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "DEADLINE_S", 0.3)
    monkeypatch.setattr(resuming, "_LONGEST_SILENCE_S", 0.5)
    tasks = SmallTasks(tasks=1, holds=3, takes_up=True)
    request = task_pb2.WatchTaskRequest(name="tasks/t")
    async with serving(tasks) as client, asyncio.timeout(60):
        seen = [message.cursor async for message in watch(client.tasks.WatchTask, request, patience_s=0.4)]
    assert seen == ["1"]


async def test_a_watch_that_was_silent_for_longer_than_its_patience_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "DEADLINE_S", 0.25)
    asked: list[str] = []

    async def broken_twice(request: task_pb2.WatchTaskRequest) -> AsyncIterator[task_pb2.WatchTaskResponse]:
        asked.append(request.cursor)
        if len(asked) == 1:
            yield task_pb2.WatchTaskResponse(cursor="1")
        if len(asked) < 3:
            await asyncio.sleep(0.3)  # as a task in which nothing happens
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())

    request = task_pb2.WatchTaskRequest(name="tasks/t")
    seen = [message.cursor async for message in watch(broken_twice, request, patience_s=0.25)]
    assert (seen, asked) == (["1"], ["", "1", "1"])


async def test_patience_outlasts_a_restart_but_no_refusal() -> None:
    tasks = SmallTasks(answers=[grpc.StatusCode.UNAVAILABLE] * 9)
    request = task_pb2.GetTaskRequest(name="tasks/t")
    async with serving(tasks) as client:
        assert (await persist(lambda: client.tasks.GetTask(request))).task.name == "tasks/t"
        tasks.answers = [grpc.StatusCode.PERMISSION_DENIED]
        with pytest.raises(grpc.aio.AioRpcError):
            await persist(lambda: client.tasks.GetTask(request))
    assert tasks.answers == []


@pytest.mark.parametrize(
    ("code", "reason"), [(code_pb2.RESOURCE_EXHAUSTED, "DISK_FULL"), (code_pb2.UNAVAILABLE, "AWAY")]
)
async def test_patience_waits_as_long_as_it_is_told(code: int, reason: str) -> None:
    wait = error_details_pb2.RetryInfo()
    wait.retry_delay.FromMilliseconds(400)
    tasks = SmallTasks(refusal=refusal(code, "not now", error_details_pb2.ErrorInfo(reason=reason), wait))
    request = task_pb2.GetTaskRequest(name="tasks/t")
    asked_at: list[float] = []
    async with serving(tasks) as client:

        async def asked() -> task_pb2.GetTaskResponse:
            asked_at.append(time.monotonic())
            if len(asked_at) == 3:
                tasks.refusal = None
            return await client.tasks.GetTask(request)

        assert (await persist(asked)).task.name == "tasks/t"
    first, second, third = asked_at
    assert second - first >= 0.4
    assert third - second >= 0.4


async def test_a_node_is_sent_batches_and_answers_as_large_as_the_inference_protocol_allows() -> None:
    class Echo(inference_pb2_grpc.GRPCInferenceServiceServicer):
        async def ModelInfer(self, request: Any, context: Any) -> inference_pb2.ModelInferResponse:
            return inference_pb2.ModelInferResponse(raw_output_contents=request.raw_input_contents)

    large = [("grpc.max_receive_message_length", 16 * 1024 * 1024), ("grpc.max_send_message_length", 16 * 1024 * 1024)]
    server = grpc.aio.server(options=large)
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    rows = bytes(15 * 1024 * 1024)
    try:
        async with Node(Key.generate(), address=f"127.0.0.1:{port}", node_id="0" * 40) as node:
            answer = await node.inference.ModelInfer(inference_pb2.ModelInferRequest(raw_input_contents=[rows]))
    finally:
        await server.stop(0)
    assert answer.raw_output_contents[0] == rows


def test_a_client_says_that_it_belongs_to_another_event_loop() -> None:
    async def first() -> tuple[Client, Node]:
        async with serving(SmallTasks()) as client, Node(client.key, address="127.0.0.1:1", node_id="0" * 40) as node:
            await client.tasks.GetTask(task_pb2.GetTaskRequest(name="tasks/t"))
            assert client.tasks is client.tasks
            _ = node.trainings
        return client, node

    client, node = asyncio.run(first())

    async def second() -> None:
        with pytest.raises(RuntimeError, match="this Client belongs to another event loop"):
            await client.tasks.GetTask(task_pb2.GetTaskRequest(name="tasks/t"))
        with pytest.raises(RuntimeError, match="this Client belongs to another event loop"):
            _ = client.log
        with pytest.raises(RuntimeError, match="this Node belongs to another event loop"):
            _ = node.trainings

    asyncio.run(second())


async def test_without_its_address_the_selector_is_missed_by_name() -> None:
    async with Client(Key.generate(), origin="tiltyard.test", registry="127.0.0.1:1") as client:
        with pytest.raises(ValueError, match="selector"):
            _ = client.stakes


@pytest.mark.parametrize("address", ["http://arena.test:7401", "arena.test"])
def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        Client(Key.generate(), origin="tiltyard.test", registry=address)
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        Node(Key.generate(), address=address, node_id="ab" * 20)


def test_the_package_offers_the_client() -> None:
    assert tiltyard.Client is Client
    assert tiltyard.persist is persist
    assert {*tiltyard.__all__} <= {*dir(tiltyard)}
    for name in tiltyard.__all__:
        assert getattr(tiltyard, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = tiltyard.Server  # type: ignore[attr-defined]
