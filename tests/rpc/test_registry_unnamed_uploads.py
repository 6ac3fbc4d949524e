"""Uploads whose name comes among their bytes, over a real server: kept from the name on, and not before it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import pytest

from services.registry.artifacts.files import stand_in
from tests.rpc.test_registry_artifacts import code_of, download, progress, put_submission, send, sent
from tests.support.registry_server import RegistryServer, artifact_name, config_of, dataset_bytes, refused
from tiltyard.client import Client
from tiltyard.identity import Key
from tiltyard.registry.v1.artifact_pb2 import GetArtifactRequest, UploadArtifactRequest, UploadHeader

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
OUT_OF_RANGE = grpc.StatusCode.OUT_OF_RANGE
MODEL = b"the model's bytes " * 100


@pytest.fixture
async def node(arena: RegistryServer) -> Client:
    return await arena.participant("node")


def unnamed(content: bytes = MODEL, *, task: str = "", submission: str = "", offset: int = 0) -> UploadArtifactRequest:
    """A header without a name, of a base model unless told."""
    header = UploadHeader(size_bytes=len(content), offset=offset)
    if task:
        header.task = task
    elif submission:
        header.submission = submission
    else:
        header.base_model = True
    return UploadArtifactRequest(header=header)


def named(content: bytes = MODEL, **fields: object) -> UploadHeader:
    return UploadHeader(artifact=artifact_name(content), size_bytes=len(content), base_model=True, **fields)  # type: ignore[arg-type]


def chunk(content: bytes) -> UploadArtifactRequest:
    return UploadArtifactRequest(chunk=content)


def name(content: bytes = MODEL) -> UploadArtifactRequest:
    return UploadArtifactRequest(artifact=artifact_name(content))


def kept(arena: RegistryServer) -> list[int]:
    """The sizes of what is kept of uploads, named or not."""
    return sorted(each.size_bytes for each in arena.registry.files.open_uploads())


async def upload(client: Client, messages: Sequence[UploadArtifactRequest]) -> str:
    return (await client.artifacts.UploadArtifact(sent(messages))).artifact.name


class Stream:
    """An upload of which one message after the other is sent."""

    def __init__(self, client: Client, *messages: UploadArtifactRequest) -> None:
        self._messages = asyncio.Queue[UploadArtifactRequest | None]()
        self.send(*messages)
        self.call = client.artifacts.UploadArtifact(self._sent())

    def send(self, *messages: UploadArtifactRequest | None) -> None:
        """These next; None ends it."""
        for message in messages:
            self._messages.put_nowait(message)

    async def _sent(self) -> AsyncIterator[UploadArtifactRequest]:
        while (message := await self._messages.get()) is not None:
            yield message


async def until_kept(arena: RegistryServer, client: Client, sizes: list[int]) -> None:
    """What has arrived before the name is nothing to a client: the folder is looked at, after each call."""
    async with asyncio.timeout(20):
        while kept(arena) != sizes:
            assert await progress(client, MODEL) == (0, False)


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_the_name_comes_before_between_or_after_the_chunks(
    arena: RegistryServer, node: Client, place: int
) -> None:
    messages = [chunk(MODEL[:1000]), chunk(MODEL[1000:])]
    messages.insert(place, name())
    assert await upload(node, [unnamed(), *messages]) == artifact_name(MODEL)
    assert await progress(node, MODEL) == (len(MODEL), True)
    assert await download(node, MODEL) == MODEL
    assert kept(arena) == []


async def test_a_dataset_and_a_model_may_get_their_names_later(
    arena: RegistryServer, node: Client, tmp_path: Path
) -> None:
    creator, dataset = await arena.participant("creator"), dataset_bytes(tmp_path)
    await arena.create_task(creator, dataset)
    await upload(creator, [unnamed(dataset, task="tasks/t"), chunk(dataset), name(dataset)])
    assert await download(creator, dataset) == dataset
    await put_submission(arena, node)
    await upload(node, [unnamed(submission="tasks/t/submissions/1"), chunk(MODEL), name()])
    assert await download(node, MODEL) == MODEL


async def test_what_ends_without_a_name_leaves_nothing(arena: RegistryServer, node: Client) -> None:
    for chunks in ([], [chunk(MODEL[:1000])], [chunk(MODEL)]):
        with refused(INVALID, field="artifact"):
            await upload(node, [unnamed(), *chunks])
        assert kept(arena) == []
    with refused(INVALID, "SIZE_MISMATCH", field="chunk"):
        await upload(node, [unnamed(), chunk(MODEL), chunk(b"more"), name()])
    assert kept(arena) == []


async def test_what_breaks_off_before_its_name_leaves_nothing(arena: RegistryServer, node: Client) -> None:
    stream = Stream(node, unnamed(), chunk(MODEL[:1000]))
    await until_kept(arena, node, [1000])
    stream.call.cancel()
    await until_kept(arena, node, [])


async def test_what_breaks_off_after_its_name_goes_on(arena: RegistryServer, node: Client) -> None:
    stream = Stream(node, unnamed(), chunk(MODEL[:1000]), name())
    async with asyncio.timeout(20):
        while await progress(node, MODEL) != (1000, False):
            pass
        with refused(grpc.StatusCode.ABORTED, "UPLOAD_RUNNING"):
            await send(node, named(offset=1000), MODEL[1000:])
        stream.call.cancel()
        # No event tells a client that the server has heard of it.
        code = grpc.StatusCode.ABORTED
        while code is grpc.StatusCode.ABORTED:
            code = await code_of(send(node, named(offset=1000), MODEL[1000:]))
    assert code is grpc.StatusCode.OK
    assert await download(node, MODEL) == MODEL


async def test_fewer_bytes_than_announced_are_kept_under_the_name(arena: RegistryServer, node: Client) -> None:
    with refused(INVALID, "SIZE_MISMATCH", field="chunk"):
        await upload(node, [unnamed(), chunk(MODEL[:1000]), name(), chunk(MODEL[1000:1500])])
    await arena.restart()
    node = await arena.client(node.key)
    assert await progress(node, MODEL) == (1500, False)
    await send(node, named(offset=1500), MODEL[1500:])
    assert await download(node, MODEL) == MODEL


@pytest.mark.parametrize("is_last", [True, False])
async def test_bytes_of_another_digest_leave_nothing(arena: RegistryServer, node: Client, is_last: bool) -> None:
    messages = [chunk(bytes(len(MODEL)))]
    messages.insert(is_last, name())
    with refused(INVALID, "DIGEST_MISMATCH"):
        await upload(node, [unnamed(), *messages])
    assert kept(arena) == []
    assert await progress(node, MODEL) == (0, False)
    asked = GetArtifactRequest(name=artifact_name(MODEL))
    assert await code_of(node.artifacts.GetArtifact(asked)) is grpc.StatusCode.NOT_FOUND


async def test_what_is_there_already_is_said_when_its_name_comes(arena: RegistryServer, node: Client) -> None:
    await send(node, named(), MODEL)
    with refused(OUT_OF_RANGE, "WRONG_OFFSET"):
        await upload(node, [unnamed(), chunk(MODEL[:1000]), name(), chunk(MODEL[1000:])])
    assert kept(arena) == []
    # Somebody else has to show all the bytes.
    other = await arena.participant("other")
    await upload(other, [unnamed(), name(), chunk(MODEL)])
    assert await download(other, MODEL) == MODEL


async def test_the_longer_one_of_two_parts_goes_on(arena: RegistryServer, node: Client) -> None:
    with refused(INVALID, "SIZE_MISMATCH"):
        await send(node, named(), MODEL[:1000])
    with refused(OUT_OF_RANGE, "WRONG_OFFSET"):
        await upload(node, [unnamed(), chunk(MODEL[:999]), name(), chunk(MODEL[999:])])
    assert await progress(node, MODEL) == (1000, False)
    with refused(INVALID, "SIZE_MISMATCH"):
        await upload(node, [unnamed(), chunk(MODEL[:1200]), name()])
    assert (await progress(node, MODEL), kept(arena)) == ((1200, False), [1200])
    await upload(node, [unnamed(), chunk(MODEL), name()])
    assert await download(node, MODEL) == MODEL


async def test_two_streams_do_not_become_one(arena: RegistryServer, node: Client) -> None:
    first = Stream(node, unnamed(), chunk(MODEL[:1000]), name())
    async with asyncio.timeout(20):
        while await progress(node, MODEL) != (1000, False):
            pass
    with refused(grpc.StatusCode.ABORTED, "UPLOAD_RUNNING"):
        await upload(node, [unnamed(), chunk(MODEL[:1100]), name(), chunk(MODEL[1100:])])
    assert kept(arena) == [1000]
    first.send(chunk(MODEL[1000:]), None)
    await first.call
    assert await download(node, MODEL) == MODEL


async def test_malformed_names_name_the_field(node: Client) -> None:
    one = chunk(MODEL[:10])
    for messages, field in (
        ([unnamed(offset=1), name()], "header.offset"),
        ([unnamed(), one, name(), name()], "artifact"),
        ([UploadArtifactRequest(header=named()), name()], "artifact"),
        ([unnamed(), UploadArtifactRequest(artifact="artifacts/12")], "artifact"),
        ([unnamed(), UploadArtifactRequest(artifact="")], "artifact"),
    ):
        with refused(INVALID, field=field):
            await upload(node, messages)


async def test_rights_are_checked_as_soon_as_they_can_be(arena: RegistryServer, node: Client, tmp_path: Path) -> None:
    creator, dataset = await arena.participant("creator"), dataset_bytes(tmp_path)
    config = config_of(dataset)
    config.limits.max_model_bytes = len(MODEL) - 1
    await arena.create_task(creator, dataset, config=config)
    submission = "tasks/t/submissions/1"
    for headed, code, reason in (
        (unnamed(task="tasks/t"), grpc.StatusCode.PERMISSION_DENIED, "NOT_THE_CREATOR"),
        (unnamed(submission=submission), grpc.StatusCode.NOT_FOUND, "SUBMISSION_NOT_FOUND"),
    ):
        with refused(code, reason):
            await upload(node, [headed])
    stranger = await arena.client(Key.generate())
    with refused(PRECONDITION, "NOT_REGISTERED"):
        await upload(stranger, [unnamed()])
    await put_submission(arena, creator)
    with refused(grpc.StatusCode.PERMISSION_DENIED, "NOT_THE_SUBMITTER"):
        await upload(node, [unnamed(submission=submission)])
    await put_submission(arena, node)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE"):
        await upload(node, [unnamed(submission=submission)])
    # What depends on the digest.
    with refused(PRECONDITION, "UPLOAD_NOT_EXPECTED"):
        await upload(creator, [unnamed(task="tasks/t"), chunk(MODEL), name()])
    with refused(INVALID, "SIZE_MISMATCH", field="header.size_bytes"):
        await upload(creator, [unnamed(task="tasks/t"), chunk(MODEL), name(dataset)])
    assert kept(arena) == []


async def test_an_upload_counts_once_before_and_after_its_name(arena: RegistryServer, node: Client) -> None:
    arena.settings = {"max_open_uploads": 1, "max_pending_bytes": 2 * len(MODEL)}
    await arena.restart()
    node = await arena.client(node.key)
    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    # Left by a process that died, of which nobody can go on with it.
    (arena.folder / "state" / "uploads" / f"{node.key.id}-{stand_in()}").write_bytes(MODEL)
    stream = Stream(node, unnamed(), chunk(MODEL[:1000]))
    await until_kept(arena, node, [1000, len(MODEL)])
    with refused(exhausted, "UPLOAD_QUOTA"):
        await send(node, named(b"other"), b"other")
    stream.send(name())
    async with asyncio.timeout(20):
        while await progress(node, MODEL) != (1000, False):
            pass
    with refused(exhausted, "UPLOAD_QUOTA"):
        await send(node, named(b"other"), b"other")
    stream.send(chunk(MODEL[1000:]), None)
    await stream.call
    await send(node, named(b"other"), b"other")
    assert await download(node, b"other") == b"other"
