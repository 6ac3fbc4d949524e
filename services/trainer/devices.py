"""Which devices this node trains on, found out without loading torch into the service."""

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

_COUNT = "import json, torch; print(json.dumps(torch.cuda.device_count() if torch.cuda.is_available() else 0))"

_log = structlog.get_logger("tiltyard.trainer")


class NoSuchDevice(Exception):
    """The settings name a device that this machine does not have."""


async def find_devices(setting: str) -> Sequence[str]:
    """The devices of a setting (`auto`, `cpu`, `cuda`, `cuda:N`), as `cpu` or `cuda:N`. Raises NoSuchDevice."""
    if setting == "cpu" or (setting == "auto" and not _has_driver()):
        return ["cpu"]
    cuda = [f"cuda:{index}" for index in range(await _count_cuda())]
    if setting == "auto":
        return cuda or ["cpu"]
    found = cuda if setting == "cuda" else [device for device in cuda if device == setting]
    if not found:
        raise NoSuchDevice(f"TILTYARD_DEVICE: torch finds {', '.join(cuda) or 'no CUDA device'} here, not {setting}")
    return found


def _has_driver() -> bool:
    return Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


async def _count_cuda() -> int:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _COUNT, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        _log.error("torch could not be asked for CUDA devices", status=process.returncode)
        return 0
    return int(json.loads(output))
