"""The client without await: calls, pages, watches, files and errors, against real servers."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest

import tiltyard
from tiltyard.authority import Authority
from tiltyard.registry.v1 import artifact_pb2, artifact_pb2_grpc, task_pb2, task_pb2_grpc


@dataclass
class SmallTasks(task_pb2_grpc.TaskServiceServicer):
    """Five tasks in pages of two, and an endless watch that breaks off once."""

    cursors: list[str] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    watched: threading.Event = field(default_factory=threading.Event)

    def GetTask(self, request: Any, context: Any) -> task_pb2.GetTaskResponse:
        if request.name == "tasks/none":
            context.abort(grpc.StatusCode.NOT_FOUND, "there is no such task")
        return task_pb2.GetTaskResponse(task=task_pb2.Task(name=request.name))

    def ListTasks(self, request: Any, context: Any) -> task_pb2.ListTasksResponse:
        start = int(request.page_token or 0)
        end = min(start + 2, 5)
        tasks = [task_pb2.Task(name=f"tasks/t{n}") for n in range(start, end)]
        return task_pb2.ListTasksResponse(tasks=tasks, next_page_token=str(end) if end < 5 else "")

    def WatchTask(self, request: Any, context: Any) -> Iterator[task_pb2.WatchTaskResponse]:
        self.cursors.append(request.cursor)
        context.add_callback(self.left.set)
        self.watched.set()
        if request.name == "tasks/silent":
            self.left.wait()
            return
        start = int(request.cursor or 0)
        for n in range(start + 1, start + 1000):
            if n == 3 and len(self.cursors) == 1:
                self.left.clear()
                context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
            yield task_pb2.WatchTaskResponse(task=task_pb2.Task(submissions=n), cursor=str(n))


@dataclass
class OneArtifact(artifact_pb2_grpc.ArtifactServiceServicer):
    """Keeps what was uploaded last."""

    content: bytes = b""

    def GetUpload(self, request: Any, context: Any) -> artifact_pb2.GetUploadResponse:
        return artifact_pb2.GetUploadResponse()

    def UploadArtifact(self, requests: Any, context: Any) -> artifact_pb2.UploadArtifactResponse:
        next(requests)
        self.content = b"".join(request.chunk for request in requests)
        return artifact_pb2.UploadArtifactResponse()

    def GetArtifact(self, request: Any, context: Any) -> artifact_pb2.GetArtifactResponse:
        artifact = artifact_pb2.Artifact(name=request.name, size_bytes=len(self.content))
        return artifact_pb2.GetArtifactResponse(artifact=artifact)

    def DownloadArtifact(self, request: Any, context: Any) -> Iterator[artifact_pb2.DownloadArtifactResponse]:
        yield artifact_pb2.DownloadArtifactResponse(chunk=self.content[request.offset :])


@pytest.fixture
def tasks() -> SmallTasks:
    return SmallTasks()


@contextmanager
def serving(tasks: SmallTasks, authority: Authority | None = None) -> Iterator[tiltyard.BlockingClient]:
    """A client of a server; with `authority` they speak TLS."""
    server = grpc.server(ThreadPoolExecutor(4))
    task_pb2_grpc.add_TaskServiceServicer_to_server(tasks, server)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(OneArtifact(), server)
    tls = None
    if authority is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        issued, tls = authority.issue("server", ["127.0.0.1"]), tiltyard.ChannelTls(authority.certificate)
        pair = issued.key.read_bytes(), issued.certificate.read_bytes()
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    key = tiltyard.Key.generate()
    with tiltyard.BlockingClient(key, origin="tiltyard.test", registry=f"127.0.0.1:{port}", tls=tls) as client:
        yield client
    server.stop(None).wait()


@pytest.fixture
def client(tasks: SmallTasks) -> Iterator[tiltyard.BlockingClient]:
    with serving(tasks) as client:
        yield client


def test_a_call_waits_for_its_answer(client: tiltyard.BlockingClient) -> None:
    answer = client.tasks.GetTask(task_pb2.GetTaskRequest(name="tasks/t"), timeout=10)
    assert answer.task.name == "tasks/t"


def test_calls_of_all_shapes_go_by_tls_too(tasks: SmallTasks, tmp_path: Path) -> None:
    with serving(tasks, Authority.open(tmp_path)) as client:
        assert client.tasks.GetTask(task_pb2.GetTaskRequest(name="tasks/t")).task.name == "tasks/t"
        watched = client.tasks.WatchTask(task_pb2.WatchTaskRequest(name="tasks/t"))
        assert next(watched).cursor == "1"
        watched.close()  # type: ignore[attr-defined]
        header = artifact_pb2.UploadHeader(size_bytes=3, base_model=True)
        messages = [
            artifact_pb2.UploadArtifactRequest(header=header),
            artifact_pb2.UploadArtifactRequest(chunk=b"abc"),
        ]
        client.artifacts.UploadArtifact(iter(messages))
        answers = client.artifacts.DownloadArtifact(artifact_pb2.DownloadArtifactRequest(name="artifacts/a", offset=1))
        assert b"".join(each.chunk for each in answers) == b"bc"


def test_a_refusal_is_a_client_error(client: tiltyard.BlockingClient) -> None:
    with pytest.raises(tiltyard.ClientError) as caught:
        client.tasks.GetTask(task_pb2.GetTaskRequest(name="tasks/none"))
    assert (caught.value.code, caught.value.message) == (grpc.StatusCode.NOT_FOUND, "there is no such task")


def test_pages_come_in_order(client: tiltyard.BlockingClient) -> None:
    found = [
        task.name for page in client.pages(client.tasks.ListTasks, task_pb2.ListTasksRequest()) for task in page.tasks
    ]
    assert found == [f"tasks/t{n}" for n in range(5)]


def test_a_watch_goes_on_where_it_broke_and_ends_when_it_is_left(
    client: tiltyard.BlockingClient, tasks: SmallTasks
) -> None:
    seen = []
    for message in client.watch(client.tasks.WatchTask, task_pb2.WatchTaskRequest(name="tasks/t")):
        seen.append(message.task.submissions)
        if len(seen) == 5:
            break
    assert seen == [1, 2, 3, 4, 5]
    assert tasks.cursors == ["", "2"]
    assert tasks.left.wait(10)


def test_files_go_up_and_come_down(client: tiltyard.BlockingClient, tmp_path: Path) -> None:
    model, copy = tmp_path / "model", tmp_path / "copy"
    model.write_bytes(b"weights" * 100_000)
    moved: list[int] = []
    artifact = client.upload(model, submission="tasks/t/submissions/1", progress=lambda done, _: moved.append(done))
    assert artifact == f"artifacts/{sha256(model.read_bytes()).hexdigest()}"
    assert moved[-1] == 700_000
    client.download(artifact, copy)
    assert copy.read_bytes() == model.read_bytes()


def test_what_a_progress_callback_raises_comes_out_of_the_transfer(
    client: tiltyard.BlockingClient, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyError("enough")

    (tmp_path / "sent").write_bytes(b"weights" * 100_000)
    with pytest.raises(KeyError, match="enough"):
        client.upload(tmp_path / "sent", task="tasks/t", progress=stop)


def test_a_progress_callback_that_uses_its_client_is_told_so(client: tiltyard.BlockingClient, tmp_path: Path) -> None:
    def ask(done: int, total: int) -> None:
        client.tasks.GetTask(task_pb2.GetTaskRequest(name="tasks/t"))

    (tmp_path / "sent").write_bytes(b"weights" * 100_000)
    with pytest.raises(RuntimeError, match="can't use the client"):
        client.upload(tmp_path / "sent", task="tasks/t", progress=ask)


def test_what_ends_a_stream_of_requests_is_raised_as_it_is(client: tiltyard.BlockingClient) -> None:
    def requests() -> Iterator[artifact_pb2.UploadArtifactRequest]:
        yield artifact_pb2.UploadArtifactRequest()
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        client.artifacts.UploadArtifact(requests())


FORKED = """
import os
from tiltyard import BlockingClient, Key

with BlockingClient(Key.generate(), origin="tiltyard.test", registry="127.0.0.1:1") as client:
    child = os.fork()
    if not child:
        try:
            client.tasks
        except RuntimeError as error:
            print(error)
if child:
    os.waitpid(child, 0)
"""


def test_a_process_that_was_forked_off_is_told_to_open_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout.strip().endswith("open another")) == (0, True)


def test_several_threads_share_a_client_and_closing_twice_is_harmless(client: tiltyard.BlockingClient) -> None:
    names = [f"tasks/t{n}" for n in range(20)]
    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda name: client.tasks.GetTask(task_pb2.GetTaskRequest(name=name)), names)
        assert [answer.task.name for answer in answers] == names
    client.close()
    client.close()


def test_closing_ends_what_other_threads_wait_for(
    client: tiltyard.BlockingClient, tasks: SmallTasks, tmp_path: Path
) -> None:
    watching = client.watch(client.tasks.WatchTask, task_pb2.WatchTaskRequest(name="tasks/silent"))
    # Nobody is there: it would try again for a minute.
    absent = tiltyard.BlockingClient(tiltyard.Key.generate(), origin="t", registry=f"unix:{tmp_path / 'nobody'}")
    with ThreadPoolExecutor(2) as threads:
        waits = [threads.submit(next, watching), threads.submit(absent.download, f"artifacts/{'0' * 64}", tmp_path)]
        assert tasks.watched.wait(10)
        client.close()
        absent.close()
        for wait in waits:
            error = wait.exception(10)
            assert isinstance(error, tiltyard.ClientError)
            assert (error.code, error.message) == (grpc.StatusCode.CANCELLED, "the client was closed")


def test_a_closed_client_says_so(client: tiltyard.BlockingClient) -> None:
    watching = client.watch(client.tasks.WatchTask, task_pb2.WatchTaskRequest(name="tasks/t"))
    next(watching)
    service = client.tasks
    client.close()
    watching.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        service.GetTask(task_pb2.GetTaskRequest(name="tasks/t"))


def test_several_threads_may_close_at_once(client: tiltyard.BlockingClient) -> None:
    with ThreadPoolExecutor(4) as threads:
        for closed in [threads.submit(client.close) for _ in range(4)]:
            closed.result(10)


async def test_within_client_errors_an_awaited_call_raises_one_too(tasks: SmallTasks) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    task_pb2_grpc.add_TaskServiceServicer_to_server(tasks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    async with tiltyard.Client(tiltyard.Key.generate(), origin="t", registry=f"127.0.0.1:{port}") as client:
        with pytest.raises(tiltyard.ClientError, match="no such task"), tiltyard.client_errors():
            await client.tasks.GetTask(task_pb2.GetTaskRequest(name="tasks/none"))
    server.stop(None).wait()
