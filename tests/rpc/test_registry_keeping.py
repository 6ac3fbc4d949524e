"""What one participant may hand in, and what becomes of artifacts that nothing refers to, over a real server."""

import asyncio
import errno
import hashlib
import threading
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.numpy import save

from services.registry.artifacts.files import StoredFile
from services.registry.states import RejectionReason, SubmissionState
from tests.rpc.test_registry_artifacts import code_of, download, put_submission
from tests.support.registry_server import (
    RegistryServer,
    artifact_name,
    config_of,
    dataset_bytes,
    digest_of,
    refused,
    uploading,
)
from tests.support.s3_server import S3Server
from tiltyard.calls.errors import ClientError
from tiltyard.client import Client
from tiltyard.modelspec import Mlp, ModelSpec, tensor_shapes
from tiltyard.registry.v1.artifact_pb2 import (
    DownloadArtifactRequest,
    GetArtifactRequest,
    GetUploadRequest,
    UploadArtifactRequest,
    UploadHeader,
)
from tiltyard.registry.v1.task_pb2 import CancelTaskRequest, CloseTaskRequest
from tiltyard.type.v1.task_pb2 import TASK_STATE_FINAL, TASK_STATE_OPEN

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
NOT_FOUND = grpc.StatusCode.NOT_FOUND
DAY_S = 86400
HOLDOUT = b"a holdout that is handed in and never published"


def weights(number: int = 0) -> bytes:
    """A model of the tests' tasks, of numbers of its own."""
    spec = ModelSpec(input_shape=(4,), outputs=3, architecture=Mlp((8, 8, 8)))
    return save({name: np.full(shape, number, np.float32) for name, shape in tensor_shapes(spec).items()})


def header_of(content: bytes) -> UploadHeader:
    return UploadHeader(artifact=artifact_name(content), size_bytes=len(content), base_model=True)


async def hand_in(client: Client, content: bytes) -> str:
    return (await client.artifacts.UploadArtifact(uploading(header_of(content), content))).artifact.name


async def begin(client: Client, content: bytes) -> None:
    """The first ten bytes of an upload that breaks off."""

    async def messages() -> AsyncIterator[UploadArtifactRequest]:
        yield UploadArtifactRequest(header=header_of(content))
        yield UploadArtifactRequest(chunk=content[:10])

    with refused(grpc.StatusCode.INVALID_ARGUMENT, "SIZE_MISMATCH"):
        await client.artifacts.UploadArtifact(messages())


async def exists(client: Client, content: bytes) -> bool:
    """Whether the artifact is there; then its bytes must be, too."""
    code = await code_of(client.artifacts.GetArtifact(GetArtifactRequest(name=artifact_name(content))))
    if code is NOT_FOUND:
        return False
    assert code is grpc.StatusCode.OK
    request = DownloadArtifactRequest(name=artifact_name(content))
    assert b"".join([part.chunk async for part in client.artifacts.DownloadArtifact(request)]) == content
    return True


async def sweep(arena: RegistryServer, content: bytes) -> int:
    """Look at the part of the artifacts that this one is of, and at the uploads."""
    prefix = hashlib.sha256(content).hexdigest()[:2]
    return await arena.registry.garbage.remove_part(prefix) + await arena.registry.garbage.remove_uploads()


def file_of(arena: RegistryServer, content: bytes) -> Path:
    sha256 = hashlib.sha256(content).hexdigest()
    return arena.folder / "state" / "artifacts" / sha256[:2] / sha256


# Quotas


async def quota_of(call: object) -> tuple[str, int, int]:
    """The quota that refuses a call, what would be used with it, and its limit."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call  # type: ignore[misc]
    error = ClientError.of(raised.value)
    assert (error.code, error.reason) == (EXHAUSTED, "UPLOAD_QUOTA")
    return error.metadata["quota"], int(error.metadata["used"]), int(error.metadata["limit"])


async def test_uploads_that_break_off_count_until_they_end(arena: RegistryServer) -> None:
    arena.settings = {"max_open_uploads": 2}
    await arena.restart()
    client, other = await arena.participant("one"), await arena.participant("other")
    await begin(client, weights(1))
    await begin(client, weights(2))
    assert await quota_of(hand_in(client, weights(3))) == ("max_open_uploads", 3, 2)
    assert await hand_in(other, weights(3))
    # Those there are go on, and make room when they have ended.
    rest = UploadHeader(artifact=artifact_name(weights(2)), size_bytes=len(weights(2)), base_model=True, offset=10)
    await client.artifacts.UploadArtifact(uploading(rest, weights(2)))
    assert await hand_in(client, weights(3))


async def test_bytes_that_nothing_rests_on_are_bounded(arena: RegistryServer, tmp_path: Path) -> None:
    size = len(weights())
    arena.settings = {"max_pending_bytes": 2 * size}
    await arena.restart()
    client, dataset = await arena.participant(), dataset_bytes(tmp_path)
    names = [await hand_in(client, weights(number)) for number in range(2)]
    assert await quota_of(hand_in(client, weights(2))) == ("max_pending_bytes", 3 * size, 2 * size)
    # The same once more is no more.
    assert await hand_in(client, weights(1)) == names[1]
    config = config_of(dataset)
    config.base_model = names[0]
    await arena.create_task(client, dataset, config=config)
    assert await hand_in(client, weights(2))


async def test_files_that_nothing_rests_on_are_bounded_however_small(arena: RegistryServer) -> None:
    arena.settings = {"max_pending_artifacts": 2}
    await arena.restart()
    client, other = await arena.participant(), await arena.participant()
    for content in (b"1", b"2"):
        await hand_in(client, content)
    assert await quota_of(hand_in(client, b"3")) == ("max_pending_artifacts", 3, 2)
    await hand_in(other, b"3")


async def test_models_that_were_not_revealed_count_though_another_one_was(
    arena: RegistryServer, tmp_path: Path
) -> None:
    arena.settings = {"max_pending_artifacts": 2}
    await arena.restart()
    creator, node = await arena.participant("creator"), await arena.participant("node")
    await arena.open_task(creator, dataset_bytes(tmp_path))
    await put_submission(arena, node)
    for number in range(2):
        await arena.upload(node, weights(number), submission="tasks/t/submissions/1")
    digest = hashlib.sha256(weights(0)).digest()
    await put_submission(arena, node, state=SubmissionState.SCORED, model_digest=digest)
    await put_submission(arena, node, number=2)
    await arena.upload(node, weights(2), submission="tasks/t/submissions/2")
    refusal = quota_of(arena.upload(node, weights(3), submission="tasks/t/submissions/2"))
    assert await refusal == ("max_pending_artifacts", 3, 2)


async def test_all_bytes_of_a_participant_are_bounded(arena: RegistryServer, tmp_path: Path) -> None:
    dataset = dataset_bytes(tmp_path)
    limit = len(dataset) + len(weights()) - 1
    arena.settings = {"max_participant_bytes": limit}
    await arena.restart()
    client = await arena.participant()
    await arena.open_task(client, dataset)
    assert await quota_of(hand_in(client, weights())) == ("max_participant_bytes", limit + 1, limit)


async def test_uploads_at_the_same_time_do_not_pass_a_quota_together(arena: RegistryServer) -> None:
    size = len(weights())
    arena.settings = {"max_pending_bytes": 3 * size}
    await arena.restart()
    client = await arena.participant()
    answers = await asyncio.gather(*(hand_in(client, weights(n)) for n in range(8)), return_exceptions=True)
    taken = [answer for answer in answers if isinstance(answer, str)]
    assert 1 <= len(taken) <= 3
    for answer in answers:
        if isinstance(answer, BaseException):
            assert isinstance(answer, grpc.aio.AioRpcError)
            assert ClientError.of(answer).reason == "UPLOAD_QUOTA"
    for number in range(8):
        if len(taken) < 3 and artifact_name(weights(number)) not in taken:
            taken.append(await hand_in(client, weights(number)))
    assert (await quota_of(hand_in(client, weights(9))))[0] == "max_pending_bytes"


# Garbage


async def test_a_base_model_that_no_task_names_is_removed_after_a_day(arena: RegistryServer, tmp_path: Path) -> None:
    client, dataset = await arena.participant(), dataset_bytes(tmp_path)
    named, unnamed = weights(1), weights(2)
    config = config_of(dataset)
    config.base_model = await hand_in(client, named)
    await hand_in(client, unnamed)
    await arena.create_task(client, dataset, config=config)
    arena.clock.advance(seconds=DAY_S - 1)
    assert [await sweep(arena, each) for each in (named, unnamed)] == [0, 0]
    # Asked for again, it is kept for a day from then on.
    await hand_in(client, unnamed)
    arena.clock.advance(seconds=DAY_S - 1)
    assert await sweep(arena, unnamed) == 0
    arena.clock.advance(seconds=1)
    assert [await sweep(arena, each) for each in (named, unnamed)] == [0, 1]
    assert [await exists(client, each) for each in (named, unnamed)] == [True, False]
    assert not file_of(arena, unnamed).exists()
    # And it may come again.
    await hand_in(client, unnamed)
    assert await exists(client, unnamed)


async def test_what_a_task_needs_is_kept_for_ever(arena: RegistryServer, tmp_path: Path) -> None:
    creator, dataset = await arena.participant(), dataset_bytes(tmp_path)
    config = config_of(dataset)
    config.base_model = await hand_in(creator, weights())
    await arena.open_task(creator, dataset, config=config)
    await creator.tasks.CloseTask(CloseTaskRequest(name="tasks/t"))
    await arena.watch_until(creator, TASK_STATE_FINAL)
    arena.clock.advance(seconds=1000 * DAY_S)
    for content in (dataset, weights()):
        assert await sweep(arena, content) == 0
        assert await exists(creator, content)


async def test_artifacts_of_a_cancelled_task_are_removed_after_a_week(arena: RegistryServer, tmp_path: Path) -> None:
    creator, dataset, other = await arena.participant(), dataset_bytes(tmp_path), dataset_bytes(tmp_path, seed=1)
    config = config_of(dataset)
    config.base_model = await hand_in(creator, weights())
    await arena.open_task(creator, dataset, config=config)
    # The second task rests on the same base model, and stays.
    config = config_of(other)
    config.base_model = artifact_name(weights())
    await arena.open_task(creator, other, task="second", config=config)
    await creator.tasks.CancelTask(CancelTaskRequest(name="tasks/t", reason="a mistake"))
    # The last change is that the pool is closed.
    await arena.advance(seconds=0)
    arena.clock.advance(seconds=7 * DAY_S - 1)
    assert await sweep(arena, dataset) == 0
    arena.clock.advance(seconds=1)
    assert await sweep(arena, dataset) == 1
    assert await sweep(arena, weights()) == 0
    assert not await exists(creator, dataset)
    assert await exists(creator, weights())


async def test_a_holdout_that_was_not_published_is_removed_after_a_week(arena: RegistryServer, tmp_path: Path) -> None:
    creator, dataset = await arena.participant(), dataset_bytes(tmp_path)
    config = config_of(dataset)
    config.holdout.CopyFrom(digest_of(HOLDOUT))
    await arena.open_task(creator, dataset, config=config)
    await arena.upload(creator, HOLDOUT, task="tasks/t")
    await creator.tasks.CloseTask(CloseTaskRequest(name="tasks/t"))
    arena.clock.advance(seconds=DAY_S - 1)
    assert await sweep(arena, HOLDOUT) == 0
    await arena.advance(seconds=1)
    await arena.watch_until(creator, TASK_STATE_FINAL)
    arena.clock.advance(seconds=7 * DAY_S)
    assert await sweep(arena, HOLDOUT) == 1
    assert await sweep(arena, dataset) == 0


@pytest.mark.parametrize(
    ("state", "revealed", "removed"),
    [
        (SubmissionState.COMMITTED, b"", False),
        (SubmissionState.EVALUATING, weights(1), False),
        (SubmissionState.SCORED, weights(1), False),
        (SubmissionState.SCORED, weights(2), True),
        (SubmissionState.REJECTED, weights(1), True),
    ],
)
async def test_models_are_kept_as_long_as_their_submission_stands(
    arena: RegistryServer, tmp_path: Path, state: SubmissionState, revealed: bytes, removed: bool
) -> None:
    creator, node, dataset = (
        await arena.participant("creator"),
        await arena.participant("node"),
        dataset_bytes(tmp_path),
    )
    config = config_of(dataset)
    config.schedule.close_time.FromDatetime(arena.clock() + timedelta(days=30))
    await arena.open_task(creator, dataset, config=config)
    await put_submission(arena, node)
    await arena.upload(node, weights(1), submission="tasks/t/submissions/1")
    await put_submission(
        arena,
        node,
        state=state,
        model_digest=hashlib.sha256(revealed).digest() if revealed else b"",
        structure_checked=True,
        reveal_time=arena.clock(),
        deadline=None,
        end_time=arena.clock() if state is SubmissionState.REJECTED else None,
        reason=RejectionReason.CRASHED if state is SubmissionState.REJECTED else None,
    )
    arena.clock.advance(seconds=7 * DAY_S - 1)
    assert await sweep(arena, weights(1)) == 0
    arena.clock.advance(seconds=1)
    assert await sweep(arena, weights(1)) == int(removed)
    assert await exists(node, weights(1)) is not removed


async def test_a_broken_upload_is_removed_after_a_day_without_a_byte(arena: RegistryServer) -> None:
    client = await arena.participant()
    await begin(client, weights())
    asked = GetUploadRequest(artifact=artifact_name(weights()))
    # Files carry the machine's time, which is later than this registry's.
    assert await sweep(arena, weights()) == 0
    arena.clock.advance(seconds=5000 * DAY_S)
    assert await sweep(arena, weights()) == 1
    assert (await client.artifacts.GetUpload(asked)).offset == 0
    await hand_in(client, weights())


async def test_a_file_without_a_record_is_removed_and_one_with_it_stays(arena: RegistryServer) -> None:
    client = await arena.participant()
    await hand_in(client, weights())
    stray = file_of(arena, weights()).with_name(hashlib.sha256(weights()).hexdigest()[:2] + "0" * 62)
    stray.write_bytes(b"placed by a process that died before it was on record")
    assert await sweep(arena, weights()) == 0
    arena.clock.advance(seconds=5000 * DAY_S)
    await hand_in(client, weights())
    assert await sweep(arena, weights()) == 1
    assert not stray.exists()
    assert await exists(client, weights())


async def test_a_task_that_names_a_model_while_it_is_removed_gets_it_or_is_refused(
    arena: RegistryServer, tmp_path: Path
) -> None:
    client, dataset = await arena.participant(), dataset_bytes(tmp_path)
    outcomes = set()
    for number in range(6):
        model = weights(number)
        config = config_of(dataset)
        config.base_model = await hand_in(client, model)
        arena.clock.advance(seconds=DAY_S)
        creating = arena.create_task(client, dataset, task=f"t{number}", config=config)
        # Sometimes the one is first, sometimes the other.
        async with asyncio.timeout(20):
            sweeping = asyncio.ensure_future(sweep(arena, model))
            for _ in range(number * 20):
                await asyncio.sleep(0)
            created, removed = await asyncio.gather(creating, sweeping, return_exceptions=True)
        if isinstance(created, grpc.aio.AioRpcError):
            assert ClientError.of(created).reason == "ARTIFACT_NOT_FOUND"
            assert (removed, await exists(client, model)) == (1, False)
        else:
            assert (removed, await exists(client, model)) == (0, True)
        outcomes.add(removed)
    assert outcomes <= {0, 1}


@pytest.mark.parametrize("again", [False, True], ids=["gone", "handed in again"])
async def test_bytes_that_are_removed_once_they_were_found_are_looked_for_again(
    arena: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    client, dataset = await arena.participant(), dataset_bytes(tmp_path)
    config = config_of(dataset)
    config.base_model = await hand_in(client, weights())
    found, go_on = threading.Event(), threading.Event()
    files = arena.registry.files
    open_file = files.open

    def open_once_removed(sha256: str) -> StoredFile:
        if not go_on.is_set():
            found.set()
            assert go_on.wait(20)
            raise FileNotFoundError(errno.ENOENT, "removed")
        return open_file(sha256)

    monkeypatch.setattr(files, "open", open_once_removed)
    for working, refusal in (
        (lambda: download(client, weights()), NOT_FOUND),
        (lambda: arena.create_task(client, dataset, config=config), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        found.clear()
        go_on.clear()
        await hand_in(client, weights())
        arena.clock.advance(seconds=DAY_S)
        work = asyncio.ensure_future(working())
        assert await asyncio.to_thread(found.wait, 20)
        assert await sweep(arena, weights()) == 1
        if again:
            await hand_in(client, weights())
        go_on.set()
        if again:
            await work
        else:
            with refused(refusal, "ARTIFACT_NOT_FOUND"):
                await work


async def test_a_task_created_between_the_look_and_the_removal_keeps_its_model(
    arena: RegistryServer, tmp_path: Path
) -> None:
    client, dataset = await arena.participant(), dataset_bytes(tmp_path)
    config = config_of(dataset)
    config.base_model = await hand_in(client, weights())
    arena.clock.advance(seconds=DAY_S)
    sha256 = hashlib.sha256(weights()).hexdigest()
    # The look has found it removable; the removal waits for somebody who places the same bytes.
    async with arena.registry.uploads.placing(sha256):
        sweeping = asyncio.ensure_future(sweep(arena, weights()))
        await arena.create_task(client, dataset, config=config)
    assert await sweeping == 0
    assert await exists(client, weights())


@pytest.mark.parametrize("stopping", [False, True], ids=["goes on", "is stopped"])
async def test_the_same_bytes_placed_while_they_are_removed_are_there_afterwards(
    arena: RegistryServer, monkeypatch: pytest.MonkeyPatch, stopping: bool
) -> None:
    client = await arena.participant()
    await hand_in(client, weights())
    arena.clock.advance(seconds=DAY_S)
    removing, go_on = threading.Event(), threading.Event()
    files = arena.registry.files
    remove = files.remove

    def slowly(sha256: str) -> None:
        # The record is gone, the file not yet.
        removing.set()
        assert go_on.wait(20)
        remove(sha256)

    monkeypatch.setattr(files, "remove", slowly)
    sweeping = asyncio.ensure_future(sweep(arena, weights()))
    assert await asyncio.to_thread(removing.wait, 20)
    if stopping:
        # As the registry's end does; the removal's thread goes on.
        sweeping.cancel()
    uploading_again = asyncio.ensure_future(hand_in(client, weights()))
    asked = GetUploadRequest(artifact=artifact_name(weights()))
    async with asyncio.timeout(20):
        while (await client.artifacts.GetUpload(asked)).offset < len(weights()):
            pass
    go_on.set()
    assert await asyncio.gather(sweeping, return_exceptions=True) != [0]
    await uploading_again
    assert await exists(client, weights())


# A bucket


async def test_a_registry_keeps_its_artifacts_in_a_bucket(
    arena: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server() as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        arena.settings = {"artifacts": s3.bucket()}
        await arena.restart()
        creator, dataset = await arena.participant(), dataset_bytes(tmp_path)
        config = config_of(dataset)
        config.base_model = await hand_in(creator, weights())
        await begin(creator, weights(1))
        task = await arena.open_task(creator, dataset, config=config)
        assert task.state == TASK_STATE_OPEN
        await arena.restart()
        creator = await arena.client(creator.key)
        for content in (dataset, weights()):
            assert not file_of(arena, content).exists()
            assert await exists(creator, content)
        request = DownloadArtifactRequest(name=artifact_name(dataset), offset=100)
        rest = b"".join([part.chunk async for part in creator.artifacts.DownloadArtifact(request)])
        assert rest == dataset[100:]
        asked = GetUploadRequest(artifact=artifact_name(weights(1)))
        assert (await creator.artifacts.GetUpload(asked)).offset == 10
        await creator.tasks.CancelTask(CancelTaskRequest(name="tasks/t"))
        await arena.advance(seconds=0)
        arena.clock.advance(seconds=8 * DAY_S)
        assert [await sweep(arena, content) for content in (dataset, weights())] == [1, 1]
        assert not await exists(creator, dataset)
        await arena.stop()
        await arena.start()
