"""A training node over a real server, with real processes that train."""

import asyncio
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from services.runtime.database import Database
from services.runtime.server import ArenaServer
from services.trainer import runfolder
from services.trainer.bootstrap import build
from services.trainer.runner import CANCEL_GRACE_S
from services.trainer.settings import TrainerSettings
from services.trainer.store import SqlTrainingStore
from tiltyard.client import ClientError, Node, persist
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
        return next(process for process in children(self.state) if str(self.folder(name)) in process.cmdline())


def children(state: Path) -> list[psutil.Process]:
    """The processes that train for a node, by the folder that they work in: other nodes may run beside it."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(part.startswith(f"{state}/trainings/") for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def mlp(*, inputs: tuple[int, ...] = (8, 8), outputs: int = 10) -> model_pb2.ModelSpec:
    return model_pb2.ModelSpec(input_shape=inputs, outputs=outputs, input_scale=1 / 16, mlp=model_pb2.Mlp(hidden=[64]))


def encoder() -> model_pb2.ModelSpec:
    transformer = model_pb2.Transformer(vocabulary=5, width=8, layers=1, heads=2)
    return model_pb2.ModelSpec(input_shape=[3], outputs=2, transformer=transformer)


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


def new_settings(state: Path) -> TrainerSettings:
    (state / "data").mkdir()
    write_digits(state / "data")
    return TrainerSettings(state_dir=state, listen="127.0.0.1:0", device="cpu", training_threads=1)


@pytest.fixture
def settings(tmp_path: Path) -> TrainerSettings:
    return new_settings(tmp_path)


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
    assert started.config.label_smoothing == 0.1
    seen = [training async for training in trainer.watch(started.name)]
    steps = [training.progress.step for training in seen]
    assert steps == sorted(steps)
    done = seen[-1]
    assert done.state == pb.TRAINING_STATE_SUCCEEDED
    assert all(training.state not in ENDED for training in seen[:-1])
    assert done.progress.step == done.progress.total_steps == 26 * done.config.epochs
    assert (done.data.rows, done.data.minimum, done.data.maximum) == (1797, 0, 16)
    assert list(done.data.class_rows) == np.bincount(load_digits().target).tolist()
    assert not done.warnings
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


async def test_a_late_watcher_gets_the_history_first(trainer: RunningTrainer) -> None:
    name = (await trainer.start(epochs=60)).name
    await trainer.until(name)
    seen = [training async for training in trainer.watch(name)]
    steps = [training.progress.step for training in seen]
    assert len(steps) > 1
    assert steps == sorted(set(steps))
    assert [training.state for training in seen] == [pb.TRAINING_STATE_RUNNING] * (len(seen) - 1) + [
        pb.TRAINING_STATE_SUCCEEDED
    ]


async def test_a_run_finds_its_files_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of Ray Train's workers are not the node's, whose folder of state may be named as `state`."""
    monkeypatch.chdir(tmp_path)
    Path("state").mkdir()
    settings = new_settings(Path("state"))
    rows = "".join(f"{index % 5},{index % 3},{index % 2}\n" for index in range(200))
    (settings.data_dir / "rows.csv").write_text(f"a,b,label\n{rows}")
    async with served(settings) as trainer:
        name = (await trainer.start(dataset="rows.csv", model=mlp(inputs=(2,), outputs=2), epochs=LONG)).name
        await trainer.until(name, pb.TRAINING_STATE_RUNNING, step=1)
        folder = tmp_path / trainer.folder(name)
        order = runfolder.read_order(folder)
        assert str(folder) in RunningTrainer(trainer.node, "", tmp_path / "state").child(name).cmdline()
        assert order.source is not None
        assert all(path.is_absolute() for path in (order.dataset, order.source, order.data))
        await trainer.cancel(name)
        await trainer.until(name)


async def test_a_running_training_is_cancelled_at_once(trainer: RunningTrainer) -> None:
    name = (await trainer.start(epochs=LONG)).name
    await trainer.until(name, pb.TRAINING_STATE_RUNNING, step=1)
    process = trainer.child(name)
    begun = time.monotonic()
    asked = await trainer.cancel(name)
    assert asked.state == pb.TRAINING_STATE_RUNNING
    ended = await trainer.until(name)
    assert ended.state == pb.TRAINING_STATE_CANCELLED
    assert time.monotonic() - begun < 10  # its epochs would take for ever
    assert not process.is_running()
    assert ended.progress.step >= 1
    assert not trainer.folder(name).exists()
    assert (await trainer.cancel(name)) == ended


async def test_a_service_that_is_stopped_waits_for_a_slow_last_checkpoint(settings: TrainerSettings) -> None:
    async with served(settings) as trainer:
        name = (await trainer.start(epochs=LONG)).name
        await trainer.until(name, pb.TRAINING_STATE_RUNNING, step=1)
        checkpoint, child = trainer.folder(name) / "checkpoint.safetensors", trainer.child(name)
        assert not checkpoint.exists()
        child.suspend()
        # It comes to work again when a cancellation would have ended it.
        asyncio.get_running_loop().call_later(2 * CANCEL_GRACE_S, child.resume)
    assert not child.is_running()
    assert checkpoint.exists()


async def test_a_queue_runs_in_order_and_what_waits_is_cancelled_at_once(trainer: RunningTrainer) -> None:
    first, second, third = [(await trainer.start(epochs=epochs)).name for epochs in (LONG, LONG, 1)]
    await trainer.until(first, pb.TRAINING_STATE_RUNNING, step=1)
    assert len(children(trainer.state)) == 1
    assert (await trainer.get(second)).state == pb.TRAINING_STATE_QUEUED
    assert (await trainer.cancel(second)).state == pb.TRAINING_STATE_CANCELLED
    await trainer.cancel(first)
    assert (await trainer.until(third)).state == pb.TRAINING_STATE_SUCCEEDED
    assert (await trainer.get(second)).progress.step == 0


async def test_trainings_are_listed_newest_first_in_pages(trainer: RunningTrainer) -> None:
    names = [(await trainer.start(epochs=LONG)).name for _ in range(5)]
    trainings = trainer.node.trainings
    found, token = [], ""
    while True:
        page = await trainings.ListTrainings(pb.ListTrainingsRequest(page_size=2, page_token=token))
        assert len(page.trainings) <= 2
        found += [training.name for training in page.trainings]
        token = page.next_page_token
        if not token:
            break
    assert found == names[::-1]
    error = await refused(trainings.ListTrainings(pb.ListTrainingsRequest(page_token="Zm9yZ2Vk")))
    assert (error.code, error.violations[0].field) == (grpc.StatusCode.INVALID_ARGUMENT, "page_token")
    error = await refused(trainings.ListTrainings(pb.ListTrainingsRequest(page_size=-1)))
    assert error.violations[0].field == "page_size"


async def test_one_request_id_starts_one_training(trainer: RunningTrainer) -> None:
    first = await trainer.start(epochs=LONG, request_id="once")
    again = await trainer.start(epochs=LONG, request_id="once")
    assert again == first
    error = await refused(trainer.start(epochs=1, request_id="once"))
    assert error.reason == "REQUEST_ID_REUSED"
    assert len((await trainer.node.trainings.ListTrainings(pb.ListTrainingsRequest())).trainings) == 1


BAD_REQUESTS: list[tuple[dict[str, object], str, str]] = [
    ({"config": pb.TrainingConfig(epochs=-1)}, "config.epochs", "-1"),
    ({"config": pb.TrainingConfig(batch_size=2_000_000)}, "config.batch_size", "1000000"),
    ({"config": pb.TrainingConfig(learning_rate=float("nan"))}, "config.learning_rate", "nan"),
    ({"config": pb.TrainingConfig(learning_rate=101)}, "config.learning_rate", "at most 100"),
    ({"config": pb.TrainingConfig(momentum=1.0)}, "config.momentum", "below 1"),
    ({"config": pb.TrainingConfig(holdout_share=1.0)}, "config.holdout_share", "below 1"),
    ({"config": pb.TrainingConfig(patience=2, holdout_share=0.0)}, "config.patience", "holdout_share"),
    ({"config": pb.TrainingConfig(optimizer=9)}, "config.optimizer", "9"),  # type: ignore[arg-type]
    ({"loss": 9}, "loss", "9 is not known"),
    ({"loss": task_pb2.LOSS_HUBER}, "dataset", "must be float32 targets"),
    ({"config": pb.TrainingConfig(precision=9)}, "config.precision", "9"),  # type: ignore[arg-type]
    ({"config": pb.TrainingConfig(class_weights=[-1] * 10)}, "config.class_weights[0]", "is -1"),
    ({"config": pb.TrainingConfig(class_weights=[1, 2])}, "config.class_weights", "has 10 outputs"),
    (
        {"model": encoder(), "dataset": "tokens.safetensors"},
        "dataset",
        "row 1 has a value that is no token id",
    ),
    ({"model": model_pb2.ModelSpec(input_shape=[8, 8], outputs=10)}, "model.architecture", "one of"),
    (
        {"model": model_pb2.ModelSpec(input_shape=[8, 8], outputs=10, onnx=model_pb2.Onnx())},
        "model.onnx",
        "cannot be trained",
    ),
    ({"model": mlp(outputs=0)}, "model.outputs", "1 to"),
    ({"model": mlp(inputs=(28, 28))}, "dataset", "(8, 8), but the model takes (28, 28)"),
    ({"model": mlp(outputs=5)}, "dataset", "outside 0 to 4"),
    ({"dataset": "one_class.safetensors"}, "dataset", "one class"),
    ({"dataset": "empty.safetensors"}, "dataset", "empty"),
    ({"dataset": "nan.safetensors"}, "dataset", "row 3 has a value that is NaN"),
    ({"dataset": "lengths.safetensors"}, "dataset", "has 4 rows, but x has 5"),
    ({"dataset": "text.safetensors"}, "dataset", "is not a dataset"),
    ({"dataset": "unlabelled.safetensors"}, "dataset", "exactly the tensors x and y"),
    ({"dataset": "bad.csv"}, "dataset", "bad.csv:3: 2 columns, not 3"),
    ({"dataset": "../key.pem"}, "dataset", "below the node's data folder"),
    ({"dataset": "/etc/passwd"}, "dataset", "below the node's data folder"),
    ({"dataset": "link"}, "dataset", "out of the node's data folder"),
    ({"dataset": ""}, "dataset", "required"),
    ({"submit": True}, "submit", "needs a task"),
    ({"task": "tasks/UPPER"}, "task", "must look like"),
]


@pytest.mark.parametrize(("fields", "field", "text"), BAD_REQUESTS, ids=[f"{f}-{t}" for _, f, t in BAD_REQUESTS])
async def test_a_bad_request_names_its_field_and_starts_nothing(
    trainer: RunningTrainer, fields: dict[str, object], field: str, text: str
) -> None:
    data = trainer.state / "data"
    x, y = np.zeros((5, 8, 8), np.float32), np.array([0, 1, 2, 3, 4], np.int64)
    write_dataset(data / "one_class.safetensors", x, np.full(5, 7))
    write_dataset(data / "tokens.safetensors", np.array([[0, 1, 2], [3, 4, 5]]), np.array([0, 1]))
    save_file({"x": x[:0], "y": y[:0]}, data / "empty.safetensors")
    save_file({"x": x, "y": y[:4]}, data / "lengths.safetensors")
    save_file({"x": x}, data / "unlabelled.safetensors")
    holed = x.copy()
    holed[3, 2, 1] = np.nan
    save_file({"x": holed, "y": y}, data / "nan.safetensors")
    (data / "text.safetensors").write_text("x,y\n1,2\n")
    (data / "bad.csv").write_text("a,b,y\n1,2,0\n1,2\n")
    (data / "link").symlink_to(trainer.state / "key.pem")
    error = await refused(trainer.start(**fields))  # type: ignore[arg-type]
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations[0].field == field
    assert text in error.violations[0].description
    assert not (await trainer.node.trainings.ListTrainings(pb.ListTrainingsRequest())).trainings


async def test_a_large_source_is_packed_by_the_trainings_own_process(
    trainer: RunningTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = trainer.state / "data"
    digits = load_digits()
    rows = np.concatenate([digits.data, digits.target[:, None]], axis=1).astype(int)[:500]
    (data / "digits.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    (data / "words.csv").write_text("1,2,0\n1,two,1\n")
    monkeypatch.setattr("services.trainer.localdata.LARGE_SOURCE_BYTES", 0)
    model = mlp(inputs=(64,))
    started = await trainer.start(dataset="digits.csv", model=model, config=pb.TrainingConfig(batch_size=512))
    assert started.config.epochs == 0  # as many as follow from its rows
    bad = await trainer.start(dataset="words.csv", model=mlp(inputs=(2,), outputs=2))
    misfit = await trainer.start(dataset="digits.csv", model=mlp(inputs=(63,)))
    done = await trainer.until(started.name)
    assert (done.state, done.data.rows) == (pb.TRAINING_STATE_SUCCEEDED, 500)
    assert done.progress.step == done.progress.total_steps == done.config.epochs == 300
    assert not done.HasField("preparation")
    ended = await trainer.until(bad.name)
    assert ended.state == pb.TRAINING_STATE_FAILED
    assert "words.csv:2: column '2': 'two' is no number" in ended.error
    assert "rows of shape (64,), but the model takes (63,)" in (await trainer.until(misfit.name)).error
    assert [path.name for path in (data / ".packed").iterdir()] == ["digits.csv"]


async def test_packing_survives_a_kill_and_ends_with_a_cancellation_that_leaves_nothing(
    trainer: RunningTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = trainer.state / "data"
    # Some seconds' work.
    (data / "long.csv").write_text("1,2,3,4,5,6,7,8,9,0\n0,1,2,3,4,5,6,7,8,1\n" * 300_000)
    monkeypatch.setattr("services.trainer.localdata.LARGE_SOURCE_BYTES", 0)
    name = (await trainer.start(dataset="long.csv", model=mlp(inputs=(9,), outputs=2), epochs=LONG)).name
    killed = None
    async for training in trainer.watch(name):
        if killed is None and training.preparation.stage == pb.PREPARATION_STAGE_PACKING:
            assert training.preparation.rows > 0
            killed = trainer.child(name)
            killed.kill()
        elif killed is not None and [each for each in children(trainer.state) if each.pid != killed.pid]:
            await trainer.cancel(name)  # it packs again
    assert killed is not None
    assert training.state == pb.TRAINING_STATE_CANCELLED
    assert not children(trainer.state)
    assert not trainer.folder(name).exists()
    assert not [path for path in (data / ".packed").rglob(".*")]


async def test_what_does_not_exist_is_not_found(trainer: RunningTrainer) -> None:
    name = "trainings/none"
    for call in (trainer.get(name), trainer.cancel(name), trainer.until(name), trainer.start(dataset="none")):
        assert (await refused(call)).code is grpc.StatusCode.NOT_FOUND
    error = await refused(trainer.get("training/1"))
    assert (error.code, error.violations[0].field) == (grpc.StatusCode.INVALID_ARGUMENT, "name")


async def test_a_training_whose_remains_cannot_be_removed_has_ended_all_the_same(
    settings: TrainerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, *, keep_mark: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(folder / "child.log"))

    with monkeypatch.context() as patched:
        patched.setattr(runfolder, "clear", refuse)
        async with served(settings) as trainer:
            name = (await trainer.start()).name
            assert (await trainer.until(name)).state == pb.TRAINING_STATE_SUCCEEDED
        # Nor does it hold up what is started next.
        async with served(settings) as trainer:
            await trainer.until((await trainer.start()).name)
            assert (await trainer.get(name)).state == pb.TRAINING_STATE_SUCCEEDED


async def test_a_learning_rate_that_diverges_fails_the_training_with_its_step(trainer: RunningTrainer) -> None:
    config = pb.TrainingConfig(epochs=50, learning_rate=100, optimizer=pb.OPTIMIZER_KIND_SGD, warmup=0.0)
    x = np.random.default_rng(0).normal(scale=1e4, size=(300, 4)).astype(np.float32)
    write_dataset(trainer.state / "data" / "wild.safetensors", x, x[:, :1])
    model = model_pb2.ModelSpec(input_shape=[4], outputs=1, linear=model_pb2.Linear())
    started = await trainer.start(dataset="wild.safetensors", model=model, loss=task_pb2.LOSS_MSE, config=config)
    ended = await trainer.until(started.name)
    assert ended.state == pb.TRAINING_STATE_FAILED
    assert re.search(r"the loss is (inf|nan) at step \d+", ended.error)
    assert not ended.model_digest
    assert not trainer.folder(started.name).exists()


async def test_a_dataset_that_changes_while_it_waits_fails_the_training(trainer: RunningTrainer) -> None:
    blocking = (await trainer.start(epochs=LONG)).name
    waiting = (await trainer.start(epochs=1)).name
    os.utime(trainer.state / "data" / "digits.safetensors", ns=(1, 1))
    await trainer.cancel(blocking)
    ended = await trainer.until(waiting)
    assert ended.state == pb.TRAINING_STATE_FAILED
    assert "has changed" in ended.error


async def test_nobody_but_the_own_key_and_operators_is_obeyed(settings: TrainerSettings) -> None:
    operator, stranger = Key.generate(), Key.generate()
    settings = settings.model_copy(update={"operators": frozenset({operator.id})})
    async with served(settings) as trainer:
        own = Key.load(settings.key_file).id
        async with Node(operator, address=trainer.address, node_id=own) as node:
            await node.trainings.ListTrainings(pb.ListTrainingsRequest())
        async with Node(stranger, address=trainer.address, node_id=own) as node:
            calls = [
                node.trainings.StartTraining(pb.StartTrainingRequest()),
                node.trainings.GetTraining(pb.GetTrainingRequest(name="trainings/1")),
                node.trainings.ListTrainings(pb.ListTrainingsRequest()),
                node.trainings.CancelTraining(pb.CancelTrainingRequest(name="trainings/1")),
                node.inference.ModelInfer(inference_pb2.ModelInferRequest(model_name="1")),
            ]
            for call in calls:
                assert (await refused(call)).code is grpc.StatusCode.PERMISSION_DENIED
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await node.trainings.WatchTraining(pb.WatchTrainingRequest(name="trainings/1")).read()
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        async with Node(operator, address=trainer.address, node_id=stranger.id) as node:
            error = await refused(node.trainings.ListTrainings(pb.ListTrainingsRequest()))
            assert error.code is grpc.StatusCode.UNAUTHENTICATED


RESUMED = pb.TrainingConfig(epochs=250, seed=4, checkpoint_interval_s=1)


@pytest.fixture(scope="module")
def whole_digest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The digest of the model that RESUMED ends with when nothing interrupts it."""

    async def train() -> bytes:
        async with served(new_settings(tmp_path_factory.mktemp("whole"))) as trainer:
            return (await trainer.until((await trainer.start(config=RESUMED)).name)).model_digest

    return asyncio.run(train())


async def test_a_killed_process_resumes_from_its_checkpoint_and_ends_with_the_same_bits(
    trainer: RunningTrainer, whole_digest: bytes
) -> None:
    broken = (await trainer.start(config=RESUMED)).name
    checkpoint = trainer.folder(broken) / "checkpoint.safetensors"
    kept, steps = 0, [0]
    async for training in trainer.watch(broken):
        steps.append(training.progress.step)
        if not kept and checkpoint.exists():
            with safe_open(checkpoint, framework="numpy") as file:
                kept = json.loads(file.metadata()["facts"])["step"]
            # As one that is killed while it writes a checkpoint leaves.
            (draft := checkpoint.with_name(f".{checkpoint.name}.5eed")).touch()
            trainer.child(broken).kill()
        elif kept and steps[-1] < steps[-2]:
            assert not draft.exists()
    assert kept > 0
    assert training.state == pb.TRAINING_STATE_SUCCEEDED
    # Whatever came after the kill began where the checkpoint was, not at the first step.
    back = [later for earlier, later in itertools.pairwise(steps) if later < earlier]
    assert all(step > kept for step in back)
    assert training.model_digest == whole_digest
    assert not children(trainer.state)


async def test_a_service_that_is_killed_takes_its_processes_along_and_resumes_after_its_restart(
    settings: TrainerSettings, whole_digest: bytes
) -> None:
    Key.load_or_create(settings.key_file)
    with tempfile.TemporaryDirectory(prefix="tiltyard") as short:
        address = f"unix:{short}/node"
        service = start_service(settings.state_dir, address)
        try:
            key = Key.load(settings.key_file)
            async with Node(key, address=address, node_id=key.id) as node:
                trainer = RunningTrainer(node, address, settings.state_dir)
                started = await persist(lambda: trainer.start(config=RESUMED, request_id="first"))
                queued = await trainer.start(epochs=LONG)
                async for _ in trainer.watch(started.name):
                    if (trainer.folder(started.name) / "checkpoint.safetensors").exists():
                        break
                child = trainer.child(started.name)
                service.kill()
                service.wait()
                psutil.wait_procs([child], timeout=60)
                assert not children(settings.state_dir)
                service = start_service(settings.state_dir, address)
                ended = await persist(lambda: trainer.until(started.name))
                assert ended.state == pb.TRAINING_STATE_SUCCEEDED
                assert ended.model_digest == whole_digest
                await trainer.until(queued.name, pb.TRAINING_STATE_RUNNING, step=1)
                service.terminate()
                assert service.wait(20) == 0
                assert not children(settings.state_dir)
        finally:
            service.kill()
            service.wait()


def start_service(state: Path, address: str, *, max_runs: int = 1) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")}
    environment |= {
        "TILTYARD_STATE_DIR": str(state),
        "TILTYARD_LISTEN": address,
        "TILTYARD_DEVICE": "cpu",
        "TILTYARD_TRAINING_THREADS": "1",
        "TILTYARD_MAX_RUNS": str(max_runs),
        "TILTYARD_LOG_LEVEL": "error",
    }
    return subprocess.Popen([sys.executable, "-m", "services.trainer"], env=environment)


async def test_a_second_process_leaves_the_trainings_of_the_first_alone(settings: TrainerSettings) -> None:
    Key.load_or_create(settings.key_file)
    with tempfile.TemporaryDirectory(prefix="tiltyard") as short:
        address = f"unix:{short}/node"
        service = start_service(settings.state_dir, address)
        try:
            key = Key.load(settings.key_file)
            async with Node(key, address=address, node_id=key.id) as node:
                trainer = RunningTrainer(node, address, settings.state_dir)
                name = (await persist(functools.partial(trainer.start, epochs=LONG, request_id="one"))).name
                await trainer.until(name, pb.TRAINING_STATE_RUNNING, step=1)
                second = start_service(settings.state_dir, f"unix:{short}/second")
                assert second.wait(60) == 2
                assert (await trainer.get(name)).state == pb.TRAINING_STATE_RUNNING
        finally:
            service.kill()
            service.wait()


async def test_what_was_being_cancelled_when_the_service_died_is_not_resumed(settings: TrainerSettings) -> None:
    async with served(settings) as trainer:
        name = (await trainer.start(epochs=LONG)).name
        await trainer.until(name, pb.TRAINING_STATE_RUNNING)
    assert not children(settings.state_dir)
    database = Database.open(settings.database_url, migrations="services.trainer.migrations")
    store = SqlTrainingStore(database)
    asked = await store.change(name.removeprefix("trainings/"), lambda each: each.cancel(now=each.created_at))
    assert asked.cancel_requested
    assert not asked.ended
    await database.close()
    async with served(settings) as trainer:
        assert (await trainer.until(name)).state == pb.TRAINING_STATE_CANCELLED


async def test_a_process_that_always_dies_is_given_up(trainer: RunningTrainer) -> None:
    # A folder in the place of the lock: the child dies before its first step, each time.
    blocking = (await trainer.start(epochs=LONG)).name
    doomed = (await trainer.start(epochs=1)).name
    (trainer.folder(doomed) / "lock").mkdir(parents=True)
    await trainer.cancel(blocking)
    ended = await trainer.until(doomed)
    assert ended.state == pb.TRAINING_STATE_FAILED
    assert "died 4 times" in ended.error
    assert "IsADirectoryError" in ended.error


async def see_many_runs_through(settings: TrainerSettings, *, runs: int, kills: int, max_runs: int) -> None:
    """A third is cancelled, the service is killed again and again, and every run ends as it should."""
    Key.load_or_create(settings.key_file)
    with tempfile.TemporaryDirectory(prefix="tiltyard") as short:
        address = f"unix:{short}/node"
        service = start_service(settings.state_dir, address, max_runs=max_runs)
        try:
            key = Key.load(settings.key_file)
            async with Node(key, address=address, node_id=key.id) as node:
                trainer = RunningTrainer(node, address, settings.state_dir)
                names, cancelled = [], set()
                for index in range(runs):
                    request_id = f"run {index}"
                    # What is cancelled is long, so that nothing but the cancellation ends it.
                    epochs = LONG if index % 3 == 1 else 1
                    started = await persist(functools.partial(trainer.start, epochs=epochs, request_id=request_id))
                    names.append(started.name)
                    if epochs == LONG:
                        cancelled.add(started.name)
                    if kills and (index + 1) % max(1, runs // kills) == 0:
                        service.kill()
                        service.wait()
                        assert not [each for each in children(settings.state_dir) if not ends_soon(each)]
                        service = start_service(settings.state_dir, address, max_runs=max_runs)
                for name in names:
                    if name in cancelled:
                        await persist(functools.partial(trainer.cancel, name))
                for name in names:
                    ended = await persist(functools.partial(trainer.until, name))
                    expected = pb.TRAINING_STATE_CANCELLED if name in cancelled else pb.TRAINING_STATE_SUCCEEDED
                    assert (ended.state, ended.error) == (expected, "")
                    assert trainer.folder(name).exists() == (name not in cancelled)
                    if name not in cancelled:
                        kept = sorted(path.name for path in trainer.folder(name).iterdir())
                        assert kept == ["model.safetensors", "spec.json"]
                assert not children(settings.state_dir)
                page = await node.trainings.ListTrainings(pb.ListTrainingsRequest(page_size=1000))
                assert len(page.trainings) == runs
        finally:
            service.kill()
            service.wait()


def ends_soon(process: psutil.Process) -> bool:
    gone, _ = psutil.wait_procs([process], timeout=60)
    return bool(gone)


@pytest.mark.timeout(600)  # ten processes load torch, one after the other
async def test_six_runs_train_or_are_cancelled_and_a_kill_of_the_service_changes_nothing(
    settings: TrainerSettings,
) -> None:
    await see_many_runs_through(settings, runs=6, kills=1, max_runs=2)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_hundred_runs_train_or_are_cancelled_and_ten_kills_of_the_service_change_nothing(
    settings: TrainerSettings,
) -> None:
    await see_many_runs_through(settings, runs=100, kills=10, max_runs=1)
