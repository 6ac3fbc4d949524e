"""Several workers descend as one does with the same batches."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from services.trainer import runfolder
from services.trainer.config import Executor, LossKind, TrainingConfig
from services.trainer.descent import Descent
from services.trainer.localdata import mark_of
from services.trainer.progress import Progress
from services.trainer.rows import Rows
from tiltyard.datasets import write_dataset
from tiltyard.modelspec import Mlp, ModelSpec

DIGITS = load_digits()
X, Y = DIGITS.images[:300].astype(np.uint8), DIGITS.target[:300].astype(np.int64)
SPEC = ModelSpec((8, 8), 10, Mlp((32,)), 1 / 16)
CONFIG = TrainingConfig(epochs=4, batch_size=50, accumulation=2, label_smoothing=0.1)


class Threads:
    """services.trainer.workers.Workers as threads of one process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._given: list[Sequence[Tensor]] = [[]] * size

    def worker(self, rank: int) -> "ThreadWorker":
        return ThreadWorker(self, rank)

    def add_up(self, rank: int, tensors: Sequence[Tensor]) -> None:
        self._given[rank] = tensors
        self._barrier.wait()
        sums = [sum(parts) for parts in zip(*self._given, strict=True)]
        self._barrier.wait()
        for tensor, total in zip(tensors, sums, strict=True):
            assert isinstance(total, Tensor)
            tensor.copy_(total)


class ThreadWorker:
    def __init__(self, all_: Threads, rank: int) -> None:
        self.all, self.rank, self.size = all_, rank, all_.size

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        self.all.add_up(self.rank, tensors)


def descent(**more: Any) -> Descent:
    rows = Rows(X, Y, loss=LossKind.CROSS_ENTROPY, outputs=10, device="cpu")
    return Descent(spec=SPEC, loss=LossKind.CROSS_ENTROPY, config=CONFIG, rows=rows, **more)


@pytest.mark.parametrize("size", [2, 25])  # of 25 workers some have no row of a batch
def test_workers_that_share_each_batch_end_where_one_does(size: int) -> None:
    torch.set_num_threads(1)
    threads = Threads(size)
    workers = [descent(workers=threads.worker(rank)) for rank in range(size)]
    points: list[Progress] = []
    running = [threading.Thread(target=each.run, kwargs={"report": lambda _: None}) for each in workers[1:]]
    for thread in running:
        thread.start()
    assert workers[0].run(report=points.append)
    for thread in running:
        thread.join()
    one, alone = descent(), list[Progress]()
    assert one.run(report=alone.append)
    for name, tensor in one.module.state_dict().items():
        torch.testing.assert_close(workers[0].module.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
        assert torch.equal(workers[-1].module.state_dict()[name], workers[0].module.state_dict()[name])
    assert points[-1].holdout_loss == pytest.approx(alone[-1].holdout_loss, rel=1e-3)


def train_in_child(folder: Path, config: TrainingConfig) -> list[dict[str, Any]]:
    """The events of a real child process."""
    data = folder.parent / "digits.safetensors"
    write_dataset(data, X, Y)
    order = runfolder.Order(data, mark_of(data), SPEC, LossKind.CROSS_ENTROPY, config, "cpu", threads=1)
    runfolder.prepare(folder, order)
    command = [sys.executable, "-m", "services.trainer.child", str(folder), str(os.getpid())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_ray_train_with_two_workers_has_the_loss_curve_of_one(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    events = train_in_child(tmp_path / "two", replace(CONFIG, executor=Executor.RAY, workers=2))
    points = [Progress.from_json(event["point"]) for event in events if event["event"] == "progress"]
    assert events[-1]["event"] == "trained"
    one = train_in_child(tmp_path / "one", CONFIG)
    alone = [Progress.from_json(event["point"]) for event in one if event["event"] == "progress"]
    # Points come by the clock, and each loss is the mean since the point before: compared is the mean of all steps.
    assert points[-1].step == alone[-1].step
    assert mean_loss(points) == pytest.approx(mean_loss(alone), rel=1e-3)
    assert points[-1].holdout_loss == pytest.approx(alone[-1].holdout_loss, rel=1e-3)
    first, second = (load_file(tmp_path / name / runfolder.MODEL_FILE) for name in ("two", "one"))
    for name, tensor in second.items():
        np.testing.assert_allclose(first[name], tensor, rtol=1e-2, atol=1e-4)


def mean_loss(points: list[Progress]) -> float:
    steps = np.diff([0] + [point.step for point in points])
    return float(np.average([point.loss for point in points], weights=steps))
