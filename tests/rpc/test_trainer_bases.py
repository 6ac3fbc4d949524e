"""Fine-tuning: a training begins with the model that its task names, or says why it does not."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file

from services.trainer import runfolder
from tests.rpc.trainer_registry import MODELS, FakeRegistry, refused, registry_of, request, served, until_ended
from tiltyard.client import Node
from tiltyard.identity import Key
from tiltyard.models import build, save_weights
from tiltyard.trainer.v1 import trainer_pb2 as pb
from tiltyard.wire import model_spec_from_proto

# So small a step that a model ends where it began.
STILL = pb.TrainingConfig(epochs=1, learning_rate=1e-12)


def weights(folder: Path, *, model: int = 1) -> bytes:
    """A model file of one of the task's architectures with weights that no training begins with by itself."""
    save_weights(build(model_spec_from_proto(MODELS[model]), seed=4321), folder / "base")
    return (folder / "base").read_bytes()


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[FakeRegistry]:
    async with registry_of(Key.load_or_create(tmp_path / "key.pem").id) as fake:
        fake.base_model = weights(tmp_path)
        yield fake


def distance(state: Path, training: pb.Training, base: bytes) -> float:
    (state / "base").write_bytes(base)
    began, ended = load_file(state / "base"), load_file(folder(state, training) / runfolder.MODEL_FILE)
    return max(float(np.abs(ended[name] - began[name]).max()) for name in began)


def folder(state: Path, training: pb.Training) -> Path:
    return state / "trainings" / training.name.removeprefix("trainings/")


async def start(node: Node, **fields: object) -> pb.Training:
    asked = {"model_index": 0, "submit": False, "config": STILL} | fields
    return (await node.trainings.StartTraining(request(**asked))).training


async def test_a_training_begins_with_the_base_model_of_its_task_or_by_choice_from_scratch(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.hold_downloads = True
    fresh = pb.TrainingConfig(epochs=1, learning_rate=1e-12, from_scratch=True)
    async with served(tmp_path, registry.address) as node:
        tuned = await start(node)
        assert tuned.base_model == registry.base_model_name
        await registry.download_asked.wait()
        # What waits for the registry keeps the device from nobody.
        scratch = (await until_ended(node, (await start(node, config=fresh)).name))[-1]
        assert scratch.state == pb.TRAINING_STATE_SUCCEEDED
        assert scratch.base_model == ""
        async for message in node.trainings.WatchTraining(pb.WatchTrainingRequest(name=tuned.name)):
            assert message.training.state == pb.TRAINING_STATE_QUEUED
            if message.training.warnings:
                break
        assert list(message.training.warnings) == ["tries again: the registry is away"]
        registry.hold_downloads = False
        tuned = (await until_ended(node, tuned.name))[-1]
    assert tuned.state == pb.TRAINING_STATE_SUCCEEDED, tuned.error
    assert distance(tmp_path, tuned, registry.base_model) < 1e-6
    assert distance(tmp_path, scratch, registry.base_model) > 0.1
    # Nothing that has not ended needs it any more.
    assert list((tmp_path / "bases").iterdir()) == []


async def test_a_base_model_of_another_architecture_fails_the_training_with_both_shapes(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.base_model = weights(tmp_path, model=0)
    async with served(tmp_path, registry.address) as node:
        done = (await until_ended(node, (await start(node)).name))[-1]
    assert (done.state, done.device) == (pb.TRAINING_STATE_FAILED, "")
    assert "is no mlp of its ModelSpec" in done.error
    assert "it holds head.bias (2,), head.weight (2, 2)" in done.error
    assert "the model has head.bias (2,), head.weight (2, 8), hidden.0.bias (8,)" in done.error
    assert not folder(tmp_path, done).exists()
    assert list((tmp_path / "bases").iterdir()) == []


async def test_a_training_that_waits_for_its_base_model_is_cancelled_and_leaves_nothing(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.hold_downloads = True
    async with served(tmp_path, registry.address) as node:
        started = await start(node)
        await registry.download_asked.wait()
        cancelled = (await node.trainings.CancelTraining(pb.CancelTrainingRequest(name=started.name))).training
        assert cancelled.state == pb.TRAINING_STATE_CANCELLED
        assert (await until_ended(node, started.name))[-1].state == pb.TRAINING_STATE_CANCELLED
    async with served(tmp_path, registry.address):
        # Of a download that was broken off, a restart at the latest leaves nothing.
        assert list((tmp_path / "bases").iterdir()) == []


async def test_a_base_model_is_for_members_alone(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.member = "0" * 40
    async with served(tmp_path, registry.address) as node:
        error = await refused(start(node))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_A_TRAINING_NODE")
