"""The life of a child that serves one model: confine, load, serve on a Unix socket until it is killed."""

import importlib
import importlib.util
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from services.modelserver import sandbox
from services.modelserver.lane import Lane
from services.modelserver.models import Models
from services.modelserver.spawn import (
    EXIT_CRASHED,
    EXIT_FAULT,
    EXIT_OUT_OF_MEMORY,
    EXIT_UNCONFINED,
    EXIT_UNREADABLE,
    LOG_FILE,
    MODEL_NAME,
    SOCKET_FILE,
)
from services.runtime.telemetry import configure_logging
from tiltyard.modelspec import ModelFault

# What a child would otherwise import at its first batch.
_LATE_IMPORTS = ("safetensors.torch", "numpy", "encodings.idna")

_MAX_DETAIL_CHARS = 1000


@dataclass(frozen=True)
class Order:
    """What to serve and within which limits; see `spawn.Limits`."""

    id: int
    folder: str
    memory_bytes: int
    cpu_seconds: int
    threads: int


def warm_up() -> None:
    """Import all that a child needs, in a process that may still fork."""
    for module in _LATE_IMPORTS:
        importlib.import_module(module)


def rehearse() -> None:
    """Do once what a child may read files for after it is confined: compute, and import what is not imported here."""
    with torch.inference_mode():
        images = torch.ones(1, 1, 8, 8)
        torch.nn.functional.linear(torch.nn.functional.conv2d(images, torch.ones(1, 1, 3, 3)), torch.ones(4, 6))
    if importlib.util.find_spec("onnxruntime") is not None:
        importlib.import_module("onnxruntime")


def live(order: Order, report: int, zygote: int, readable: Sequence[str] | None, rehearsed: sandbox.Confinement) -> int:
    """Serve the order's model until killed; the answer is an exit code. One line goes to the descriptor `report`.

    Of other files it reads what is `readable`, see `sandbox.confine`. It serves only if it is confined as `rehearsed`:
    the operator was told of that.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    cores = order.threads or len(os.sched_getaffinity(0))
    try:
        confined = _give_up(order, zygote, readable)
    except OSError as error:
        # Nothing of the model has been looked at.
        os.write(2, f"{error}\n".encode())
        return EXIT_UNCONFINED
    if confined != rehearsed:
        os.write(2, f"it is {confined}\n".encode())
        return EXIT_UNCONFINED
    try:
        return _serve(order, cores, report)
    except MemoryError:
        return EXIT_OUT_OF_MEMORY


def _give_up(order: Order, zygote: int, readable: Sequence[str] | None) -> sandbox.Confinement:
    """Take the limits, the log and the confinement that the rest of this process's life has. Raises OSError."""
    os.chdir(order.folder)
    log = os.open(LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    os.dup2(log, 2)
    os.close(log)
    configure_logging("modelserver", "warning", "json")
    sandbox.limit_files()
    # No more for many cores, whose batches need more: what passes there is to pass on one core elsewhere.
    sandbox.limit_memory(order.memory_bytes)
    sandbox.limit_cpu(order.cpu_seconds)
    return sandbox.confine(zygote, readable)


def _serve(order: Order, cores: int, report: int) -> int:
    models = Models(threads=1, memory_bytes=order.memory_bytes, on_out_of_memory=lambda: os._exit(EXIT_OUT_OF_MEMORY))
    try:
        models.load_folder_here(MODEL_NAME, Path(order.folder))
    except ModelFault as fault:
        if isinstance(fault.__cause__, OSError):
            # The disk's fault, or this machine's.
            os.write(2, f"{fault.detail}\n".encode())
            return EXIT_UNREADABLE
        _say(report, {"event": "fault", "code": fault.code.value, "detail": fault.detail[:_MAX_DETAIL_CHARS]})
        return EXIT_FAULT
    lane = Lane(SOCKET_FILE, models, cores=cores)
    lane.serve()
    _say(report, {"event": "ready"})
    os.close(report)
    lane.wait()
    return EXIT_CRASHED


def _say(report: int, line: dict[str, object]) -> None:
    os.write(report, json.dumps(line).encode() + b"\n")
