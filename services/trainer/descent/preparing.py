"""What a run does with its dataset before the first step: packs it, looks through it, says how far it is."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from services.trainer import runfolder
from services.trainer.datareport import DataReport, report_on
from services.trainer.ends import Stage
from services.trainer.fulldisk import Room, write_when_there_is_room
from services.trainer.localdata import class_count, examine, is_large
from services.trainer.packed import PackedCopies
from services.trainer.runfolder import Order, Say
from tiltyard.datasets import Dataset

_SAID_EVERY_S = 0.25


def packed(
    order: Order, say: Say, keep: Callable[[AbstractContextManager[None]], None], wait: Callable[[float], bool]
) -> bool:
    """Has the order's dataset in its place, and gives to `keep` what keeps it there; False when told to stop.

    Waits while the disk is full. Raises OSError for other trouble, and DatasetError for what is no dataset.
    """
    if order.source is None:
        return True
    copies, source = PackedCopies(order.data, max_bytes=order.packed_bytes), order.source
    room = Room(order.data)

    def pack() -> None:
        tell = _teller(say, Stage.PACKING)
        room.attempt(lambda: keep(copies.held(order.dataset, source, order.loss, progress=tell)))

    return write_when_there_is_room(pack, warn=lambda text: say({"event": "warning", "text": text}), wait=wait)


def looked_through(
    folder: Path, order: Order, dataset: Dataset, say: Say, stopped: threading.Event
) -> DataReport | None:
    """What is in the dataset, found out when the training begins; one that resumes has it in its folder.

    None where it was told to stop while the disk was full. Raises InvalidArgument for a dataset that does not fit.
    """
    kept = runfolder.data_report(folder)
    if (known := _known(kept)) is not None:
        return known
    tell = _teller(say, Stage.EXAMINING, total_rows=len(dataset))
    tell(0)
    # Who asked for the training has waited for the rest.
    if is_large(order.dataset) or order.source is not None:
        examine(order.dataset, order.spec, order.loss)
    classes = class_count(dataset, order.spec, order.loss)
    report: DataReport | None = None

    def look() -> None:
        nonlocal report
        report = report or report_on(dataset, classes=classes, scratch=folder, progress=tell)
        runfolder.write_json(kept, report.to_json())

    write_when_there_is_room(look, warn=lambda text: say({"event": "warning", "text": text}), wait=stopped.wait)
    return report


def _known(kept: Path) -> DataReport | None:
    """What was written down of the dataset; None where there is nothing, or what another version wrote."""
    try:
        return DataReport.from_json(json.loads(kept.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _teller(say: Say, stage: Stage, *, total_rows: int = 0) -> Callable[[int], None]:
    """Says how many rows are done, a few times a second at most."""
    next_at = 0.0

    def tell(rows: int) -> None:
        nonlocal next_at
        now = time.monotonic()
        if now >= next_at:
            next_at = now + _SAID_EVERY_S
            say({"event": "preparing", "stage": stage, "rows": rows, "total_rows": total_rows})

    return tell
