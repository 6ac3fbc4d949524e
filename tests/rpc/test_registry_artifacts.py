"""ArtifactService over a real server: who may hand in, who may read, and broken streams."""

import asyncio
import errno
import hashlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import grpc
import pytest

from services.registry.records import Assignment, Submission
from services.registry.states import AssignmentState, ModelFormat, SubmissionState, TaskState
from tests.support.registry_server import (
    RegistryServer,
    artifact_name,
    config_of,
    dataset_bytes,
    digest_of,
    refused,
    uploading,
)
from tiltyard.client import Client
from tiltyard.identity import Key
from tiltyard.registry.v1.artifact_pb2 import (
    DownloadArtifactRequest,
    DownloadArtifactResponse,
    GetArtifactRequest,
    GetUploadRequest,
    UploadArtifactRequest,
    UploadHeader,
)
from tiltyard.registry.v1.task_pb2 import CloseTaskRequest, PublishHoldoutRequest

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DENIED = grpc.StatusCode.PERMISSION_DENIED
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
NOT_FOUND = grpc.StatusCode.NOT_FOUND
MODEL = b"the model's bytes " * 100


async def sent(messages: Sequence[UploadArtifactRequest]) -> AsyncIterator[UploadArtifactRequest]:
    for message in messages:
        yield message


def header(content: bytes, *, task: str | None = "tasks/t", **fields: object) -> UploadHeader:
    values: dict[str, object] = {"artifact": artifact_name(content), "size_bytes": len(content), "task": task}
    return UploadHeader(**{**values, **fields})  # type: ignore[arg-type]


async def send(client: Client, head: UploadHeader, *chunks: bytes) -> None:
    messages = [UploadArtifactRequest(header=head), *(UploadArtifactRequest(chunk=chunk) for chunk in chunks)]
    await client.artifacts.UploadArtifact(sent(messages))


async def progress(client: Client, content: bytes) -> tuple[int, bool]:
    answer = await client.artifacts.GetUpload(GetUploadRequest(artifact=artifact_name(content)))
    return answer.offset, answer.complete


async def download(client: Client, content: bytes, *, offset: int = 0) -> bytes:
    request = DownloadArtifactRequest(name=artifact_name(content), offset=offset)
    return b"".join([message.chunk async for message in client.artifacts.DownloadArtifact(request)])


async def code_of(call: Awaitable[object]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def is_readable(client: Client, content: bytes) -> bool:
    code = await code_of(client.artifacts.GetArtifact(GetArtifactRequest(name=artifact_name(content))))
    if code is grpc.StatusCode.OK:
        assert await download(client, content) == content
        return True
    assert code is DENIED
    with refused(DENIED, "ARTIFACT_NOT_YOURS"):
        await download(client, content)
    return False


@pytest.fixture
async def dataset(tmp_path: Path) -> bytes:
    return dataset_bytes(tmp_path)


@pytest.fixture
async def creator(arena: RegistryServer, dataset: bytes) -> Client:
    """The creator of task t, which is PREPARING and has a holdout."""
    creator = await arena.participant("creator")
    config = config_of(dataset)
    config.holdout.CopyFrom(digest_of(HOLDOUT))
    config.limits.max_model_bytes = 4000
    await arena.create_task(creator, dataset, config=config)
    return creator


HOLDOUT = b"no good, but of the digest that was announced"


async def put_submission(arena: RegistryServer, node: Client, **changes: object) -> Submission:
    """A committed submission, or one further on."""
    submission = Submission(
        task="t",
        number=1,
        participant=node.key.id,
        state=SubmissionState.COMMITTED,
        commitment=bytes(32),
        commit_time=arena.clock(),
        deadline=arena.clock() + timedelta(hours=1),
    )
    changed = replace(submission, **changes)  # type: ignore[arg-type]
    await store_of(arena).write(lambda tx: tx.put_submission(changed))
    return changed


async def put_lease(arena: RegistryServer, validator: Client, **changes: object) -> None:
    """A running lease on submission 1 in round 1, or otherwise."""
    lease = Assignment(
        task="t",
        number=1,
        round=1,
        validator=validator.key.id,
        state=AssignmentState.ACCEPTED,
        position=0,
        create_time=arena.clock(),
        update_time=arena.clock(),
        deadline=arena.clock() + timedelta(minutes=2),
    )
    changed = replace(lease, **changes)  # type: ignore[arg-type]
    await store_of(arena).write(lambda tx: tx.put_assignment(changed))


def store_of(arena: RegistryServer):  # type: ignore[no-untyped-def]
    """The registry's own store: states that other services lead to are put there directly."""
    return arena.registry.store


# Handing in


async def test_an_upload_is_resumed_where_it_broke_off(arena: RegistryServer, creator: Client, dataset: bytes) -> None:
    assert await progress(creator, dataset) == (0, False)
    with refused(INVALID, "SIZE_MISMATCH", field="chunk"):
        await send(creator, header(dataset), dataset[:100], dataset[100:150])
    assert await progress(creator, dataset) == (150, False)
    await arena.restart()
    creator = await arena.client(creator.key)
    assert await progress(creator, dataset) == (150, False)
    with refused(grpc.StatusCode.OUT_OF_RANGE, "WRONG_OFFSET"):
        await send(creator, header(dataset, offset=149), dataset[149:])
    answer = await creator.artifacts.UploadArtifact(uploading(header(dataset, offset=150), dataset))
    assert answer.artifact.name == artifact_name(dataset)
    assert await progress(creator, dataset) == (len(dataset), True)
    assert await download(creator, dataset) == dataset


async def test_a_cancelled_stream_keeps_its_bytes(creator: Client, dataset: bytes) -> None:
    arrived = asyncio.Event()

    async def messages() -> AsyncIterator[UploadArtifactRequest]:
        yield UploadArtifactRequest(header=header(dataset))
        yield UploadArtifactRequest(chunk=dataset[:50])
        arrived.set()
        await asyncio.Event().wait()

    call = creator.artifacts.UploadArtifact(messages())
    await arrived.wait()
    async with asyncio.timeout(20):
        # No event tells a client what has arrived, nor that the server has heard of the cancellation: both are asked.
        offset = 0
        while offset < 50:
            offset, _ = await progress(creator, dataset)
        with refused(grpc.StatusCode.ABORTED, "UPLOAD_RUNNING"):
            await send(creator, header(dataset, offset=50), dataset[50:])
        call.cancel()
        code = grpc.StatusCode.ABORTED
        while code is grpc.StatusCode.ABORTED:
            code = await code_of(send(creator, header(dataset, offset=50), dataset[50:]))
    assert code is grpc.StatusCode.OK
    assert await download(creator, dataset) == dataset


async def test_other_bytes_than_the_digest_says_begin_anew(creator: Client, dataset: bytes) -> None:
    with refused(INVALID, "DIGEST_MISMATCH"):
        await send(creator, header(dataset), bytes(len(dataset)))
    assert await progress(creator, dataset) == (0, False)
    with refused(NOT_FOUND):
        await creator.artifacts.GetArtifact(GetArtifactRequest(name=artifact_name(dataset)))


async def test_malformed_uploads_name_the_field(creator: Client, dataset: bytes) -> None:
    chunk = UploadArtifactRequest(chunk=b"x")
    for messages, field in (
        ([], "header"),
        ([chunk], "header"),
        ([UploadArtifactRequest(header=header(dataset, size_bytes=0))], "header.size_bytes"),
        ([UploadArtifactRequest(header=header(dataset, size_bytes=(1 << 20) + 1))], "header.size_bytes"),
        ([UploadArtifactRequest(header=header(dataset, offset=-1))], "header.offset"),
        ([UploadArtifactRequest(header=header(dataset, offset=len(dataset) + 1))], "header.offset"),
        ([UploadArtifactRequest(header=header(dataset, task=None))], "header.purpose"),
        ([UploadArtifactRequest(header=header(dataset, artifact="artifacts/12"))], "header.artifact"),
        ([UploadArtifactRequest(header=header(dataset, task="t"))], "header.task"),
        ([UploadArtifactRequest(header=header(dataset)), UploadArtifactRequest(chunk=b"")], "chunk"),
        ([UploadArtifactRequest(header=header(dataset)), UploadArtifactRequest(header=header(dataset))], "chunk"),
    ):
        with refused(INVALID, field=field):
            await creator.artifacts.UploadArtifact(sent(messages))


async def test_sizes_are_held_to(arena: RegistryServer, creator: Client, dataset: bytes) -> None:
    with refused(INVALID, "SIZE_MISMATCH", field="header.size_bytes"):
        await send(creator, header(dataset, size_bytes=len(dataset) + 1), dataset)
    with refused(INVALID, "SIZE_MISMATCH", field="chunk"):
        await send(creator, header(dataset), dataset, b"more")
    with refused(INVALID, "CHUNK_TOO_LARGE", field="chunk"):
        await send(creator, header(dataset), bytes((1 << 20) + 1))
    node = await arena.participant()
    await put_submission(arena, node)
    large = bytes(4001)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE"):
        await arena.upload(node, large, submission="tasks/t/submissions/1")


async def test_nobody_hands_in_what_is_not_awaited(arena: RegistryServer, creator: Client, dataset: bytes) -> None:
    node, other = await arena.participant(), await arena.participant()
    with refused(PRECONDITION, "UPLOAD_NOT_EXPECTED"):
        await arena.upload(creator, MODEL, task="tasks/t")
    with refused(DENIED, "NOT_THE_CREATOR"):
        await arena.upload(other, dataset, task="tasks/t")
    with refused(NOT_FOUND):
        await arena.upload(other, dataset, task="tasks/none")
    with refused(NOT_FOUND):
        await arena.upload(node, MODEL, submission="tasks/t/submissions/1")
    await put_submission(arena, node)
    with refused(DENIED, "NOT_THE_SUBMITTER"):
        await arena.upload(other, MODEL, submission="tasks/t/submissions/1")
    await put_submission(arena, node, state=SubmissionState.REJECTED, deadline=None)
    with refused(PRECONDITION, "UPLOAD_NOT_EXPECTED"):
        await arena.upload(node, MODEL, submission="tasks/t/submissions/1")


async def test_a_refusal_reaches_whoever_is_still_sending(arena: RegistryServer, dataset: bytes) -> None:
    # As often as it takes: of a hundred such answers grpc.aio loses two or three.
    other, content = await arena.participant(), bytes(1 << 20)
    for number in range(200):
        call = other.artifacts.UploadArtifact(
            uploading(header(content, task=f"tasks/none-{number}"), content, chunk=1 << 16)
        )
        with refused(NOT_FOUND):
            await call
        assert await call.code() is NOT_FOUND
        assert f"none-{number}" in (await call.details() or "")
        assert "grpc-status-details-bin" in (await call.trailing_metadata() or ())


async def test_the_generated_methods_and_those_with_chunks_are_the_same_calls(
    arena: RegistryServer, creator: Client, dataset: bytes
) -> None:
    name = artifact_name(dataset)
    await creator.artifacts.upload_chunks(uploading(header(dataset), dataset))
    request = DownloadArtifactRequest(name=name)
    messages = [message async for message in creator.artifacts.DownloadArtifact(request)]
    assert all(isinstance(message, DownloadArtifactResponse) for message in messages)
    assert b"".join(message.chunk for message in messages) == dataset
    assert b"".join([each.chunk async for each in creator.artifacts.download_chunks(request)]) == dataset


async def test_an_artifact_that_is_there_is_claimed_without_sending_it_again(
    arena: RegistryServer, creator: Client, dataset: bytes
) -> None:
    await arena.upload(creator, dataset, task="tasks/t")
    await arena.create_task(creator, dataset, task="second")
    await send(creator, header(dataset, task="tasks/second", offset=len(dataset)))
    # Somebody else has to show the bytes, or anybody who knows a digest could claim to have them.
    stranger = await arena.participant()
    await arena.create_task(stranger, dataset, task="third")
    assert await progress(stranger, dataset) == (0, False)
    with refused(grpc.StatusCode.OUT_OF_RANGE, "WRONG_OFFSET"):
        await send(stranger, header(dataset, task="tasks/third", offset=len(dataset)))
    await arena.upload(stranger, dataset, task="tasks/third")
    assert await is_readable(stranger, dataset)


# Reading


async def test_the_evaluation_dataset_is_for_its_creator_and_lease_holders(
    arena: RegistryServer, creator: Client, dataset: bytes
) -> None:
    await arena.upload(creator, dataset, task="tasks/t")
    await arena.upload(creator, HOLDOUT, task="tasks/t")
    holder, node = await arena.participant(), await arena.participant()
    await put_submission(arena, node)
    assert await is_readable(creator, dataset)
    assert await is_readable(creator, HOLDOUT)
    for reader in (holder, node, await arena.participant(key=arena.operator)):
        assert not await is_readable(reader, dataset)
    await put_lease(arena, holder, state=AssignmentState.OFFERED)
    assert not await is_readable(holder, dataset)
    await put_lease(arena, holder)
    assert await is_readable(holder, dataset)
    assert not await is_readable(holder, HOLDOUT)
    await put_lease(arena, holder, task="other", number=7)
    await put_lease(arena, holder, state=AssignmentState.SEALED)
    assert not await is_readable(holder, dataset)
    await put_lease(arena, holder)
    arena.clock.advance(seconds=120)
    assert not await is_readable(holder, dataset)
    await put_lease(arena, holder, round=2)
    assert await is_readable(holder, HOLDOUT)
    assert not await is_readable(holder, dataset)


async def test_publishing_a_holdout_makes_nobody_a_reader_of_what_others_have_handed_in(
    arena: RegistryServer, creator: Client, dataset: bytes, tmp_path: Path
) -> None:
    await arena.upload(creator, dataset, task="tasks/t")
    stranger, own = await arena.participant(), dataset_bytes(tmp_path, seed=1)
    config = config_of(own)
    config.holdout.CopyFrom(digest_of(dataset))
    await arena.open_task(stranger, own, task="second", config=config)
    await stranger.tasks.CloseTask(CloseTaskRequest(name="tasks/second"))
    with refused(PRECONDITION, "HOLDOUT_NOT_UPLOADED"):
        await stranger.tasks.PublishHoldout(PublishHoldoutRequest(name="tasks/second"))
    assert not await is_readable(stranger, dataset)
    await arena.upload(stranger, dataset, task="tasks/second")
    await stranger.tasks.PublishHoldout(PublishHoldoutRequest(name="tasks/second"))


async def test_a_model_is_for_its_submitter_lease_holders_and_after_close_the_creator(
    arena: RegistryServer, creator: Client, dataset: bytes
) -> None:
    node, holder, other = await arena.participant(), await arena.participant(), await arena.participant()
    await put_submission(arena, node)
    await arena.upload(node, MODEL, submission="tasks/t/submissions/1")
    # Before the reveal it is nobody's business but its submitter's.
    await put_lease(arena, holder)
    assert not await is_readable(holder, MODEL)
    await put_submission(
        arena,
        node,
        state=SubmissionState.EVALUATING,
        model_digest=hashlib.sha256(MODEL).digest(),
        size_bytes=len(MODEL),
        format=ModelFormat.SAFETENSORS,
        structure_checked=True,
        deadline=None,
    )
    assert await is_readable(node, MODEL)
    assert await is_readable(holder, MODEL)
    await put_lease(arena, other, number=2)
    for reader in (creator, other, await arena.participant(), await arena.participant(key=arena.operator)):
        assert not await is_readable(reader, MODEL)
    await put_lease(arena, holder, state=AssignmentState.EXPIRED)
    assert not await is_readable(holder, MODEL)

    for state, readable in ((TaskState.CLOSED, True), (TaskState.FINAL, True), (TaskState.CANCELLED, False)):
        await store_of(arena).write(lambda tx, state=state: tx.put_task(replace(tx.task("t"), state=state)))
        assert await is_readable(creator, MODEL) is readable


async def test_artifacts_that_nobody_handed_in_are_not_found(arena: RegistryServer) -> None:
    client = await arena.participant()
    with refused(NOT_FOUND, "ARTIFACT_NOT_FOUND"):
        await client.artifacts.GetArtifact(GetArtifactRequest(name=artifact_name(MODEL)))
    with refused(INVALID, field="name"):
        await client.artifacts.GetArtifact(GetArtifactRequest(name="artifacts/xyz"))


async def test_downloads_begin_at_any_offset(arena: RegistryServer, creator: Client, dataset: bytes) -> None:
    await arena.upload(creator, dataset, task="tasks/t")
    assert await download(creator, dataset, offset=100) == dataset[100:]
    assert await download(creator, dataset, offset=len(dataset)) == b""
    with refused(grpc.StatusCode.OUT_OF_RANGE):
        await download(creator, dataset, offset=len(dataset) + 1)
    with refused(INVALID, field="offset"):
        await download(creator, dataset, offset=-1)


async def test_bytes_that_are_gone_are_data_loss(arena: RegistryServer, creator: Client, dataset: bytes) -> None:
    await arena.upload(creator, dataset, task="tasks/t")
    sha256 = hashlib.sha256(dataset).hexdigest()
    (arena.folder / "state" / "artifacts" / sha256[:2] / sha256).unlink()
    with refused(grpc.StatusCode.DATA_LOSS, "ARTIFACT_LOST"):
        await download(creator, dataset)


async def test_a_disk_that_fails_is_said_and_not_the_callers_fault(
    arena: RegistryServer, creator: Client, dataset: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    for broken in ("open_uploads", "partial_size", "open_partial"):
        with monkeypatch.context() as patched, refused(grpc.StatusCode.UNAVAILABLE, "STORAGE_FAILED"):
            patched.setattr(arena.registry.files, broken, fail)
            await arena.upload(creator, dataset, task="tasks/t")
    await arena.upload(creator, dataset, task="tasks/t")
    monkeypatch.setattr(arena.registry.files, "open", fail)
    with refused(grpc.StatusCode.UNAVAILABLE, "STORAGE_FAILED"):
        await download(creator, dataset)


async def test_uploads_leave_the_database_room_to_grow(arena: RegistryServer, tmp_path: Path, dataset: bytes) -> None:
    creator = await arena.participant("creator")
    await arena.create_task(creator, dataset)
    arena.settings["keep_free_bytes"] = shutil.disk_usage(tmp_path).total
    await arena.restart()
    creator = await arena.client(creator.key)
    with refused(grpc.StatusCode.UNAVAILABLE, "STORAGE_FAILED"):
        await send(creator, header(dataset), dataset)
    assert await progress(creator, dataset) == (0, False)
    await arena.participant("somebody else")
    arena.settings.clear()
    await arena.restart()
    await send(await arena.client(creator.key), header(dataset), dataset)


async def test_no_artifact_without_a_token(arena: RegistryServer, creator: Client, dataset: bytes) -> None:
    await arena.upload(creator, dataset, task="tasks/t")
    wrong = Client(Key.generate(), origin="else.where", registry=arena.server.address)
    with refused(grpc.StatusCode.UNAUTHENTICATED):
        await wrong.artifacts.GetArtifact(GetArtifactRequest(name=artifact_name(dataset)))
    await wrong.close()
