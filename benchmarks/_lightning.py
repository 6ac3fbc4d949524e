"""PyTorch Lightning training the digits' mlp, in its own environment: `python _lightning.py DATA.npz CONFIG.json`.

Each line on standard input is one training; the answer is its steps a second. All that Lightning does beside training
(progress bar, logger, checkpoints, validation) is switched off, and its loader gathers whole batches.
"""

import json
import logging
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset


class Classifier(lightning.LightningModule):
    """The mlp of benchmarks.training with its optimiser, objective and learning rates."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.loss_of = nn.CrossEntropyLoss(label_smoothing=config["label_smoothing"])
        self.begun = self.ended = 0.0

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """The mean loss of one batch."""
        x, y = batch
        loss: Tensor = self.loss_of(self.network(x.to(torch.float32) * (1 / 16)), y)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, with a warm-up and a cosine at each step."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.config["learning_rate"], weight_decay=self.config["weight_decay"], fused=True
        )
        steps = self.config["steps"]
        warm = int(self.config["warmup"] * steps)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Its own setting up is not counted."""
        self.begun = time.perf_counter()

    def on_train_end(self) -> None:
        """After the last step."""
        self.ended = time.perf_counter()


def main(data: Path, config: dict[str, Any]) -> None:
    """Trains once for each line that comes in."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(config["threads"])
    with np.load(data) as arrays:
        rows = TensorDataset(torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]))
    batches = BatchSampler(RandomSampler(rows), batch_size=config["batch_size"], drop_last=False)
    for _ in sys.stdin:
        module = Classifier(config)
        trainer = lightning.Trainer(
            max_steps=config["steps"],
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, DataLoader(rows, sampler=batches, batch_size=None))
        print(trainer.global_step / (module.ended - module.begun), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
