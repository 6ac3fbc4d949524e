"""`python -m services.trainer.child RUN_DIR PARENT_PID`: one training in a process of its own.

Says what happens as JSON lines on standard output: `progress`, `warning`, and at the end `trained` or `broken`. Ends
without a last word when it is told to stop (SIGTERM, after a checkpoint) or dies; started again, it goes on.
"""

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.modelserver.sandbox import die_with_parent
from services.runtime.errors import InvalidArgument
from services.trainer import runfolder
from services.trainer.datareport import DataReport, report_on
from services.trainer.fulldisk import write_when_there_is_room
from services.trainer.localdata import class_count, examine, is_large, mark_of
from services.trainer.progress import Progress
from tiltyard.datasets import Dataset

Write = Callable[[Callable[[], None]], bool]
Say = Callable[[dict[str, Any]], None]
STOPPED_STATUS = 3


class SelfCheckFailed(Exception):
    """The model's file does not do what the trained module did."""


def main() -> None:
    """Train what RUN_DIR orders."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    # What libraries print must not end up between the lines.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(event: dict[str, Any]) -> None:
        lines.write(json.dumps(event) + "\n")

    with runfolder.alone(folder):
        result = runfolder.read_result(folder)
        status = 0
        if result is not None:
            say(result)
        else:
            status = _train(folder, say)
    lines.flush()
    # Nothing is left to be tidied up, and torch's own way out takes its time.
    os._exit(status)


def _train(folder: Path, say: Say) -> int:
    order = runfolder.read_order(folder)
    if mark_of(order.dataset) != order.dataset_mark:
        say({"event": "broken", "error": "the dataset has changed since the training was started"})
        return 1
    # Imported here so that the parent's death is noticed from the first moment on.
    import torch

    from services.trainer.acceleration import allow_tf32
    from services.trainer.checkpoints import CheckpointUnreadable, load_checkpoint, save_checkpoint
    from services.trainer.descent import Descent, Diverged
    from services.trainer.rows import Rows

    torch.set_num_threads(order.threads)
    allow_tf32(order.config.tf32)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stopped.set())

    def warn(text: str) -> None:
        say({"event": "warning", "text": text})

    def write(what: Callable[[], None]) -> bool:
        return write_when_there_is_room(what, warn=warn, wait=stopped.wait)

    dataset = Dataset.open(order.dataset)
    try:
        say({"event": "data", "report": _data_report(folder, order, dataset, write).to_json()})
    except InvalidArgument as error:
        say({"event": "broken", "error": f"dataset: {error.message}"})
        return 1
    rows = Rows(dataset.x, dataset.y, loss=order.loss, outputs=order.spec.outputs, device=order.device)
    descent = Descent(spec=order.spec, loss=order.loss, config=order.config, rows=rows, device=order.device, warn=warn)

    def stop(_number: int, _frame: object) -> None:
        stopped.set()
        descent.stop()

    signal.signal(signal.SIGTERM, stop)
    if stopped.is_set():
        return STOPPED_STATUS

    def keep() -> None:
        try:
            write(lambda: save_checkpoint(runfolder.checkpoint(folder), descent.state()))
        except OSError as error:
            warn(f"no checkpoint at step {descent.step}: {error}")

    def report(point: Progress) -> None:
        say({"event": "progress", "point": point.to_json()})

    try:
        found = load_checkpoint(runfolder.checkpoint(folder))
        if found is not None:
            descent.restore(found)
    except CheckpointUnreadable as error:
        warn(f"begins anew: {error}")
    try:
        if not descent.run(report=report, checkpoint=keep):
            return STOPPED_STATUS
        digests: list[str] = []
        if not write(lambda: digests.append(_export(folder, descent))):
            return STOPPED_STATUS
        result = {"event": "trained", "model_digest": digests[-1]}
        if not write(lambda: runfolder.write_result(folder, result)):
            return STOPPED_STATUS
    except (Diverged, SelfCheckFailed) as error:
        say({"event": "broken", "error": str(error)})
        return 1
    except (RuntimeError, OSError) as error:
        # Out of memory, a full disk: another attempt would meet it again.
        say({"event": "broken", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
        return 1
    say(result)
    return 0


def _data_report(folder: Path, order: runfolder.Order, dataset: Dataset, write: Write) -> DataReport:
    """Looks through the dataset when the training begins; one that resumes has it in its folder."""
    kept = runfolder.data_report(folder)
    if kept.exists():
        return DataReport.from_json(json.loads(kept.read_text()))
    if is_large(order.dataset):
        examine(order.dataset, order.spec, order.loss)
    report = report_on(dataset, classes=class_count(dataset, order.spec, order.loss))
    write(lambda: runfolder.write_json(kept, report.to_json()))
    return report


def _export(folder: Path, descent: Any) -> str:
    """Writes the model once, reads it back, and lets it stand only if it answers the held-out rows as before."""
    from tiltyard.models import load_model, save_weights

    draft = folder / f".{runfolder.MODEL_FILE}.unchecked"
    save_weights(descent.module, draft)
    before = descent.evaluate(descent.module)
    after = descent.evaluate(load_model(descent.module.spec, draft, device=str(descent.device)))
    if before != after:
        raise SelfCheckFailed(f"the model's file answers otherwise than the trained model: {after}, not {before}")
    draft.replace(folder / runfolder.MODEL_FILE)
    with (folder / runfolder.MODEL_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
