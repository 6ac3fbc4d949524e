"""Training steps a second: the trainer's loop with progress streaming and checkpoints, against the bare PyTorch loop.

Both train the same model on the same rows with the same optimiser, learning rates, label smoothing and threads, in one
process and in turns. The bare loop shuffles, descends, and does nothing else: it holds no rows out, reports nothing,
and would not notice a loss that is not finite.
"""

import json
import os
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from services.trainer.checkpoints import save_checkpoint
from services.trainer.config import LossKind, TrainingConfig
from services.trainer.descent import Descent
from services.trainer.progress import Progress
from services.trainer.rows import Rows
from services.trainer.schedule import Plan
from services.trainer.trainings import DEFAULT_LABEL_SMOOTHING
from tiltyard.models import build
from tiltyard.modelspec import Convnet, Mlp, ModelSpec

# Many short rounds: what else the machine does then falls on both sides of most pairs.
MLP = ModelSpec((8, 8), 10, Mlp((64,)), 1 / 16)
CONVNET = ModelSpec((8, 8), 10, Convnet((16, 32)), 1 / 16)


def run() -> list[dict[str, Any]]:
    """The digits' mlp, where the cost of a step that is not torch's shows most, and a convnet."""
    return [
        _compared("training: digits mlp", MLP, rounds=41, steps=400, goal=0.97),
        _compared("training: digits convnet", CONVNET, rounds=21, steps=80, goal=0.99),
    ]


def _compared(name: str, spec: ModelSpec, *, rounds: int, steps: int, goal: float) -> dict[str, Any]:
    digits = load_digits()
    x, y = digits.images.astype(np.uint8), digits.target.astype(np.int64)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = Rows(x, y, loss=LossKind.CROSS_ENTROPY, outputs=10, device="cpu")
    config = TrainingConfig(label_smoothing=DEFAULT_LABEL_SMOOTHING)
    trained_rows = len(y) - int(config.holdout_share * len(y))
    config = replace(config, epochs=-(-steps // Plan(rows=trained_rows, config=config).steps_per_epoch))
    pairs: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        # The one that goes first meets colder caches: they take turns at that, too.
        if turn % 2:
            ours, theirs = _ours(spec, rows, config), _bare(spec, x, y, config)
        else:
            theirs, ours = _bare(spec, x, y, config), _ours(spec, rows, config)
        if turn:  # the first turn warms torch up
            pairs.append((ours, theirs))
    return {
        "name": name,
        "ours": median(ours for ours, _ in pairs),
        "unit": "steps/s",
        "against": "bare PyTorch loop",
        "theirs": median(theirs for _, theirs in pairs),
        "ratio": median(ours / theirs for ours, theirs in pairs),
        "goal": goal,
    }


def _ours(spec: ModelSpec, rows: Rows, config: TrainingConfig) -> float:
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

        descent = Descent(spec=spec, loss=LossKind.CROSS_ENTROPY, config=config, rows=rows)
        checkpoint = Path(folder) / "checkpoint.safetensors"
        begun = time.perf_counter()
        descent.run(report=report, checkpoint=lambda: save_checkpoint(checkpoint, descent.state()))
        return descent.step / (time.perf_counter() - begun)


def _bare(spec: ModelSpec, x: np.ndarray, y: np.ndarray, config: TrainingConfig) -> float:
    """Steps a second of what one writes by hand."""
    images, labels = torch.from_numpy(x), torch.from_numpy(y)
    plan = Plan(rows=len(y) - int(config.holdout_share * len(y)), config=config)
    images, labels = images[: plan.rows], labels[: plan.rows]
    module = build(spec, seed=config.seed).train()
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
