"""Several workers descend as one does with the same batches."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from services.trainer.config import LossKind, TrainingConfig
from services.trainer.descent.descent import Descent
from services.trainer.descent.holdout import Holdout
from services.trainer.descent.rows import Rows
from services.trainer.progress import Progress
from tiltyard.modelspec import Mlp, ModelSpec

DIGITS = load_digits()
X, Y = DIGITS.images[:300].astype(np.uint8), DIGITS.target[:300].astype(np.int64)
SPEC = ModelSpec((8, 8), 10, Mlp((32,)), 1 / 16)
CONFIG = TrainingConfig(epochs=4, batch_size=50, accumulation=2, label_smoothing=0.1)


class Threads:
    """services.trainer.descent.workers.Workers as threads of one process."""

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


def descent(*, config: TrainingConfig = CONFIG, **more: Any) -> Descent:
    rows = Rows(X, Y, loss=LossKind.CROSS_ENTROPY, outputs=10, device="cpu")
    return Descent(spec=SPEC, loss=LossKind.CROSS_ENTROPY, config=config, rows=rows, **more)


def run_together(workers: Sequence[Descent], report: Callable[[Progress], None]) -> None:
    running = [threading.Thread(target=each.run, kwargs={"report": lambda _: None}) for each in workers[1:]]
    for thread in running:
        thread.start()
    assert workers[0].run(report=report)
    for thread in running:
        thread.join()


@pytest.mark.parametrize("size", [2, 25])  # of 25 workers some have no row of a batch
def test_workers_that_share_each_batch_end_where_one_does(size: int) -> None:
    torch.set_num_threads(1)
    threads = Threads(size)
    workers = [descent(workers=threads.worker(rank)) for rank in range(size)]
    points: list[Progress] = []
    run_together(workers, points.append)
    one, alone = descent(), list[Progress]()
    assert one.run(report=alone.append)
    for name, tensor in one.module.state_dict().items():
        torch.testing.assert_close(workers[0].module.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
        assert torch.equal(workers[-1].module.state_dict()[name], workers[0].module.state_dict()[name])
    assert points[-1].holdout_loss == pytest.approx(alone[-1].holdout_loss, rel=1e-3)


@pytest.mark.parametrize("first", ["better", "worse"])
def test_workers_that_see_held_out_rows_otherwise_stop_together(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """On another processor a last bit of the loss may differ: who went on would wait for the others for good."""
    torch.set_num_threads(1)
    threads, config = Threads(2), replace(CONFIG, epochs=20, patience=2)
    workers = [descent(config=config, workers=threads.worker(rank)) for rank in range(2)]
    better, worse = (iter([Holdout(n, 30, 1.0) for n in found]) for found in (range(30), range(30, 0, -1)))
    for worker, found in zip(workers, (better, worse) if first == "better" else (worse, better), strict=True):
        monkeypatch.setattr(worker, "evaluate", lambda _, found=found: next(found))
    run_together(workers, lambda _: None)
    assert workers[1].step == workers[0].step == (20 if first == "better" else 3) * workers[0].plan.steps_per_epoch
    for name, tensor in workers[0].module.state_dict().items():
        assert torch.equal(workers[1].module.state_dict()[name], tensor)
