"""A training node in a task: what it takes from the registry, and how its model gets there."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from services.runtime.errors import FailedPrecondition, ResourceExhausted
from tests.rpc.trainer_registry import MODELS, FakeRegistry, refused, registry_of, request, served, until_ended
from tiltyard.commitments import submission_commitment
from tiltyard.identity import Key
from tiltyard.trainer.v1 import trainer_pb2 as pb
from tiltyard.type.v1 import task_pb2 as task_types_pb2


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return Key.load_or_create(tmp_path / "key.pem")


@pytest.fixture
async def registry(key: Key) -> AsyncIterator[FakeRegistry]:
    async with registry_of(key.id) as fake:
        yield fake


async def test_a_trained_model_is_committed_uploaded_and_revealed(
    tmp_path: Path, key: Key, registry: FakeRegistry
) -> None:
    async with served(tmp_path, registry.address) as node:
        started = (await node.trainings.StartTraining(request())).training
        assert started.model.WhichOneof("architecture") == "mlp"
        seen = await until_ended(node, started.name)
    done = seen[-1]
    assert done.state == pb.TRAINING_STATE_SUCCEEDED
    assert pb.TRAINING_STATE_SUBMITTING in [training.state for training in seen]
    assert done.submission == "tasks/xor/submissions/1"
    assert hashlib.sha256(registry.content).digest() == done.model_digest
    [statement], [opened] = registry.commits.values(), registry.revealed
    assert opened.model_index == 1
    assert statement.commitment == submission_commitment(
        origin="tiltyard.local",
        task="tasks/xor",
        participant=f"participants/{key.id}",
        model_digest=done.model_digest,
        salt=opened.salt,
    )


async def test_a_submission_goes_on_after_a_restart_and_is_made_once(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.hold_uploads = True
    async with served(tmp_path, registry.address) as node:
        name = (await node.trainings.StartTraining(request())).training.name
        await registry.upload_asked.wait()
        training = (await node.trainings.GetTraining(pb.GetTrainingRequest(name=name))).training
        assert training.state == pb.TRAINING_STATE_SUBMITTING
    assert len(registry.commits) == 1
    registry.hold_uploads = False
    async with served(tmp_path, registry.address) as node:
        done = (await until_ended(node, name))[-1]
    assert done.state == pb.TRAINING_STATE_SUCCEEDED
    assert done.model_digest == training.model_digest
    assert len(registry.commits) == 1
    assert len(registry.revealed) == 1


async def test_a_submission_that_waits_for_the_registry_is_cancelled(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.hold_uploads = True
    async with served(tmp_path, registry.address) as node:
        name = (await node.trainings.StartTraining(request())).training.name
        await registry.upload_asked.wait()
        await node.trainings.CancelTraining(pb.CancelTrainingRequest(name=name))
        assert (await until_ended(node, name))[-1].state == pb.TRAINING_STATE_CANCELLED
    assert not registry.revealed


async def test_a_limit_of_submissions_a_day_is_waited_for(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.refuse_commits = ResourceExhausted("DAILY_LIMIT", "20 submissions today", retry_after_s=1.5)
    async with served(tmp_path, registry.address) as node:
        name = (await node.trainings.StartTraining(request())).training.name
        async for message in node.trainings.WatchTraining(pb.WatchTrainingRequest(name=name)):
            if message.training.warnings and registry.refuse_commits is not None:
                assert message.training.state == pb.TRAINING_STATE_SUBMITTING
                registry.refuse_commits = None
        done = message.training
    assert done.state == pb.TRAINING_STATE_SUCCEEDED
    assert done.submission == "tasks/xor/submissions/1"
    assert "waits" in done.warnings[0]
    assert "20 submissions today" in done.warnings[0]


async def test_what_the_registry_refuses_fails_the_training_with_its_reason(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.refuse_commits = FailedPrecondition("TASK_NOT_OPEN", "the task has closed")
    async with served(tmp_path, registry.address) as node:
        name = (await node.trainings.StartTraining(request())).training.name
        done = (await until_ended(node, name))[-1]
    assert done.state == pb.TRAINING_STATE_FAILED
    assert "the task has closed (TASK_NOT_OPEN)" in done.error
    # The work is not lost: the model can be submitted by hand.
    assert (tmp_path / "trainings" / name.removeprefix("trainings/") / "model.safetensors").exists()


async def test_a_training_for_a_task_is_checked_before_it_starts(tmp_path: Path, registry: FakeRegistry) -> None:
    async with served(tmp_path, registry.address) as node:
        start = node.trainings.StartTraining
        error = await refused(start(request(task="tasks/none")))
        assert error.code is grpc.StatusCode.NOT_FOUND
        error = await refused(start(request(model_index=2)))
        assert (error.code, error.violations[0].field) == (grpc.StatusCode.INVALID_ARGUMENT, "model_index")
        error = await refused(start(request(model=MODELS[0])))
        assert error.violations[0].field == "model"
        registry.member = "0" * 40
        error = await refused(start(request()))
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_A_TRAINING_NODE")
        registry.state = task_types_pb2.TASK_STATE_CLOSED
        error = await refused(start(request()))
        assert error.reason == "TASK_NOT_OPEN"
        assert not (await node.trainings.ListTrainings(pb.ListTrainingsRequest())).trainings


async def test_a_node_without_a_registry_says_so(tmp_path: Path) -> None:
    async with served(tmp_path, "") as node:
        error = await refused(node.trainings.StartTraining(request()))
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_REGISTRY")
