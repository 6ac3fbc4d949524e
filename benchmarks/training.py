"""Training steps a second: the trainer's loop with progress streaming and checkpoints, against others' loops in turns.

All train the same model on the same rows with the same optimiser, learning rates, label smoothing and threads. The bare
PyTorch loop shuffles, descends, and does nothing else: it holds no rows out, reports nothing, and would not notice a
loss that is not finite. PyTorch Lightning runs in a process of its own, with all that it does beside training off.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from benchmarks import _peers
from services.trainer.config import LossKind, TrainingConfig
from services.trainer.descent.descent import Descent
from services.trainer.descent.keeper import CheckpointKeeper
from services.trainer.descent.rows import Rows
from services.trainer.progress import Progress
from services.trainer.schedule import Plan
from services.trainer.trainings import DEFAULT_LABEL_SMOOTHING
from tiltyard.models import build
from tiltyard.modelspec import Convnet, Mlp, ModelSpec

# Many short rounds: what else the machine does then falls on both sides of most pairs.
MLP = ModelSpec((8, 8), 10, Mlp((64,)), 1 / 16)
CONVNET = ModelSpec((8, 8), 10, Convnet((16, 32)), 1 / 16)


class Work:
    """One model, the digits, and how both sides train it."""

    def __init__(self, spec: ModelSpec, *, steps: int) -> None:
        digits = load_digits()
        self.spec = spec
        self.x, self.y = digits.images.astype(np.uint8), digits.target.astype(np.int64)
        self.rows = Rows(self.x, self.y, loss=LossKind.CROSS_ENTROPY, outputs=10, device="cpu")
        config = TrainingConfig(label_smoothing=DEFAULT_LABEL_SMOOTHING)
        self.trained_rows = len(self.y) - int(config.holdout_share * len(self.y))
        per_epoch = Plan(rows=self.trained_rows, config=config).steps_per_epoch
        self.config = replace(config, epochs=-(-steps // per_epoch))
        self.plan = Plan(rows=self.trained_rows, config=self.config)


def run() -> list[dict[str, Any]]:
    """The digits' mlp, where the cost of a step that is not torch's shows most, and a convnet."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    mlp, convnet = Work(MLP, steps=400), Work(CONVNET, steps=80)
    bare = {"against": "bare PyTorch loop"}
    results = [
        {"name": "training: digits mlp", "goal": 0.97} | bare | _compared(mlp, lambda: _bare(mlp), rounds=41),
        {"name": "training: digits convnet", "goal": 0.99}
        | bare
        | _compared(convnet, lambda: _bare(convnet), rounds=21),
    ]
    name = {"name": "training: digits mlp", "against": "PyTorch Lightning", "goal": 1.5}
    try:
        with _lightning(mlp) as theirs:
            results.append(name | _compared(mlp, theirs, rounds=7))
    except _peers.PeerUnavailable as error:
        print(f"skipped, PyTorch Lightning cannot be installed: {error}", file=sys.stderr)
    return results


def _compared(work: Work, theirs: Callable[[], float], *, rounds: int) -> dict[str, Any]:
    pairs: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        # The one that goes first meets colder caches: they take turns at that, too.
        if turn % 2:
            pair = (_ours(work), theirs())
        else:
            later = theirs()
            pair = (_ours(work), later)
        if turn:  # the first turn warms torch up
            pairs.append(pair)
    return {
        "ours": median(ours for ours, _ in pairs),
        "unit": "steps/s",
        "theirs": median(theirs for _, theirs in pairs),
        "ratio": median(ours / theirs for ours, theirs in pairs),
    }


@contextmanager
def _lightning(work: Work) -> Iterator[Callable[[], float]]:
    """Steps a second of one training by Lightning at each call. Raises PeerUnavailable."""
    python = _peers.python_of(_peers.LIGHTNING, ours_first=True)
    config = asdict(work.config) | {"steps": work.plan.total_steps, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits.npz"
        np.savez(data, x=work.x[: work.trained_rows], y=work.y[: work.trained_rows])
        script = Path(__file__).with_name("_lightning.py")
        with subprocess.Popen(
            [str(python), str(script), str(data), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=folder,
        ) as process:
            assert process.stdin is not None  # both are pipes
            assert process.stdout is not None
            asked, answers = process.stdin, process.stdout

            def train() -> float:
                asked.write("train\n")
                asked.flush()
                line = answers.readline()
                if not line:
                    raise _peers.PeerUnavailable(f"it ended with status {process.wait()}")
                return float(line)

            try:
                yield train
            finally:
                process.kill()


def _ours(work: Work) -> float:
    """Steps a second of the child's loop, progress going through a pipe to a process that reads it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as reader,
    ):
        assert reader.stdin is not None  # it is a pipe
        lines = reader.stdin

        def report(point: Progress) -> None:
            lines.write(json.dumps({"event": "progress", "point": point.to_json()}) + "\n")
            lines.flush()

        descent = Descent(spec=work.spec, loss=LossKind.CROSS_ENTROPY, config=work.config, rows=work.rows)
        checkpoint = Path(folder) / "checkpoint.safetensors"
        begun = time.perf_counter()
        with CheckpointKeeper(checkpoint, persist=_at_once, warn=print) as keeper:
            descent.run(report=report, checkpoint=lambda: keeper.keep(descent.state()))
        return descent.step / (time.perf_counter() - begun)


def _at_once(write: Callable[[], None]) -> bool:
    write()
    return True


def _bare(work: Work) -> float:
    """Steps a second of what one writes by hand."""
    config, plan = work.config, work.plan
    images, labels = torch.from_numpy(work.x[: plan.rows]), torch.from_numpy(work.y[: plan.rows])
    module = build(work.spec, seed=config.seed).train()
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    step = 0
    begun = time.perf_counter()
    for _ in range(config.epochs):
        order = torch.randperm(plan.rows)
        for start in range(0, plan.rows, config.batch_size):
            batch = order[start : start + config.batch_size]
            loss = loss_of(module(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.param_groups[0]["lr"] = plan.learning_rate(step)
            optimizer.step()
            step += 1
    return step / (time.perf_counter() - begun)
