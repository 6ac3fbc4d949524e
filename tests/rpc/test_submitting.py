"""Transfers and submissions against a small registry that breaks off, restarts and lies."""

import asyncio
import hashlib
import os
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tiltyard import filedigest, transfers
from tiltyard.client import Client, ClientError
from tiltyard.commitments import submission_commitment
from tiltyard.filedigest import file_digest
from tiltyard.identity import Key
from tiltyard.registry.v1 import artifact_pb2, artifact_pb2_grpc, submission_pb2, submission_pb2_grpc
from tiltyard.statements import open_statement
from tiltyard.submitting import JournalMismatch, read_journal, submit_model
from tiltyard.transfers import CHUNK_BYTES, DigestMismatch, artifact_name, download, upload
from tiltyard.type.v1 import envelope_pb2, evaluation_pb2

TASK = "tasks/digits"
ORIGIN = "tiltyard.test"


@dataclass
class SmallRegistry(artifact_pb2_grpc.ArtifactServiceServicer, submission_pb2_grpc.SubmissionServiceServicer):
    """Artifacts and submissions in memory; `break_uploads_after` and `break_downloads_after` are bytes of a stream.

    A stream without a name begins by `None`.
    """

    parts: dict[str, bytearray] = field(default_factory=dict)
    complete: dict[str, bytes] = field(default_factory=dict)
    claims: list[tuple[str, str]] = field(default_factory=list)
    streams: list[int | None] = field(default_factory=list)
    broke: threading.Event = field(default_factory=threading.Event)
    breaks_at_name: bool = False
    has_room: bool = True
    full_disk: int = 0
    commits: dict[str, envelope_pb2.CommitStatement] = field(default_factory=dict)
    reveals: dict[str, envelope_pb2.RevealStatement] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    break_uploads_after: list[int] = field(default_factory=list)
    break_downloads_after: list[int] = field(default_factory=list)
    fail_next: dict[str, list[grpc.StatusCode]] = field(default_factory=dict)
    lost_answers: set[str] = field(default_factory=set)
    rejected: evaluation_pb2.RejectionReason.ValueType = evaluation_pb2.REJECTION_REASON_UNSPECIFIED

    async def _maybe_fail(self, method: str, context: Any) -> None:
        self.calls.append(method)
        if self.fail_next.get(method):
            await context.abort(self.fail_next[method].pop(0), "for the test")

    async def GetUpload(self, request: Any, context: Any) -> artifact_pb2.GetUploadResponse:
        await self._maybe_fail("GetUpload", context)
        done = self.complete.get(request.artifact)
        return artifact_pb2.GetUploadResponse(
            offset=len(done if done is not None else self.parts.get(request.artifact, b"")), complete=done is not None
        )

    async def UploadArtifact(self, requests: Any, context: Any) -> artifact_pb2.UploadArtifactResponse:
        await self._maybe_fail("UploadArtifact", context)
        if self.rejected:
            await context.abort_with_status(refusal(grpc.StatusCode.FAILED_PRECONDITION, "UPLOAD_NOT_EXPECTED"))
        if self.full_disk:
            self.full_disk -= 1
            await context.abort_with_status(refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL", retry_after_s=0.4))
        header = (await anext(aiter(requests))).header
        part = bytearray()
        if header.artifact:
            part = self.parts.setdefault(header.artifact, bytearray(self.complete.get(header.artifact, b"")))
        if header.offset != len(part):
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "wrong offset")
        self.streams.append(header.offset if header.artifact else None)
        if not self.has_room and header.artifact not in self.complete:
            await context.abort_with_status(refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "UPLOAD_QUOTA"))
        limit = self.break_uploads_after.pop(0) if self.break_uploads_after else None
        received = 0
        async for request in requests:
            if request.artifact:
                assert not header.artifact
                header.artifact = request.artifact
                if request.artifact in self.complete:
                    await context.abort_with_status(refusal(grpc.StatusCode.OUT_OF_RANGE, "WRONG_OFFSET"))
                self.parts[request.artifact] = part
                if self.breaks_at_name:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
                continue
            assert len(request.chunk) <= 1024 * 1024
            if limit is not None and received + len(request.chunk) > limit:
                self.broke.set()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
            part += request.chunk
            received += len(request.chunk)
        assert len(part) == header.size_bytes
        assert artifact_name(hashlib.sha256(part).digest()) == header.artifact
        self.complete[header.artifact] = bytes(part)
        self.claims.append((header.WhichOneof("purpose"), header.task or header.submission))
        return artifact_pb2.UploadArtifactResponse(
            artifact=artifact_pb2.Artifact(name=header.artifact, size_bytes=header.size_bytes)
        )

    async def GetArtifact(self, request: Any, context: Any) -> artifact_pb2.GetArtifactResponse:
        await self._maybe_fail("GetArtifact", context)
        size = len(self.complete[request.name])
        return artifact_pb2.GetArtifactResponse(artifact=artifact_pb2.Artifact(name=request.name, size_bytes=size))

    async def DownloadArtifact(
        self, request: Any, context: Any
    ) -> AsyncIterator[artifact_pb2.DownloadArtifactResponse]:
        await self._maybe_fail("DownloadArtifact", context)
        self.streams.append(request.offset)
        content = self.complete[request.name][request.offset :]
        limit = self.break_downloads_after.pop(0) if self.break_downloads_after else len(content)
        for start in range(0, limit, CHUNK_BYTES):
            yield artifact_pb2.DownloadArtifactResponse(chunk=content[start : min(limit, start + CHUNK_BYTES)])
        if limit < len(content):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")

    async def CommitSubmission(self, request: Any, context: Any) -> submission_pb2.CommitSubmissionResponse:
        await self._maybe_fail("CommitSubmission", context)
        statement, _ = open_statement(request.statement, envelope_pb2.CommitStatement)
        # The same request id gives the same submission.
        self.commits.setdefault(request.request_id, statement)
        number = list(self.commits).index(request.request_id) + 1
        await self._lose_answer("CommitSubmission", context)
        return submission_pb2.CommitSubmissionResponse(
            submission=submission_pb2.Submission(name=f"{TASK}/submissions/{number}")
        )

    async def GetSubmission(self, request: Any, context: Any) -> submission_pb2.GetSubmissionResponse:
        found = submission_pb2.Submission(name=request.name, state=evaluation_pb2.SUBMISSION_STATE_REVEALED)
        if self.rejected:
            found.state = evaluation_pb2.SUBMISSION_STATE_REJECTED
            found.reason = self.rejected
        return submission_pb2.GetSubmissionResponse(submission=found)

    async def RevealSubmission(self, request: Any, context: Any) -> submission_pb2.RevealSubmissionResponse:
        await self._maybe_fail("RevealSubmission", context)
        statement, _ = open_statement(request.statement, envelope_pb2.RevealStatement)
        self.reveals[request.request_id] = statement
        await self._lose_answer("RevealSubmission", context)
        return submission_pb2.RevealSubmissionResponse(submission=submission_pb2.Submission(name=statement.submission))

    async def _lose_answer(self, method: str, context: Any) -> None:
        if method in self.lost_answers:
            self.lost_answers.discard(method)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the process died here")


def refusal(code: grpc.StatusCode, reason: str, *, retry_after_s: float | None = None) -> grpc.Status:
    """A status that says why."""
    status = status_pb2.Status(code=code.value[0], message="for the test")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="tiltyard"))
    if retry_after_s is not None:
        wait = error_details_pb2.RetryInfo()
        wait.retry_delay.FromNanoseconds(round(retry_after_s * 1e9))
        status.details.add().Pack(wait)
    return rpc_status.to_status(status)


@asynccontextmanager
async def serving(registry: SmallRegistry) -> AsyncIterator[Client]:
    server = grpc.aio.server()
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(registry, server)
    submission_pb2_grpc.add_SubmissionServiceServicer_to_server(registry, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with Client(Key.generate(), origin=ORIGIN, registry=f"127.0.0.1:{port}") as client:
            yield client
    finally:
        await server.stop(0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(5 * CHUNK_BYTES + 321))
    return file


async def test_an_upload_arrives_in_chunks_with_its_purpose(model: Path) -> None:
    registry, seen = SmallRegistry(), list[tuple[int, int]]()
    async with serving(registry) as client:
        name = await upload(client.artifacts, model, task=TASK, progress=lambda done, total: seen.append((done, total)))
    assert registry.complete == {name: model.read_bytes()}
    assert registry.claims == [("task", TASK)]
    size = model.stat().st_size
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


async def test_a_broken_upload_goes_on_where_it_was(model: Path) -> None:
    registry = SmallRegistry(break_uploads_after=[2 * CHUNK_BYTES, 0, CHUNK_BYTES])
    async with serving(registry) as client:
        name = await upload(client.artifacts, model, submission=f"{TASK}/submissions/1")
    assert registry.complete[name] == model.read_bytes()
    assert registry.streams == [0, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES]


async def test_a_file_that_cannot_be_read_on_is_no_cancelled_upload(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(done: int, total: int) -> None:
        raise OSError("the disk is damaged")

    async with serving(SmallRegistry()) as client:
        for large in (0, 1 << 30):
            monkeypatch.setattr(transfers, "_HASHED_FIRST_BYTES", large)
            with pytest.raises(OSError, match="damaged"):
                await upload(client.artifacts, model, task=TASK, progress=damaged)


class Slow:
    """Progress of a transfer that takes a minute for each chunk, and the clock that goes with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = 0.0
        monkeypatch.setattr(transfers, "time", self)

    def monotonic(self) -> float:
        return self._now

    def __call__(self, done: int, total: int) -> None:
        self._now += 60.0


async def test_a_transfer_of_hours_goes_on_after_a_break(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, slow = SmallRegistry(break_uploads_after=[3 * CHUNK_BYTES]), Slow(monkeypatch)
    registry.break_downloads_after = [3 * CHUNK_BYTES]
    async with serving(registry) as client:
        name = await upload(client.artifacts, model, task=TASK, progress=slow, patience_s=50)
        await download(client.artifacts, name, tmp_path / "again", progress=slow, patience_s=50)
    assert (tmp_path / "again").read_bytes() == model.read_bytes()
    assert registry.streams == [0, 3 * CHUNK_BYTES] * 2


async def test_a_complete_artifact_is_claimed_but_not_sent_again(model: Path) -> None:
    registry = SmallRegistry(complete={artifact_name(file_digest(model)): model.read_bytes()})
    async with serving(registry) as client:
        await upload(client.artifacts, model, submission=f"{TASK}/submissions/2")
    assert registry.streams == [model.stat().st_size]
    assert registry.claims == [("submission", f"{TASK}/submissions/2")]


async def test_what_the_registry_refuses_is_not_tried_again(model: Path) -> None:
    registry = SmallRegistry(fail_next={"UploadArtifact": [grpc.StatusCode.FAILED_PRECONDITION]})
    async with serving(registry) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await upload(client.artifacts, model, task=TASK)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert registry.calls.count("UploadArtifact") == 1


async def test_an_upload_waits_as_long_as_it_is_told_by_a_full_disk(model: Path) -> None:
    registry = SmallRegistry(full_disk=2)
    async with serving(registry) as client:
        began = time.monotonic()
        name = await upload(client.artifacts, model, task=TASK)
    assert time.monotonic() - began >= 0.8
    assert registry.calls.count("UploadArtifact") == 3
    assert registry.complete[name] == model.read_bytes()


async def test_an_upload_that_gets_nowhere_is_given_up(model: Path) -> None:
    registry = SmallRegistry(break_uploads_after=[0] * 1000)
    async with serving(registry) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await upload(client.artifacts, model, task=TASK, patience_s=0.5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_upload_has_one_purpose_at_most(model: Path) -> None:
    async with serving(SmallRegistry()) as client:
        with pytest.raises(ValueError, match="for a task or for a submission"):
            await upload(client.artifacts, model, task=TASK, submission=f"{TASK}/submissions/1")


async def test_an_upload_without_a_task_is_a_base_model(model: Path) -> None:
    registry = SmallRegistry()
    async with serving(registry) as client:
        await upload(client.artifacts, model)
    assert registry.claims == [("base_model", "")]


class SlowDigest:
    """The digest of a file, which takes until `comes` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, comes: threading.Event) -> None:
        self.left = False
        self._comes = comes
        self._digest_until = filedigest._digest_until
        monkeypatch.setattr(filedigest, "_digest_until", self)
        monkeypatch.setattr(transfers, "_HASHED_FIRST_BYTES", 1)

    def __call__(self, path: Path, left: threading.Event) -> bytes:
        while not self._comes.wait(0.01):
            if left.is_set():
                self.left = True
                break
        return self._digest_until(path, left)


def come() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


async def test_a_large_file_is_on_its_way_before_its_digest_is_known(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, all_sent = SmallRegistry(), threading.Event()
    SlowDigest(monkeypatch, all_sent)

    def progress(done: int, total: int) -> None:
        if done == total:
            all_sent.set()

    async with serving(registry) as client:
        name = await upload(client.artifacts, model, task=TASK, progress=progress)
    assert registry.complete == {name: model.read_bytes()}
    assert registry.claims == [("task", TASK)]
    assert (registry.streams, registry.calls) == ([None], ["UploadArtifact"])


async def test_a_break_before_the_digest_is_known_begins_anew_with_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = SmallRegistry(break_uploads_after=[2 * CHUNK_BYTES, CHUNK_BYTES])
    SlowDigest(monkeypatch, registry.broke)
    async with serving(registry) as client:
        name = await upload(client.artifacts, model)
    assert registry.complete == {name: model.read_bytes()}
    assert registry.streams == [None, 0, CHUNK_BYTES]


async def test_a_break_after_the_digest_is_known_goes_on_where_it_was(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = SmallRegistry(breaks_at_name=True)
    SlowDigest(monkeypatch, come())
    async with serving(registry) as client:
        name = await upload(client.artifacts, model)
    assert registry.complete == {name: model.read_bytes()}
    first, second = registry.streams
    assert first is None
    # Not before the first chunks, which are read together.
    assert second is not None
    assert second >= 4 * CHUNK_BYTES


@pytest.mark.parametrize("has_room", [True, False])
async def test_a_large_file_that_is_there_already_is_claimed(
    model: Path, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    registry = SmallRegistry(complete={artifact_name(file_digest(model)): model.read_bytes()}, has_room=has_room)
    SlowDigest(monkeypatch, come())
    async with serving(registry) as client:
        await upload(client.artifacts, model)
    assert registry.streams == [None, model.stat().st_size]
    assert registry.claims == [("base_model", "")]


async def test_a_large_file_for_which_there_is_no_room_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SlowDigest(monkeypatch, come())
    async with serving(SmallRegistry(has_room=False)) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await upload(client.artifacts, model)
    assert ClientError.of(caught.value).reason == "UPLOAD_QUOTA"


async def test_nothing_goes_on_hashing_for_nobody(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = SmallRegistry(fail_next={"UploadArtifact": [grpc.StatusCode.PERMISSION_DENIED]})
    slow = SlowDigest(monkeypatch, threading.Event())
    async with serving(registry) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await upload(client.artifacts, model)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert slow.left
    assert registry.calls == ["UploadArtifact"]


async def test_a_large_file_that_cannot_be_read_is_not_begun(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = SmallRegistry()
    SlowDigest(monkeypatch, come())
    async with serving(registry) as client:
        with pytest.raises(IsADirectoryError):
            await upload(client.artifacts, model.parent)
    assert registry.calls == []


async def test_a_digest_that_is_known_is_taken_for_true(model: Path) -> None:
    registry = SmallRegistry()
    digest = file_digest(model)
    async with serving(registry) as client:
        assert await upload(client.artifacts, model, task=TASK, digest=digest) == artifact_name(digest)
        with pytest.raises(grpc.aio.AioRpcError):
            await upload(client.artifacts, model, task=TASK, digest=bytes(32), patience_s=0.2)


def stored(content: bytes) -> tuple[str, SmallRegistry]:
    name = artifact_name(hashlib.sha256(content).digest())
    return name, SmallRegistry(complete={name: content})


async def test_a_download_resumes_and_appears_whole(tmp_path: Path) -> None:
    content = os.urandom(4 * CHUNK_BYTES + 7)
    name, registry = stored(content)
    registry.break_downloads_after = [CHUNK_BYTES, 0, 2 * CHUNK_BYTES]
    destination = tmp_path / "deep" / "model.safetensors"
    async with serving(registry) as client:
        await download(client.artifacts, name, destination)
    assert destination.read_bytes() == content
    assert registry.streams == [0, CHUNK_BYTES, CHUNK_BYTES, 3 * CHUNK_BYTES]
    assert list(destination.parent.iterdir()) == [destination]


async def test_a_download_goes_on_after_the_process_has_died(tmp_path: Path) -> None:
    content = os.urandom(3 * CHUNK_BYTES)
    name, registry = stored(content)
    destination = tmp_path / "model.safetensors"
    (tmp_path / "model.safetensors.part").write_bytes(content[:1000])
    async with serving(registry) as client:
        await download(client.artifacts, name, destination, size_bytes=len(content))
    assert destination.read_bytes() == content
    assert registry.streams == [1000]


@dataclass
class Stalling(SmallRegistry):
    """Says when a download has begun, and sends what comes when it may."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)
    may: asyncio.Event = field(default_factory=asyncio.Event)

    async def DownloadArtifact(
        self, request: Any, context: Any
    ) -> AsyncIterator[artifact_pb2.DownloadArtifactResponse]:
        self.begun.set()
        await self.may.wait()
        async for each in super().DownloadArtifact(request, context):
            yield each


@pytest.mark.parametrize("interrupted", [False, True])
async def test_one_download_at_a_time_goes_to_one_destination(tmp_path: Path, interrupted: bool) -> None:
    content, destination = os.urandom(3 * CHUNK_BYTES), tmp_path / "model.safetensors"
    name = artifact_name(hashlib.sha256(content).digest())
    registry = Stalling(complete={name: content})
    (tmp_path / "model.safetensors.part").write_bytes(content[:1000])
    async with serving(registry) as client:
        first = asyncio.create_task(download(client.artifacts, name, destination))
        await registry.begun.wait()
        # Also one of a smaller artifact, to which the part of the first is of no use.
        for size_bytes in (len(content), 10):
            with pytest.raises(BlockingIOError, match="another download to the same place is running") as refused:
                await download(client.artifacts, name, destination, size_bytes=size_bytes)
            assert refused.value.filename == f"{destination}.part"
        if interrupted:
            first.cancel()
            await asyncio.wait([first])
        registry.may.set()
        await (download(client.artifacts, name, destination) if interrupted else first)
    assert destination.read_bytes() == content
    assert list(tmp_path.iterdir()) == [destination]


@pytest.mark.parametrize("left", [1000, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
async def test_a_part_of_another_artifact_is_begun_anew(tmp_path: Path, left: int) -> None:
    content = os.urandom(CHUNK_BYTES + 1)
    name, registry = stored(content)
    destination = tmp_path / "model.safetensors"
    (tmp_path / "model.safetensors.part").write_bytes(os.urandom(left))
    async with serving(registry) as client:
        await download(client.artifacts, name, destination)
    assert destination.read_bytes() == content
    assert list(tmp_path.iterdir()) == [destination]


@pytest.mark.parametrize("left", [b"", b"what was"])
async def test_bytes_of_another_digest_are_deleted(tmp_path: Path, left: bytes) -> None:
    name, registry = stored(b"what was promised")
    registry.complete[name] = b"what was not said"
    destination = tmp_path / "model.safetensors"
    (tmp_path / "model.safetensors.part").write_bytes(left)
    async with serving(registry) as client:
        with pytest.raises(DigestMismatch):
            await download(client.artifacts, name, destination)
    assert list(tmp_path.iterdir()) == []


async def test_more_bytes_than_promised_are_refused(tmp_path: Path) -> None:
    name, registry = stored(os.urandom(3 * CHUNK_BYTES))
    async with serving(registry) as client:
        with pytest.raises(DigestMismatch, match="longer"):
            await download(client.artifacts, name, tmp_path / "model", size_bytes=CHUNK_BYTES)
    assert list(tmp_path.iterdir()) == []


async def test_an_empty_artifact_is_downloaded(tmp_path: Path) -> None:
    name, registry = stored(b"")
    async with serving(registry) as client:
        await download(client.artifacts, name, tmp_path / "nothing")
    assert (tmp_path / "nothing").read_bytes() == b""


async def test_a_submission_is_committed_uploaded_and_revealed(model: Path, tmp_path: Path) -> None:
    registry, journal = SmallRegistry(), tmp_path / "run" / "journal.json"
    async with serving(registry) as client:
        name = await submit_model(client, task=TASK, model=model, model_index=2, journal=journal)
    (commit,), (reveal,) = registry.commits.values(), registry.reveals.values()
    assert name == reveal.submission == f"{TASK}/submissions/1"
    assert (reveal.model_index, reveal.model_digest) == (2, file_digest(model))
    assert commit.commitment == submission_commitment(
        origin=ORIGIN,
        task=TASK,
        participant=client.participant,
        model_digest=reveal.model_digest,
        salt=reveal.salt,
    )
    assert registry.complete[artifact_name(reveal.model_digest)] == model.read_bytes()
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600


@pytest.mark.parametrize("method", ["CommitSubmission", "RevealSubmission"])
async def test_a_lost_answer_makes_no_second_submission(model: Path, tmp_path: Path, method: str) -> None:
    registry, journal = SmallRegistry(lost_answers={method}), tmp_path / "journal.json"
    async with serving(registry) as client:
        with pytest.raises(grpc.aio.AioRpcError):
            await submit_model(client, task=TASK, model=model, journal=journal)
        salt = read_journal(journal).salt
        name = await submit_model(client, task=TASK, model=model, journal=journal)
    assert name == f"{TASK}/submissions/1"
    assert len(registry.commits) == len(registry.reveals) == 1
    assert [reveal.salt.hex() for reveal in registry.reveals.values()] == [salt]


async def test_the_salt_is_on_disk_before_anyone_hears_of_the_commitment(model: Path, tmp_path: Path) -> None:
    registry = SmallRegistry(fail_next={"CommitSubmission": [grpc.StatusCode.PERMISSION_DENIED]})
    async with serving(registry) as client:
        with pytest.raises(grpc.aio.AioRpcError):
            await submit_model(client, task=TASK, model=model, journal=tmp_path / "journal.json")
    assert len(bytes.fromhex(read_journal(tmp_path / "journal.json").salt)) == 32
    assert not registry.commits


async def test_a_finished_journal_needs_no_further_call(model: Path, tmp_path: Path) -> None:
    registry = SmallRegistry()
    async with serving(registry) as client:
        first = await submit_model(client, task=TASK, model=model, journal=tmp_path / "journal.json")
        before = list(registry.calls)
        assert await submit_model(client, task=TASK, model=model, journal=tmp_path / "journal.json") == first
    assert registry.calls == before


async def test_a_service_that_is_away_for_a_moment_is_waited_for(model: Path, tmp_path: Path) -> None:
    away = [grpc.StatusCode.UNAVAILABLE] * 5
    registry = SmallRegistry(fail_next={"CommitSubmission": list(away), "RevealSubmission": list(away)})
    async with serving(registry) as client:
        await submit_model(client, task=TASK, model=model, journal=tmp_path / "journal.json")
    assert len(registry.commits) == len(registry.reveals) == 1


async def test_a_journal_is_of_one_model_only(model: Path, tmp_path: Path) -> None:
    async with serving(SmallRegistry()) as client:
        await submit_model(client, task=TASK, model=model, journal=tmp_path / "journal.json")
        model.write_bytes(b"another")
        with pytest.raises(JournalMismatch, match="model_digest"):
            await submit_model(client, task=TASK, model=model, journal=tmp_path / "journal.json")


async def test_what_is_no_artifact_is_the_servers_to_refuse(tmp_path: Path) -> None:
    registry = SmallRegistry(fail_next={"GetArtifact": [grpc.StatusCode.INVALID_ARGUMENT]})
    async with serving(registry) as client:
        with pytest.raises(grpc.aio.AioRpcError):
            await download(client.artifacts, "tasks/digits", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


async def test_a_mistyped_index_is_mended_by_the_next_try(model: Path, tmp_path: Path) -> None:
    registry, journal = SmallRegistry(), tmp_path / "journal.json"
    registry.fail_next = {"RevealSubmission": [grpc.StatusCode.INVALID_ARGUMENT]}
    async with serving(registry) as client:
        with pytest.raises(grpc.aio.AioRpcError):
            await submit_model(client, task=TASK, model=model, model_index=7, journal=journal)
        name = await submit_model(client, task=TASK, model=model, model_index=1, journal=journal)
        (revealed,) = registry.reveals.values()
        assert (len(registry.commits), revealed.submission, revealed.model_index) == (1, name, 1)
        # What has been revealed stays.
        with pytest.raises(JournalMismatch, match="model_index is 1"):
            await submit_model(client, task=TASK, model=model, model_index=0, journal=journal)


async def test_two_that_begin_at_once_are_one_submission(model: Path, tmp_path: Path) -> None:
    registry = SmallRegistry(complete={artifact_name(file_digest(model)): model.read_bytes()})
    journal = tmp_path / "run" / "journal.json"
    async with serving(registry) as client:
        calls = (submit_model(client, task=TASK, model=model, journal=journal) for _ in range(8))
        assert len(set(await asyncio.gather(*calls))) == 1
    assert len(registry.commits) == 1
    assert list(journal.parent.iterdir()) == [journal]


async def test_a_file_that_is_no_journal_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "journal.json").write_text("{}")
    async with serving(SmallRegistry()) as client:
        with pytest.raises(JournalMismatch, match="not the journal"):
            await submit_model(client, task=TASK, model=model, journal=tmp_path / "journal.json")
    assert (tmp_path / "journal.json").read_text() == "{}"


async def submitted_by_command(client: Client, model: Path, *arguments: str) -> tuple[int | None, str, str]:
    """`tiltyard submit`: its status, and what it says on standard output and, of progress apart, on standard error."""
    key = model.with_name("me.pem")
    if not key.exists():
        client.key.save(key)
    submitting = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tiltyard.cli", "submit", str(model), "--task", TASK, "--key", str(key)),
        *("--origin", ORIGIN, "--registry", client._registry_address or "", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, said = (each.decode() for each in await submitting.communicate())
    lines = [line for line in said.splitlines() if not line.startswith("uploading")]
    return submitting.returncode, told.strip(), "\n".join(lines)


@pytest.mark.parametrize(
    ("reason", "revealed", "may_again"),
    [("REVEAL_EXPIRED", False, True), ("VALIDATORS_UNAVAILABLE", True, True), ("SHAPE_MISMATCH", True, False)],
)
async def test_whose_submission_was_rejected_is_told_why_and_can_submit_anew(
    model: Path, reason: str, revealed: bool, may_again: bool
) -> None:
    registry = SmallRegistry()
    journal, another = model.with_name("first.json"), model.with_name("second.json")
    async with serving(registry) as client:
        if not revealed:
            registry.lost_answers = {"RevealSubmission"}
        first = await submitted_by_command(client, model, "--journal", str(journal))
        assert (first[0], read_journal(journal).revealed) == ((0, True) if revealed else (1, False))
        registry.rejected = evaluation_pb2.RejectionReason.Value(f"REJECTION_REASON_{reason}")
        rejected = f"{TASK}/submissions/1 rejected: {reason}"
        anew = f"to submit it anew, name another --journal than {journal}" if may_again else ""
        status, told, said = await submitted_by_command(client, model, "--journal", str(journal))
        if revealed:
            assert (status, told, said) == (0, rejected, anew)
        else:
            assert (status, told, said) == (1, "", f"error: {rejected}; {anew}")
        registry.rejected = evaluation_pb2.REJECTION_REASON_UNSPECIFIED
        status, told, said = await submitted_by_command(client, model, "--journal", str(another))
        assert (status, told, said) == (0, f"{TASK}/submissions/2 revealed", "")
