"""One run from its folder to its model: descends, keeps checkpoints, exports; alone, or in each of n workers."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from services.trainer import runfolder
from services.trainer.descent.acceleration import allow_tf32
from services.trainer.descent.checkpoints import Checkpoint, CheckpointUnreadable, load_checkpoint
from services.trainer.descent.descent import Descent
from services.trainer.descent.keeper import CheckpointKeeper
from services.trainer.descent.meter import Diverged
from services.trainer.descent.rows import Rows
from services.trainer.descent.workers import Workers
from services.trainer.fulldisk import write_when_there_is_room
from services.trainer.progress import Progress
from services.trainer.runfolder import STOPPED_STATUS, Say
from services.trainer.schedule import completed
from tiltyard.datasets import Dataset
from tiltyard.models import Network, load_model, load_weights, save_weights
from tiltyard.modelspec import ModelFault


class SelfCheckFailed(Exception):
    """The model's file does not do what the trained module did."""


class BaseModelUnusable(Exception):
    """The base model's file is not the one that it should be."""


def train(
    folder: Path,
    *,
    say: Say,
    stopped: threading.Event,
    on_stop: Callable[[Callable[[], None]], None] = lambda _: None,
    workers: Workers | None = None,
    sharing: int = 1,
    device: str = "",
) -> int:
    """Trains what the folder orders; an exit status. `on_stop` is told what to call when the run is to stop.

    Of several `workers`, all of which see the folder, the first one speaks and writes; so many are `sharing` the
    machine's processors and memory. `device` is the order's where it is not given. Raises WorkerLost.
    """
    order = runfolder.read_order(folder)
    speaks = workers is None or workers.rank == 0
    device = device or order.device
    torch.set_num_threads(max(1, order.threads // sharing))
    allow_tf32(order.config.tf32)

    def warn(text: str) -> None:
        say({"event": "warning", "text": text})

    def write(what: Callable[[], None]) -> bool:
        return write_when_there_is_room(what, warn=warn, wait=stopped.wait)

    dataset = Dataset.open(order.dataset)
    config = completed(order.config, rows=len(dataset))
    rows = Rows(dataset.x, dataset.y, loss=order.loss, outputs=order.spec.outputs, device=device, sharing=sharing)
    descent = Descent(
        spec=order.spec, loss=order.loss, config=config, rows=rows, device=device, warn=warn, workers=workers
    )
    on_stop(descent.stop)

    # Of several workers the others would wait for this one's disk, and give up: they go on without a checkpoint.
    persist = write if workers is None else _once
    keeper = CheckpointKeeper(runfolder.checkpoint(folder), persist=persist, warn=warn)

    def keep() -> None:
        if speaks:
            keeper.keep(descent.state())

    def report(point: Progress) -> None:
        if speaks:
            say({"event": "progress", "point": point.to_json()})
        keeper.look()

    try:
        if not _restored(descent, runfolder.checkpoint(folder), warn, workers) and order.base_model is not None:
            _begin_with(descent.module, order.base_model)
        with keeper:
            if not descent.run(report=report, checkpoint=keep):
                keeper.settle()
                return STOPPED_STATUS
        if not speaks:
            return 0
        digests: list[str] = []
        if not write(lambda: digests.append(_export(folder, descent))):
            return STOPPED_STATUS
        result = {"event": "trained", "model_digest": digests[-1]}
        if not write(lambda: runfolder.write_result(folder, result)):
            return STOPPED_STATUS
    except (Diverged, SelfCheckFailed, BaseModelUnusable) as error:
        say({"event": "broken", "error": str(error)})
        return 1
    except (RuntimeError, OSError) as error:
        # Out of memory, a broken device: another attempt would meet it again.
        say({"event": "broken", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
        return 1
    say(result)
    return 0


def _once(write: Callable[[], None]) -> bool:
    write()
    return True


def _restored(descent: Descent, path: Path, warn: Callable[[str], None], workers: Workers | None) -> bool:
    """Whether a descent goes on from a checkpoint; one that is of no use is told, and changes nothing.

    Several workers go on if all of them can: else their gradients would be those of different steps.
    """
    found, trouble = None, ""
    try:
        found = load_checkpoint(path)
    except CheckpointUnreadable as error:
        trouble = str(error)
    if workers is not None and not _all_have(found, workers, descent.device) and found is not None:
        found, trouble = None, "another worker has no checkpoint that it can read"
    try:
        if found is not None:
            descent.restore(found)
    except CheckpointUnreadable as error:
        found, trouble = None, str(error)
    if trouble:
        warn(f"begins anew: {trouble}")
    return found is not None


def _all_have(found: Checkpoint | None, workers: Workers, device: torch.device) -> bool:
    readers = torch.tensor([0.0 if found is None else 1.0], device=device)
    workers.add_up([readers])
    return int(readers) == workers.size


def _begin_with(module: Network, base_model: Path) -> None:
    """Puts the base model's weights into a module. Raises BaseModelUnusable, and the module is as before."""
    try:
        if _digest(base_model) != base_model.stem:
            raise BaseModelUnusable(f"the base model's file is no longer artifacts/{base_model.stem}")
        load_weights(module, base_model)
    except (ModelFault, OSError) as error:
        raise BaseModelUnusable(f"the base model cannot be loaded: {error}") from error


def _export(folder: Path, descent: Descent) -> str:
    """Writes the model once, reads it back, and lets it stand only if it answers the held-out rows as before."""
    draft = folder / f".{runfolder.MODEL_FILE}.unchecked"
    save_weights(descent.module, draft)
    # The new one first: if memory holds few rows beside both, as few go at once through the other.
    after = descent.evaluate(load_model(descent.module.spec, draft, device=str(descent.device)))
    before = descent.evaluate(descent.module)
    if before != after:
        raise SelfCheckFailed(f"the model's file answers otherwise than the trained model: {after}, not {before}")
    draft.replace(folder / runfolder.MODEL_FILE)
    return _digest(folder / runfolder.MODEL_FILE)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
