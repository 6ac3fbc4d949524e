"""`executor = ray`: real workers under Ray Train learn what one process does, and leave nothing behind."""

import asyncio
import contextlib
import itertools
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from services.trainer import runfolder
from services.trainer.config import Executor, LossKind, TrainingConfig
from services.trainer.descent.descent import Descent
from services.trainer.descent.rows import Rows
from services.trainer.ends import Broken, Died, Note, Trained
from services.trainer.leftovers import RUN_VARIABLE
from services.trainer.localdata import DataFolder
from services.trainer.packed import mark_of
from services.trainer.progress import Progress
from services.trainer.runner import ChildProcesses
from services.trainer.training import Training
from tiltyard.datasets import write_dataset
from tiltyard.modelspec import Mlp, ModelSpec

pytest.importorskip("ray")

# Ten processes of Ray load torch, one after the other.
pytestmark = pytest.mark.timeout(900)

DIGITS = load_digits()
X, Y = DIGITS.images[:300].astype(np.uint8), DIGITS.target[:300].astype(np.int64)
CONFIG = TrainingConfig(epochs=60, batch_size=50, accumulation=2, learning_rate=0.0005, label_smoothing=0.1)
TRAINING = Training(
    id="1",
    task="",
    model_index=0,
    dataset="digits.safetensors",
    dataset_mark="",
    spec=ModelSpec((8, 8), 10, Mlp((32,)), 1 / 16),
    loss=LossKind.CROSS_ENTROPY,
    config=replace(CONFIG, executor=Executor.RAY, workers=2),
    submit=False,
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data" / "digits.safetensors", X, Y)
    return replace(TRAINING, dataset_mark=mark_of(tmp_path / "data" / "digits.safetensors"))


@pytest.fixture
def children(tmp_path: Path) -> ChildProcesses:
    return children_in(tmp_path)


def children_in(folder: Path) -> ChildProcesses:
    """What trains, in a folder of its own."""
    return ChildProcesses(folder=folder / "runs", bases=folder / "bases", data=DataFolder(folder / "data"), threads=1)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process that was started for a run, whatever its parent is by now."""
    wanted = f"{RUN_VARIABLE}={folder}".encode()
    found = []
    for process in psutil.process_iter():
        # psutil's own environ() ends at an empty word, which those have who have changed their title.
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if wanted in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found.append(process)
    return found


def one_worker() -> tuple[Descent, list[Progress]]:
    """The same training by one worker, with a point for each update."""
    torch.set_num_threads(1)
    rows = Rows(X, Y, loss=LossKind.CROSS_ENTROPY, outputs=10, device="cpu")
    descent = Descent(spec=TRAINING.spec, loss=TRAINING.loss, config=CONFIG, rows=rows)
    points: list[Progress] = []
    seconds = itertools.count()
    assert descent.run(report=points.append, clock=lambda: float(next(seconds)))
    return descent, points


async def test_ray_train_with_two_workers_has_the_loss_curve_of_one(
    tmp_path: Path, children: ChildProcesses, training: Training
) -> None:
    points: list[Progress] = []
    notes: list[Note] = []
    end = await children.train(training, device="cpu", report=points.append, note=notes.append, goes_on=lambda: False)
    assert isinstance(end, Trained), (end, notes)
    assert not processes_of(tmp_path / "runs" / "1")
    descent, alone = one_worker()
    # Points come by the clock, each with the mean loss since the point before: so is the other curve cut.
    summed = {0: 0.0}
    for before, point in itertools.pairwise([replace(alone[0], step=0), *alone]):
        summed[point.step] = summed[before.step] + point.loss * (point.step - before.step)
    assert points[-1].step == alone[-1].step
    assert len(points) >= 4
    for before, point in itertools.pairwise([replace(points[0], step=0), *points]):
        expected = (summed[point.step] - summed[before.step]) / (point.step - before.step)
        assert point.loss == pytest.approx(expected, rel=1e-4)
    assert points[-1].holdout_loss == pytest.approx(alone[-1].holdout_loss, rel=1e-4)
    model = load_file(tmp_path / "runs" / "1" / runfolder.MODEL_FILE)
    for name, tensor in descent.module.state_dict().items():
        np.testing.assert_allclose(model[name], tensor.numpy(), rtol=1e-2, atol=1e-4)


async def test_ray_train_is_cancelled_at_once_and_leaves_no_process(
    tmp_path: Path, children: ChildProcesses, training: Training
) -> None:
    folder = tmp_path / "runs" / "1"
    running = asyncio.ensure_future(
        children.train(training, device="cpu", report=lambda _: None, note=lambda _: None, goes_on=lambda: False)
    )
    # Ray's own processes are there, and more of them are on their way.
    while not any(process.name().startswith("ray") for process in processes_of(folder)):
        await asyncio.sleep(0.05)
        assert not running.done()
    begun = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert time.monotonic() - begun < 10
    assert not processes_of(folder)
    await children.clear(training)
    assert not runfolder.scratch(folder).exists()


@pytest.mark.soak
async def test_ray_train_that_diverges_says_at_which_step_and_leaves_no_worker_waiting(
    tmp_path: Path, children: ChildProcesses, training: Training
) -> None:
    too_fast = replace(training, config=replace(training.config, learning_rate=1e30))
    end = await children.train(
        too_fast, device="cpu", report=lambda _: None, note=lambda _: None, goes_on=lambda: False
    )
    assert isinstance(end, Broken)
    assert "try a smaller learning rate" in end.error
    assert not processes_of(tmp_path / "runs" / "1")


@pytest.mark.soak
async def test_ray_train_of_which_a_worker_is_killed_may_go_on_from_its_checkpoint(
    tmp_path: Path, children: ChildProcesses, training: Training
) -> None:
    folder = tmp_path / "runs" / "1"
    long = replace(training, config=replace(training.config, epochs=1_000_000, checkpoint_interval_steps=10))
    running = asyncio.ensure_future(
        children.train(long, device="cpu", report=lambda _: None, note=lambda _: None, goes_on=lambda: True)
    )
    while not runfolder.checkpoint(folder).exists():
        await asyncio.sleep(0.05)
        assert not running.done()
    workers = [process for process in processes_of(folder) if "RayTrainWorker" in process.name()]
    assert len(workers) == 2
    workers[1].kill()
    assert isinstance(end := await running, Died), end
    assert not processes_of(folder)


def test_ray_train_ends_with_a_service_that_is_killed(tmp_path: Path, training: Training) -> None:
    folder = tmp_path / "runs" / "1"
    serving = f"import runpy; runpy.run_path({__file__!r})['serve']({str(tmp_path)!r}, {training.dataset_mark!r})"
    service = subprocess.Popen([sys.executable, "-c", serving])
    try:
        while not any(process.name().startswith("ray") for process in processes_of(folder)):
            time.sleep(0.05)
            assert service.poll() is None
    finally:
        service.kill()
        service.wait()
    # Nobody is left who could end them but they themselves.
    while processes_of(folder):
        time.sleep(0.05)


def serve(folder: str, dataset_mark: str) -> None:
    """Trains in a process that is going to be killed."""
    training = replace(TRAINING, dataset_mark=dataset_mark, config=replace(TRAINING.config, epochs=1_000_000))
    children = children_in(Path(folder))
    asyncio.run(
        children.train(training, device="cpu", report=lambda _: None, note=lambda _: None, goes_on=lambda: False)
    )
