"""The life of a child that serves one model: confine, load, serve on a Unix socket until it is killed."""

import asyncio
import importlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from services.modelserver import sandbox
from services.modelserver.models import MAX_MESSAGE_BYTES, Models
from services.modelserver.servicer import mounts
from services.modelserver.spawn import EXIT_CRASHED, EXIT_FAULT, EXIT_OUT_OF_MEMORY, LOG_FILE, MODEL_NAME
from services.runtime.server import ArenaServer
from services.runtime.telemetry import configure_logging
from tiltyard.modelspec import ModelFault

# What a child would otherwise import at its first batch.
_LATE_IMPORTS = ("asyncio.runners", "safetensors.torch", "numpy", "encodings.idna")


@dataclass(frozen=True)
class Order:
    """What to serve and within which limits; see `spawn.Limits`."""

    id: int
    folder: str
    socket: str
    memory_bytes: int
    cpu_seconds: int
    threads: int


def warm_up() -> None:
    """Import all that a child needs, in a process that may still fork."""
    for module in _LATE_IMPORTS:
        importlib.import_module(module)


def live(order: Order, report: int, zygote: int) -> int:
    """Serve the order's model until killed; the answer is an exit code. One line goes to the descriptor `report`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.chdir(order.folder)
    log = os.open(LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    os.dup2(log, 2)
    os.close(log)
    configure_logging("modelserver", "warning", "json")
    sandbox.limit_files()
    sandbox.limit_memory(order.memory_bytes)
    sandbox.limit_cpu(order.cpu_seconds)
    confinement = sandbox.confine()
    # Taking a user namespace may have cleared it.
    sandbox.die_with_parent(zygote)
    try:
        return asyncio.run(_serve(order, report, confinement))
    except MemoryError:
        return EXIT_OUT_OF_MEMORY


async def _serve(order: Order, report: int, confinement: sandbox.Confinement) -> int:
    models = Models(
        threads=order.threads or len(os.sched_getaffinity(0)), on_out_of_memory=lambda: os._exit(EXIT_OUT_OF_MEMORY)
    )
    try:
        await models.load_folder(MODEL_NAME, Path(order.folder))
    except ModelFault as fault:
        _say(report, {"event": "fault", "code": fault.code.value, "detail": fault.detail})
        return EXIT_FAULT
    server = ArenaServer(
        f"unix:{order.socket}", mounts(models), authenticator=None, max_message_bytes=MAX_MESSAGE_BYTES
    )
    await server.start()
    await server.set_serving(True)
    _say(
        report,
        {
            "event": "ready",
            "network": confinement.network,
            "programs": confinement.programs,
            "threads": torch.get_num_threads(),
        },
    )
    os.close(report)
    await asyncio.Event().wait()
    return EXIT_CRASHED


def _say(report: int, line: dict[str, object]) -> None:
    os.write(report, json.dumps(line).encode() + b"\n")
