"""From a model and a dataset to a finding: structure first, then rows through a model server, each fault confirmed."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from services.validator.assignments import Order
from services.validator.runs import Fault, Finding, Progress
from tiltyard.modelfile import check_model_file
from tiltyard.modelspec import FaultCode, ModelFault

_LOST_ATTEMPTS = 3
MAX_PARAMETERS = 1 << 40

_FAULT_OF = {
    # The registry lets no model over the task's limit come this far; the file is not what was registered.
    FaultCode.TOO_LARGE: Fault.BAD_FORMAT,
    FaultCode.BAD_FORMAT: Fault.BAD_FORMAT,
    FaultCode.SHAPE_MISMATCH: Fault.SHAPE_MISMATCH,
}
# More cores hold more batches at once: a model must not fail at one validator for that, and pass at another.
_OF_MANY_CORES = (Fault.OUT_OF_MEMORY, Fault.CRASHED)


class ModelFailed(Exception):
    """An attempt ended by what looks like the model's fault."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(f"{fault}: {detail}")
        self.fault = fault
        self.detail = detail

    @classmethod
    def by(cls, fault: ModelFault) -> "ModelFailed":
        """A weights file that is not of its spec."""
        return cls(_FAULT_OF[fault.code], fault.detail)


class ServerLost(Exception):
    """The model server went away through no fault of the model."""


class CannotEvaluate(Exception):
    """The validator or the task stands in the way, not the model; the text says how."""


@dataclass(frozen=True)
class Job:
    """One evaluation: the order and the files that it names, their digests checked.

    With `one_core` no two batches run at once.
    """

    order: Order
    dataset: Path
    model: Path
    one_core: bool = False


class Attempts(Protocol):
    """Runs every row of a job through a fresh model server."""

    async def attempt(self, job: Job, progress: Progress) -> Finding:
        """The counts. Raises ModelFailed, ServerLost and CannotEvaluate; leaves no process behind."""
        ...


class NodeServers(Protocol):
    """The training nodes' own servers, asked where a model cannot be evaluated here."""

    def may_ask(self, order: Order) -> bool:
        """Whether task, node and this validator's operator agree to it."""
        ...

    async def evaluate(self, order: Order, dataset: Path, progress: Progress) -> Finding:
        """The counts, marked as the node's own. Raises CannotEvaluate."""
        ...


async def find(job: Job, attempts: Attempts, progress: Progress) -> Finding:
    """What is to be said of the job's model.

    A fault in an attempt is reported only when a second, fresh server ends in a fault too; what several batches at once
    may have brought about, only when it does so with one at a time, as on the smallest machine. Raises CannotEvaluate.
    """
    try:
        # In a thread: a graph may have a million fields, and leases are to be renewed meanwhile.
        await asyncio.to_thread(_check_structure, job)
    except ModelFault as fault:
        failed = ModelFailed.by(fault)
        return Finding(fault=failed.fault, detail=failed.detail)
    suspected = False
    lost = 0
    while True:
        try:
            return await attempts.attempt(job, progress)
        except ModelFailed as failed:
            if suspected:
                return Finding(fault=failed.fault, detail=failed.detail)
            suspected = True
            job = replace(job, one_core=failed.fault in _OF_MANY_CORES)
        except ServerLost as error:
            lost += 1
            if lost == _LOST_ATTEMPTS:
                raise CannotEvaluate(f"no model server stays alive: {error}") from error


def _check_structure(job: Job) -> None:
    size_bytes = job.model.stat().st_size
    with job.model.open("rb") as file:

        def read(offset: int, n: int) -> bytes:
            file.seek(offset)
            return file.read(n)

        # The limits are the registry's to check; the file is the one that it has checked.
        check_model_file(read, size_bytes, job.order.spec, max_bytes=size_bytes, max_parameters=MAX_PARAMETERS)
