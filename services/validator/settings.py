"""Settings of a validator."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from services.runtime.settings import ServiceSettings

GIB = 1024**3


class ValidatorSettings(ServiceSettings):
    """What a validator can be told beside what every service can."""

    service: ClassVar[str] = "validator"

    listen: str = "127.0.0.1:7404"
    registry: Annotated[str, Field(min_length=1)]
    """Address of the registry, `HOST:PORT` or `unix:/PATH`."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 1
    """Evaluations at once."""
    stop_after: Annotated[int, Field(ge=0)] = 0
    """Drain once so many runs have ended; 0 means never."""
    cache_bytes: Annotated[int, Field(ge=1)] = 20 * GIB
    """Most bytes of datasets and models kept."""
    device: Literal["cpu", "auto", "cuda"] = "auto"
    """Where models run."""
    model_servers: str = ""
    """Addresses of Open Inference Protocol servers to use instead of own children, comma-separated."""

    @field_validator("model_servers")
    @classmethod
    def _no_model_servers(cls, value: str) -> str:
        if value.strip():
            raise ValueError("model servers of one's own are not built yet; leave it empty")
        return value

    @field_validator("device")
    @classmethod
    def _on_the_cpu(cls, value: str) -> str:
        if value == "cuda":
            raise ValueError("confined model servers run on the CPU; cuda is not built yet")
        return value
