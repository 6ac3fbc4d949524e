"""Which devices a node trains on, by TILTYARD_DEVICE and what the machine has."""

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from services.trainer import devices
from services.trainer.devices import NoSuchDevice, find_devices
from services.trainer.settings import TrainerSettings


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many CUDA devices there are; asking for them loads torch, so it is a machine's answer that is faked."""

    def has(count: int) -> None:
        async def answer() -> int:
            return count

        monkeypatch.setattr(devices, "_has_driver", lambda: count > 0)
        monkeypatch.setattr(devices, "_count_cuda", answer)

    return has


async def test_auto_takes_every_cuda_device_or_the_cpu(machine: Callable[[int], None]) -> None:
    machine(0)
    assert await find_devices("auto") == ["cpu"]
    machine(2)
    assert await find_devices("auto") == ["cuda:0", "cuda:1"]
    assert await find_devices("cpu") == ["cpu"]


async def test_named_devices_are_taken_and_missing_ones_refused_with_what_there_is(
    machine: Callable[[int], None],
) -> None:
    machine(2)
    assert await find_devices("cuda") == ["cuda:0", "cuda:1"]
    assert await find_devices("cuda:1") == ["cuda:1"]
    with pytest.raises(NoSuchDevice, match="torch finds cuda:0, cuda:1 here, not cuda:7"):
        await find_devices("cuda:7")
    machine(0)
    with pytest.raises(NoSuchDevice, match="torch finds no CUDA device here, not cuda"):
        await find_devices("cuda")


def test_the_device_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILTYARD_DEVICE", "cuda:3")
    assert TrainerSettings.load().device == "cuda:3"
    monkeypatch.setenv("TILTYARD_DEVICE", "tpu")
    with pytest.raises((ValidationError, SystemExit)):
        TrainerSettings.load()
