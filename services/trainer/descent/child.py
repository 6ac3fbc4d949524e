"""`python -m services.trainer.descent.child RUN_DIR PARENT_PID`: one training in a process of its own.

Says what happens as JSON lines on standard output: `preparing`, `data`, `progress`, `warning`, and at the end `trained`
or `broken`. Ends without a last word when it is told to stop (SIGTERM, after a checkpoint) or dies; started again, it
goes on.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from services.modelserver.sandbox import die_with_parent
from services.runtime.errors import InvalidArgument
from services.trainer import runfolder
from services.trainer.config import Executor
from services.trainer.descent.preparing import looked_through, packed
from services.trainer.leftovers import end_with_me
from services.trainer.runfolder import Say
from tiltyard.datasets import Dataset, DatasetError


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
        runfolder.remove_drafts(folder)
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
    stopped = threading.Event()
    # Packing may be ended anywhere: it leaves nothing, and nothing of it is worth keeping.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(runfolder.STOPPED_STATUS))
    using = ExitStack()  # never left: a packed copy is held until the last word
    try:
        if not packed(order, say, using.enter_context, stopped.wait):
            return runfolder.STOPPED_STATUS
        signal.signal(signal.SIGTERM, lambda _number, _frame: stopped.set())
        dataset = Dataset.open(order.dataset)
        report = looked_through(folder, order, dataset, say, stopped)
    except InvalidArgument as error:
        say({"event": "broken", "error": f"dataset: {error.message}"})
        return 1
    except DatasetError as error:
        say({"event": "broken", "error": f"dataset: is not a dataset: {error}"})
        return 1
    if report is None:
        return runfolder.STOPPED_STATUS
    say({"event": "data", "report": report.to_json()})
    if order.config.executor is Executor.RAY:
        # Workers save what they have by the clock only; to end with this process is all that they are told. Not by a
        # handler: Python would run it when Ray's own code comes back, seconds later.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_me(folder)
        try:
            from services.trainer.descent.ray_workers import train_with_ray
        except ImportError as error:
            say({"event": "broken", "error": f"executor RAY needs pip install 'tiltyard[ray]': {error}"})
            return 1
        return train_with_ray(folder, say)
    # Imported here so that the parent's death is noticed from the first moment on.
    from services.trainer.descent.run import train

    def on_stop(stop: Callable[[], None]) -> None:
        def both(_number: int, _frame: object) -> None:
            stopped.set()
            stop()

        signal.signal(signal.SIGTERM, both)
        if stopped.is_set():
            stop()

    return train(folder, say=say, stopped=stopped, on_stop=on_stop)


if __name__ == "__main__":
    main()
