"""The data of a task over a real server: what opens it, what cancels it, and which holdout ranks it."""

import asyncio
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import MessageToJson
from safetensors.numpy import save

from tests.support.registry_server import (
    ORIGIN,
    RegistryServer,
    artifact_name,
    config_of,
    dataset_bytes,
    digest_of,
    refused,
)
from tiltyard.cli.tasks import creation
from tiltyard.client import Client
from tiltyard.registry.v1.artifact_pb2 import GetArtifactRequest
from tiltyard.registry.v1.task_pb2 import (
    CloseTaskRequest,
    GetTaskRequest,
    PublishHoldoutRequest,
    Task,
    WatchTaskRequest,
)
from tiltyard.type.v1 import task_pb2 as type_task_pb2
from tiltyard.type.v1.task_pb2 import (
    TASK_STATE_CANCELLED,
    TASK_STATE_FINAL,
    TASK_STATE_OPEN,
    TASK_STATE_PREPARING,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
DENIED = grpc.StatusCode.PERMISSION_DENIED
HOUR_S, DAY_S = 3600, 86400


async def get(client: Client, task: str = "t") -> Task:
    return (await client.tasks.GetTask(GetTaskRequest(name=f"tasks/{task}"))).task


async def test_a_good_dataset_opens_the_task(arena: RegistryServer, tmp_path: Path) -> None:
    creator, dataset = await arena.participant(), dataset_bytes(tmp_path)
    task = await arena.open_task(creator, dataset)
    assert task.evaluation_rows == 20
    assert task.HasField("open_time")
    assert arena.selection.pools["t"].open
    assert (await arena.kinds())[-1] == "task_changed"
    found = await creator.artifacts.GetArtifact(GetArtifactRequest(name=artifact_name(dataset)))
    assert found.artifact.size_bytes == len(dataset)


async def test_a_creation_that_was_interrupted_goes_on_by_the_same_command(
    arena: RegistryServer, tmp_path: Path
) -> None:
    creator, config = await arena.participant(), config_of(dataset_bytes(tmp_path))
    creator.key.save(tmp_path / "me.pem")
    (tmp_path / "task.json").write_text(MessageToJson(config))

    async def create() -> tuple[bytes, bytes]:
        command = ("task", "create", tmp_path / "task.json", "--dataset", tmp_path / "dataset-0.safetensors")
        reach = ("--key", tmp_path / "me.pem", "--origin", ORIGIN, "--registry", arena.server.address)
        running = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tiltyard.cli", *command, "--task-id", "t", *reach),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        return await running.communicate()

    await creator.tasks.CreateTask(creation("t", config))
    assert (await get(creator)).state == TASK_STATE_PREPARING
    for _ in range(2):
        assert (await create())[0] == b"tasks/t open: 0 training nodes, 0 validators, 0 submissions\n"
    config.display_name = "Something else"
    (tmp_path / "task.json").write_text(MessageToJson(config))
    assert b"ALREADY_EXISTS (TASK_EXISTS)" in (await create())[1]


def tensors(x: np.ndarray, y: np.ndarray) -> bytes:
    return save({"x": x, "y": y})


GOOD_X, GOOD_Y = np.zeros((3, 4), np.float32), np.array([0, 1, 2], np.int64)
BAD_DATASETS = {
    "labels outside the classes": (tensors(GOOD_X, np.array([0, 1, 3], np.int64)), "outside 0 to 2"),
    "negative labels": (tensors(GOOD_X, np.array([0, -1, 2], np.int64)), "outside 0 to 2"),
    "different lengths": (tensors(GOOD_X, np.array([0, 1], np.int64)), "has 2 rows, but x has 3"),
    "empty": (tensors(np.zeros((0, 4), np.float32), np.zeros(0, np.int64)), "empty"),
    "NaN": (tensors(np.full((3, 4), np.nan, np.float32), GOOD_Y), "NaN"),
    "another shape": (tensors(np.zeros((3, 5), np.float32), GOOD_Y), "shape"),
    "no dataset": (b"no safetensors at all", ""),
}


@pytest.mark.parametrize("name", BAD_DATASETS)
async def test_a_bad_dataset_cancels_the_task_and_says_why(arena: RegistryServer, name: str) -> None:
    content, finding = BAD_DATASETS[name]
    creator = await arena.participant()
    config = config_of(content)
    await arena.create_task(creator, content, config=config)
    await arena.upload(creator, content, task="tasks/t")
    task = await arena.watch_until(creator, TASK_STATE_CANCELLED)
    assert task.state_reason.startswith("the evaluation dataset is not good: ")
    assert finding in task.state_reason
    assert "t" not in arena.selection.pools


async def test_a_regression_whose_targets_no_validator_could_count_by_is_cancelled(arena: RegistryServer) -> None:
    content = tensors(GOOD_X, np.zeros((3, 2), np.float32))
    creator, config = await arena.participant(), config_of(content)
    config.metric, config.loss, config.bound = type_task_pb2.METRIC_WITHIN_BOUND, type_task_pb2.LOSS_MSE, 0.5
    await arena.create_task(creator, content, config=config)
    await arena.upload(creator, content, task="tasks/t")
    task = await arena.watch_until(creator, TASK_STATE_CANCELLED)
    assert "has 2 targets a row, but the model has 3 outputs" in task.state_reason


async def test_an_unreachable_selector_delays_the_opening_only(arena: RegistryServer, tmp_path: Path) -> None:
    creator, dataset = await arena.participant(), dataset_bytes(tmp_path)
    await arena.create_task(creator, dataset)
    arena.selection.unavailable = True
    await arena.upload(creator, dataset, task="tasks/t")
    async with asyncio.timeout(20):
        async for message in creator.tasks.WatchTask(WatchTaskRequest(name="tasks/t")):
            if message.task.evaluation_rows:
                break
    await arena.advance(seconds=2 * HOUR_S)
    await arena.restart()
    creator = await arena.client(creator.key)
    await arena.advance(seconds=2 * HOUR_S)
    assert (await get(creator)).state == TASK_STATE_PREPARING
    arena.selection.unavailable = False
    task = await arena.watch_until(creator, TASK_STATE_OPEN)
    # The pool's first window counts from the scan, also when the selector was asked later.
    assert task.open_time.seconds - task.create_time.seconds < HOUR_S


async def test_a_dataset_that_does_not_come_in_time_cancels(arena: RegistryServer, tmp_path: Path) -> None:
    creator, dataset = await arena.participant(), dataset_bytes(tmp_path)
    await arena.create_task(creator, dataset)
    await arena.advance(seconds=HOUR_S - 1)
    assert (await get(creator)).state == TASK_STATE_PREPARING
    await arena.advance(seconds=1)
    task = await get(creator)
    assert task.state == TASK_STATE_CANCELLED
    assert "in time" in task.state_reason
    with refused(PRECONDITION, "UPLOAD_NOT_EXPECTED"):
        await arena.upload(creator, dataset, task="tasks/t")


async def test_an_accepted_holdout_anchors_the_second_round(arena: RegistryServer, tmp_path: Path) -> None:
    creator, dataset, holdout = await arena.participant(), dataset_bytes(tmp_path), dataset_bytes(tmp_path, seed=1)
    config = config_of(dataset)
    config.holdout.CopyFrom(digest_of(holdout))
    await arena.open_task(creator, dataset, config=config)
    publish = PublishHoldoutRequest(name="tasks/t", request_id="r")
    with refused(PRECONDITION, "TASK_NOT_CLOSED"):
        await creator.tasks.PublishHoldout(publish)
    await creator.tasks.CloseTask(CloseTaskRequest(name="tasks/t"))
    with refused(PRECONDITION, "HOLDOUT_NOT_UPLOADED"):
        await creator.tasks.PublishHoldout(publish)
    await arena.upload(creator, holdout, task="tasks/t")
    with refused(DENIED, "NOT_THE_CREATOR"):
        await (await arena.participant()).tasks.PublishHoldout(publish)
    answer = await creator.tasks.PublishHoldout(publish)
    assert await creator.tasks.PublishHoldout(publish) == answer
    final = await arena.watch_until(creator, TASK_STATE_FINAL)
    assert final.ranking_round == 2
    changed = [entry.holdout_changed for entry in await arena.entries() if entry.HasField("holdout_changed")]
    assert [change.accepted for change in changed] == [True]


async def test_a_holdout_that_fails_its_scan_leaves_the_first_round_to_rank(
    arena: RegistryServer, tmp_path: Path
) -> None:
    creator, dataset = await arena.participant(), dataset_bytes(tmp_path)
    bad = BAD_DATASETS["NaN"][0]
    config = config_of(dataset)
    config.holdout.CopyFrom(digest_of(bad))
    await arena.open_task(creator, dataset, config=config)
    await creator.tasks.CloseTask(CloseTaskRequest(name="tasks/t"))
    await arena.upload(creator, bad, task="tasks/t")
    await creator.tasks.PublishHoldout(PublishHoldoutRequest(name="tasks/t"))
    final = await arena.watch_until(creator, TASK_STATE_FINAL)
    assert final.ranking_round == 1
    changed = [entry.holdout_changed for entry in await arena.entries() if entry.HasField("holdout_changed")]
    assert [change.accepted for change in changed] == [False]
    assert "NaN" in changed[0].reason


async def test_a_holdout_that_does_not_come_in_time_has_failed(arena: RegistryServer, tmp_path: Path) -> None:
    creator, dataset, holdout = await arena.participant(), dataset_bytes(tmp_path), dataset_bytes(tmp_path, seed=1)
    config = config_of(dataset)
    config.holdout.CopyFrom(digest_of(holdout))
    await arena.open_task(creator, dataset, config=config)
    closed = (await creator.tasks.CloseTask(CloseTaskRequest(name="tasks/t"))).task
    assert closed.deadline.seconds - closed.update_time.seconds == DAY_S
    await arena.advance(seconds=DAY_S)
    final = await arena.watch_until(creator, TASK_STATE_FINAL)
    assert final.ranking_round == 1
    with refused(PRECONDITION, "TASK_NOT_CLOSED"):
        await creator.tasks.PublishHoldout(PublishHoldoutRequest(name="tasks/t"))


async def test_a_task_without_holdout_has_none_to_publish(arena: RegistryServer, tmp_path: Path) -> None:
    creator = await arena.participant()
    await arena.open_task(creator, dataset_bytes(tmp_path))
    with refused(PRECONDITION, "NO_HOLDOUT"):
        await creator.tasks.PublishHoldout(PublishHoldoutRequest(name="tasks/t"))
