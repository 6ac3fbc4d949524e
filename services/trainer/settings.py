"""Settings of a training node."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from services.runtime.settings import ServiceSettings
from services.trainer.localdata import DEFAULT_PACKED_BYTES
from tiltyard.endpoints import check_address


class TrainerSettings(ServiceSettings):
    """What a training node can be told beside what every service can."""

    service: ClassVar[str] = "trainer"

    listen: str = "127.0.0.1:7403"
    registry: str = ""
    """Address of the registry; empty for a node that trains outside of tasks only."""
    data_dir: Path = Path()
    """The folder of local datasets. Default: `{state_dir}/data`."""
    packed_bytes: Annotated[int, Field(ge=0)] = DEFAULT_PACKED_BYTES
    """Most bytes of copies below `{data_dir}/.packed`, which datasets of other kinds than safetensors are packed into.
    The least recently used go first, and are made again where they are needed; those in use stay while they are."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:[0-9]{1,3})$")] = "auto"
    """`cuda` is every CUDA device, `auto` the same where there is one and `cpu` elsewhere."""
    max_runs: Annotated[int, Field(ge=1, le=1000)] = 1
    """Trainings at once on each device."""
    model_memory_bytes: Annotated[int, Field(ge=0)] = 0
    """Most bytes of served weights in memory, 0 for half of the device's: the least recently used model makes room."""
    keep_models_days: Annotated[int, Field(ge=0, le=36500)] = 0
    """How long the model of a training, what lies beside it and its history are kept after the training's end; 0 means
    for good. Then the training stays in lists, with the last point of its history. Nothing goes on the first day after
    the clock was put forward, or the node was off for longer than a day. A submitted model is at the registry, too; a
    task that allows nodes' own endpoints needs it here until it closes."""
    training_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Cores that one training is spread over; 0 means all."""

    @model_validator(mode="before")
    @classmethod
    def _fill_data_dir(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("data_dir"):
            return values
        state_dir = Path(values.get("state_dir") or cls.model_fields["state_dir"].default)
        return {**values, "data_dir": state_dir / "data"}

    @field_validator("registry")
    @classmethod
    def _empty_or_address(cls, value: str) -> str:
        return value and check_address(value)

    @property
    def keep(self) -> timedelta:
        """How long what a training leaves is kept; nothing means for good."""
        return timedelta(days=self.keep_models_days)

    @property
    def threads(self) -> int:
        """Cores of one training."""
        return self.training_threads or len(os.sched_getaffinity(0))
