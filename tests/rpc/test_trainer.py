"""A training node over a real server, with real processes that train."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from services.runtime.server import ArenaServer
from services.trainer.bootstrap import build
from services.trainer.settings import TrainerSettings
from tiltyard.client import ClientError, Node
from tiltyard.datasets import write_dataset
from tiltyard.identity import Key
from tiltyard.inference.v2 import inference_pb2
from tiltyard.trainer.v1 import trainer_pb2 as pb
from tiltyard.type.v1 import model_pb2, task_pb2

ENDED = (pb.TRAINING_STATE_SUCCEEDED, pb.TRAINING_STATE_FAILED, pb.TRAINING_STATE_CANCELLED)
LONG = 100_000
"""Epochs that no test waits for."""


@dataclass
class RunningTrainer:
    """A node in this process, a client with its own key, and the folder of its state."""

    node: Node
    address: str
    state: Path

    async def start(self, *, epochs: int = 2, dataset: str = "digits.safetensors", **fields: object) -> pb.Training:
        config = fields.pop("config", None) or pb.TrainingConfig(epochs=epochs)
        model = fields.pop("model", None) or mlp()
        request = pb.StartTrainingRequest(dataset=dataset, model=model, config=config, **fields)  # type: ignore[arg-type]
        return (await self.node.trainings.StartTraining(request)).training

    async def get(self, name: str) -> pb.Training:
        return (await self.node.trainings.GetTraining(pb.GetTrainingRequest(name=name))).training

    async def watch(self, name: str) -> AsyncIterator[pb.Training]:
        async for message in self.node.trainings.WatchTraining(pb.WatchTrainingRequest(name=name)):
            yield message.training

    async def until(self, name: str, *states: pb.TrainingState.ValueType, step: int = 0) -> pb.Training:
        async for training in self.watch(name):
            if training.state in (states or ENDED) and training.progress.step >= step:
                return training
        raise AssertionError(f"{name} ended before it was {states}")

    async def cancel(self, name: str) -> pb.Training:
        return (await self.node.trainings.CancelTraining(pb.CancelTrainingRequest(name=name))).training

    def folder(self, name: str) -> Path:
        return self.state / "trainings" / name.removeprefix("trainings/")

    def child(self, name: str) -> psutil.Process:
        return next(process for process in children() if str(self.folder(name)) in process.cmdline())


def children() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if "services.trainer.child" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def mlp(*, inputs: tuple[int, ...] = (8, 8), outputs: int = 10) -> model_pb2.ModelSpec:
    return model_pb2.ModelSpec(input_shape=inputs, outputs=outputs, input_scale=1 / 16, mlp=model_pb2.Mlp(hidden=[64]))


def write_digits(folder: Path) -> None:
    digits = load_digits()
    write_dataset(folder / "digits.safetensors", digits.images.astype(np.uint8), digits.target.astype(np.int64))


@asynccontextmanager
async def served(settings: TrainerSettings) -> AsyncIterator[RunningTrainer]:
    trainer = await build(settings)
    server = ArenaServer(
        settings.listen,
        trainer.mounts,
        authenticator=trainer.authenticator,
        policy=trainer.policy,
        remembered=trainer.database,
    )
    tasks = [asyncio.ensure_future(job()) for job in trainer.background]
    try:
        async with server, Node(trainer.key, address=server.address, node_id=trainer.key.id) as node:
            yield RunningTrainer(node, server.address, settings.state_dir)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for close in trainer.on_close:
            await close()


@pytest.fixture
def settings(tmp_path: Path) -> TrainerSettings:
    (tmp_path / "data").mkdir()
    write_digits(tmp_path / "data")
    return TrainerSettings(state_dir=tmp_path, listen="127.0.0.1:0", device="cpu", training_threads=1)


@pytest.fixture
async def trainer(settings: TrainerSettings) -> AsyncIterator[RunningTrainer]:
    async with served(settings) as running:
        yield running


async def refused(call: object) -> ClientError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return ClientError.of(caught.value)


async def test_a_training_is_watched_to_its_end_and_its_model_is_served(trainer: RunningTrainer) -> None:
    started = await trainer.start(config=pb.TrainingConfig(seed=1))
    assert started.state == pb.TRAINING_STATE_QUEUED
    assert started.config.learning_rate == 0.003
    assert started.config.epochs > 30  # the digits are few
    seen = [training async for training in trainer.watch(started.name)]
    steps = [training.progress.step for training in seen]
    assert steps == sorted(steps)
    done = seen[-1]
    assert done.state == pb.TRAINING_STATE_SUCCEEDED
    assert all(training.state not in ENDED for training in seen[:-1])
    assert done.progress.step == done.progress.total_steps == 26 * done.config.epochs
    assert done.progress.holdout_total == 179
    assert done.progress.holdout_correct > 0.95 * 179
    assert done.device == "cpu"
    assert len(done.model_digest) == 32
    assert sorted(path.name for path in trainer.folder(started.name).iterdir()) == ["model.safetensors", "spec.json"]

    digits = load_digits()
    request = inference_pb2.ModelInferRequest(
        model_name=started.name.removeprefix("trainings/"),
        raw_input_contents=[digits.images.astype(np.uint8).tobytes()],
    )
    request.inputs.add(name="x", datatype="UINT8", shape=[1797, 8, 8])
    answer = await trainer.node.inference.ModelInfer(request)
    logits = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(-1, 10)
    assert (logits.argmax(1) == digits.target).mean() > 0.97
