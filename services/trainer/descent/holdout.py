"""The rows that are never trained on: what a module makes of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.trainer.config import LossKind
from services.trainer.descent.objectives import objective
from services.trainer.descent.rows import Rows
from tiltyard.models import Network

EVALUATED_ROWS = 512


@dataclass(frozen=True)
class Holdout:
    """The model on the held-out rows: `correct` of `total`, mean loss without smoothing. A regression has 0 correct."""

    correct: int
    total: int
    loss: float


def evaluated(
    module: Network,
    rows: Rows,
    indices: Tensor,
    loss: LossKind,
    *,
    device: torch.device,
    at_once: int = EVALUATED_ROWS,
) -> Holdout | None:
    """A module on the rows at `indices`, `at_once` at a time, None when there is none; its mode is left as it was."""
    total = len(indices)
    if total == 0:
        return None
    plain = objective(loss, 0.0)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    summed = torch.zeros((), dtype=torch.float64, device=device)
    training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            for part in torch.split(indices, at_once):
                x, y = rows.take(part.long())
                answers = module(x)
                summed += plain(answers, y) * len(y)
                if loss is LossKind.CROSS_ENTROPY:
                    correct += (answers.argmax(1) == y).sum()
                elif rows.labelled:
                    right = (answers > 0) == (y > 0.5) if y.shape[1] == 1 else answers.argmax(1) == y.argmax(1)
                    correct += right.sum()
    finally:
        module.train(training)
    return Holdout(correct=int(correct), total=total, loss=float(summed) / total)
