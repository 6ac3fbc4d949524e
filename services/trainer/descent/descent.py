"""Gradient descent on L = (1/N) * sum l(f(x_i), y_i): the loop itself, which resumes to the bit on a CPU."""

import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from services.trainer.config import LossKind, TrainingConfig
from services.trainer.descent.acceleration import Acceleration, is_out_of_memory
from services.trainer.descent.augmentation import shifted
from services.trainer.descent.batches import Batches, split
from services.trainer.descent.checkpoints import Checkpoint
from services.trainer.descent.form import BEST, CUDA_RANDOM, MODEL, check_form
from services.trainer.descent.holdout import EVALUATED_ROWS, Holdout, evaluated
from services.trainer.descent.meter import REPORT_INTERVAL_S, Diverged, Meter
from services.trainer.descent.objectives import kept_of_each, objective, optimizer_of
from services.trainer.descent.rows import Rows
from services.trainer.descent.workers import Workers
from services.trainer.progress import Progress
from services.trainer.schedule import Plan
from tiltyard.models import Network, build
from tiltyard.modelspec import ModelSpec

_KEPT_LOSSES = 4096
# Of the time, held-out rows may take so much, where patience does not ask for them after each epoch.
_EVALUATION_SHARE = 0.005


class Descent:
    """One training. `run` descends to the end or until `stop`; `state` and `restore` carry it over to another process.

    Seeds torch's global random state, which dropout draws from: one at a time in a process.
    """

    def __init__(
        self,
        *,
        spec: ModelSpec,
        loss: LossKind,
        config: TrainingConfig,
        rows: Rows,
        device: str = "cpu",
        warn: Callable[[str], None] = lambda _: None,
        acceleration: Acceleration | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._config = config
        self._loss = loss
        self._rows = rows
        self.device = torch.device(device)
        train, self._held_out = split(len(rows), share=config.holdout_share, seed=config.seed)
        self.batches = Batches(rows, train, size=config.batch_size, seed=config.seed)
        self.plan = Plan(rows=len(train), config=config)
        self.module: Network = build(spec, seed=config.seed).to(self.device)
        self._acceleration = acceleration or Acceleration.of(config, spec, self.device)
        self._forward = self._acceleration.forward(self.module)
        self._warn = warn
        self._workers = workers
        # Each batch goes through the device in this many pieces: more than one where memory does not hold it whole.
        self._pieces = 1
        self._evaluated_rows = EVALUATED_ROWS
        self._optimizer = optimizer_of(config, self.module)
        weights = torch.tensor(config.class_weights, device=self.device) if config.class_weights else None
        self._objective = objective(loss, config.label_smoothing, class_weights=weights)
        # Workers drop and shift each in its own way; the first one as a worker alone does.
        torch.manual_seed(config.seed + (workers.rank if workers else 0))
        self.step = 0
        self.holdout: Holdout | None = None
        self._best: dict[str, Tensor] = {}
        self._best_rank = (-math.inf, -math.inf)
        self._stale_epochs = 0
        self._stopping = False

    def stop(self) -> None:
        """Makes `run` return after the step that it is at; safe in a signal handler."""
        self._stopping = True

    def run(
        self,
        *,
        report: Callable[[Progress], None],
        checkpoint: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> bool:
        """Descends; True at the end, False when stopped before it.

        `report` gets a point every 100 ms at most, `checkpoint` is called at the configured intervals and when stopped,
        each between two updates. Raises Diverged at the first loss that is not finite, naming its step.
        """
        meter = Meter(self, report, clock)
        next_checkpoint, next_checkpoint_step = self._next_checkpoint(clock())
        next_evaluation = -math.inf
        module, losses = self.module, meter.losses
        accumulation, clip = self._config.accumulation, self._config.max_gradient_norm
        per_epoch, augment = self.plan.steps_per_epoch, self._config.augment
        optimizer, group = self._optimizer, self._optimizer.param_groups[0]
        parameters = list(module.parameters())
        module.train()
        while self.step < self.plan.total_steps and not self._patience_is_over():
            epoch, done = divmod(self.step, per_epoch)
            for x, y in self.batches.of_epoch(epoch, done):
                try:
                    losses.append(self._descend(shifted(x) if augment else x, y, done))
                except (RuntimeError, MemoryError) as error:
                    self._halve(error)
                    # What an update has gathered so far is lost with the piece that failed.
                    optimizer.zero_grad()
                    again = done % accumulation
                    self.step -= again
                    del losses[len(losses) - again :]
                    break
                done += 1
                self.step += 1
                if done % accumulation and done < per_epoch:
                    continue
                if self._workers is not None:
                    self._add_up(losses, 1 + (done - 1) % accumulation)
                if clip:
                    nn.utils.clip_grad_norm_(parameters, clip)
                group["lr"] = self.plan.learning_rate(self._updates_before(epoch, done))
                optimizer.step()
                optimizer.zero_grad()
                now = clock()
                if done == per_epoch and (self._config.patience or now >= next_evaluation or self._ends(epoch)):
                    self._end_epoch()
                    next_evaluation = now + max(REPORT_INTERVAL_S, (clock() - now) / _EVALUATION_SHARE)
                if now >= meter.due or self.step >= next_checkpoint_step or len(losses) >= _KEPT_LOSSES:
                    # A checkpoint is never of weights whose losses nobody has looked at.
                    meter.look(now)
                    if now >= next_checkpoint or self.step >= next_checkpoint_step:
                        checkpoint()
                        next_checkpoint, next_checkpoint_step = self._next_checkpoint(clock())
                if self._stopping:
                    meter.look(now)
                    checkpoint()
                    return False
        meter.look(clock())
        self._finish()
        return True

    def _next_checkpoint(self, now: float) -> tuple[float, float]:
        """When the one after this moment is due: by the clock, and by the steps done."""
        steps = self._config.checkpoint_interval_steps or math.inf
        return now + self._config.checkpoint_interval_s, self.step + steps

    def _descend(self, x: Tensor, y: Tensor, done: int) -> Tensor:
        """Adds the gradient of one batch to the parameters'; the batch's mean loss."""
        share = 1.0 if self._config.accumulation == 1 else self._backward_scale(done, len(y))
        if self._workers is not None:
            whole = len(y)
            x = torch.tensor_split(x, self._workers.size)[self._workers.rank]
            y = torch.tensor_split(y, self._workers.size)[self._workers.rank]
            return self._descend_part(x, y, share, len(y) / whole)
        if self._pieces > 1:
            return self._descend_part(x, y, share, 1.0)
        loss = self._objective(self._forward(x), y)
        (loss if share == 1.0 else loss * share).backward()  # type: ignore[no-untyped-call]  # torch's
        return loss.detach()

    def _descend_part(self, x: Tensor, y: Tensor, share: float, part: float) -> Tensor:
        """Like `_descend` for the part of a batch that is this worker's, which may be empty."""
        total = torch.zeros((), device=self.device)
        if len(y):
            size = -(-len(y) // self._pieces)
            for x_piece, y_piece in zip(torch.split(x, size), torch.split(y, size), strict=True):
                weight = part * len(y_piece) / len(y)
                loss = self._objective(self._forward(x_piece), y_piece)
                (loss * (share * weight)).backward()  # type: ignore[no-untyped-call]  # torch's
                total += loss.detach() * weight
        return total

    def _add_up(self, losses: list[Tensor], steps: int) -> None:
        """Adds the workers' gradients of one update, and what each knows of the losses of its steps."""
        assert self._workers is not None  # asked for by its caller
        gradients = []
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._workers.add_up([*gradients, *losses[len(losses) - steps :]])

    def _halve(self, error: Exception) -> None:
        """Lets batches through in pieces of half the rows. Raises the error when it is another, or one row too much."""
        self._expect_out_of_memory(error, halvable=self._pieces < self._config.batch_size)
        self._pieces = min(2 * self._pieces, self._config.batch_size)
        rows = -(-self._config.batch_size // self._pieces)
        self._warn(
            f"memory holds no {min(2 * rows, self._config.batch_size)} rows at step {self.step + 1}: each batch of "
            f"{self._config.batch_size} now goes through in pieces of {rows}, with the same updates"
        )

    def evaluate(self, module: Network) -> Holdout | None:
        """A module on the held-out rows, None when no row is held out; in halves where memory does not hold many."""
        while True:
            try:
                return evaluated(
                    module, self._rows, self._held_out, self._loss, device=self.device, at_once=self._evaluated_rows
                )
            except (RuntimeError, MemoryError) as error:
                self._expect_out_of_memory(error, halvable=self._evaluated_rows > 1)
                self._evaluated_rows //= 2
                self._warn(f"memory does not suffice to evaluate: {self._evaluated_rows} held-out rows now go at once")

    def _expect_out_of_memory(self, error: Exception, *, halvable: bool) -> None:
        """Raises the error when it is another, or when nothing is left to be halved."""
        if not halvable or not is_out_of_memory(error):
            raise error
        # What failed would hold its activations until the error is forgotten.
        traceback.clear_frames(error.__traceback__)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def state(self) -> Checkpoint:
        """Everything that `restore` needs, between two updates."""
        tensors = {f"{MODEL}{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"{BEST}{name}": tensor for name, tensor in self._best.items()}
        for index, values in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in values.items() if tensor is not None}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors[CUDA_RANDOM] = torch.cuda.get_rng_state(self.device)
        facts = {
            "step": self.step,
            "pieces": self._pieces,
            "stale_epochs": self._stale_epochs,
            "best_rank": list(self._best_rank) if self._best else None,
            "holdout": asdict(self.holdout) if self.holdout else None,
        }
        return Checkpoint(tensors, facts)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to where `state` was taken of a descent with the same arguments.

        Raises CheckpointUnreadable for a checkpoint of another form; then nothing has changed.
        """
        check_form(checkpoint, self._form(), total_steps=self.plan.total_steps)
        tensors, facts = checkpoint.tensors, checkpoint.facts
        self.module.load_state_dict(_named(tensors, MODEL))
        self._best = {name: tensor.to(self.device) for name, tensor in _named(tensors, BEST).items()}
        state: dict[int, dict[str, Tensor]] = {}
        parameters = self._optimizer.param_groups[0]["params"]
        for name, tensor in _named(tensors, "optimizer.").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = _laid_out_like(parameters[int(index)], tensor)
        self._optimizer.load_state_dict({"state": state, "param_groups": self._optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["random.cpu"])
        # A run that was on a CPU before has none.
        if self.device.type == "cuda" and CUDA_RANDOM in tensors:
            torch.cuda.set_rng_state(tensors[CUDA_RANDOM], self.device)
        self.step = facts["step"]
        if self._workers is not None and self._workers.rank:
            # The checkpoint is the first worker's; to go on with its random state is to drop what it drops.
            torch.manual_seed(self._config.seed + self._workers.rank + self.step * self._workers.size)
        self._pieces = facts.get("pieces", 1)
        self._stale_epochs = facts["stale_epochs"]
        self._best_rank = tuple(facts["best_rank"]) if facts["best_rank"] else (-math.inf, -math.inf)
        self.holdout = Holdout(**facts["holdout"]) if facts["holdout"] else None

    def _form(self) -> dict[str, Tensor]:
        """Tensors of the names, dtypes and shapes that `state` has after a step."""
        form = {f"{MODEL}{name}": tensor for name, tensor in self.module.state_dict().items()}
        form["random.cpu"] = torch.get_rng_state()
        for name, kept in kept_of_each(self._config).items():
            for index, parameter in enumerate(self.module.parameters()):
                form[f"optimizer.{index}.{name}"] = torch.empty_like(
                    parameter if kept.dim() else kept, dtype=kept.dtype, device="meta"
                )
        return form

    @property
    def learning_rate(self) -> float:
        """Of the last update."""
        return float(self._optimizer.param_groups[0]["lr"])

    def device_memory_bytes(self) -> int:
        """Device memory that torch holds; 0 on a CPU."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def _backward_scale(self, step: int, rows: int) -> float:
        """The share of an update's rows that this step of the epoch has, so that the update follows their mean."""
        size = self._config.batch_size * self._config.accumulation
        first = step // self._config.accumulation * size
        return rows / (min(self.plan.rows, first + size) - first)

    def _updates_before(self, epoch: int, done: int) -> int:
        """Updates before the one that `done` steps of this epoch lead to."""
        return epoch * self.plan.updates_per_epoch + -(-done // self._config.accumulation) - 1

    def _ends(self, epoch: int) -> bool:
        return epoch + 1 == self._config.epochs

    def _end_epoch(self) -> None:
        self.holdout = self.evaluate(self.module)
        if not self._config.patience or self.holdout is None:
            return
        if self._workers is not None:
            self.holdout = self._of_the_first(self._workers, self.holdout)
        rank = (float(self.holdout.correct), -self.holdout.loss)
        # A regression has no correct rows: there the loss alone is progress.
        better = rank[0] > self._best_rank[0] if self._rows.labelled else rank > self._best_rank
        self._stale_epochs = 0 if better else self._stale_epochs + 1
        if rank > self._best_rank:
            self._best_rank = rank
            self._best = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def _of_the_first(self, workers: Workers, holdout: Holdout) -> Holdout:
        """What the first worker found: on other processors a last bit may differ, and all have to stop together."""
        mine = 0.0 if workers.rank else 1.0
        told = torch.tensor([holdout.correct, holdout.loss], dtype=torch.float64, device=self.device) * mine
        workers.add_up([told])
        correct, loss = told.tolist()
        return replace(holdout, correct=int(correct), loss=loss)

    def _patience_is_over(self) -> bool:
        return bool(self._config.patience) and self._stale_epochs >= self._config.patience

    def _finish(self) -> None:
        if self._best:
            self.module.load_state_dict(self._best)
            self.holdout = self.evaluate(self.module)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.module.state_dict().values()):
            raise Diverged(f"the weights are not finite after step {self.step}: try a smaller learning rate")


def _laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """What belongs to a parameter, each value in the place of its own: fused optimisers go by places."""
    return torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
