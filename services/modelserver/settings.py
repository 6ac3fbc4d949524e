"""Settings of a standalone model server."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from services.modelserver import QUEUE_BYTES
from services.runtime.settings import ServiceSettings


class ModelServerSettings(ServiceSettings):
    """What a model server can be told beside what every service can."""

    service: ClassVar[str] = "modelserver"

    listen: str = "127.0.0.1:7405"
    model_repository: Path = Path("models")
    """The folder of models: NAME/spec.json and NAME/model.safetensors."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:[0-9]{1,3})$")] = "cpu"
    """Where models run; `auto` is CUDA where there is a device. The start fails where the named one is missing."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Cores that one batch is spread over; 0 means all."""
    model_memory_bytes: Annotated[int, Field(ge=0)] = 0
    """Most bytes of weights in memory, 0 for half of the device's: the least recently used model makes room."""
    queue_bytes: Annotated[int, Field(ge=1)] = QUEUE_BYTES
    """Most bytes of batches that wait; what comes beyond is answered RESOURCE_EXHAUSTED with the time to wait."""
    batch_delay_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """How long a small batch waits for others to run with; 0: batches are joined only while others run."""
