"""Settings of a standalone model server."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from services.runtime.settings import ServiceSettings


class ModelServerSettings(ServiceSettings):
    """What a model server can be told beside what every service can."""

    service: ClassVar[str] = "modelserver"

    listen: str = "127.0.0.1:7405"
    model_repository: Path = Path("models")
    """The folder of models: NAME/spec.json and NAME/model.safetensors."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Cores that one batch is spread over; 0 means all."""
