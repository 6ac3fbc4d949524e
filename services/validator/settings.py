"""Settings of a validator."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from services.runtime.settings import PeerAddress, ServiceSettings
from services.validator.fleet import parse_servers
from services.validator.nodes import parse_reach

GIB = 1024**3


class ValidatorSettings(ServiceSettings):
    """What a validator can be told beside what every service can."""

    service: ClassVar[str] = "validator"

    listen: str = "127.0.0.1:7404"
    registry: PeerAddress
    """Address of the registry, `HOST:PORT` or `unix:/PATH`."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 1
    """Evaluations at once."""
    stop_after: Annotated[int, Field(ge=0)] = 0
    """Drain once so many runs have ended, and give back what is offered beyond; 0 means never."""
    cache_bytes: Annotated[int, Field(ge=1)] = 20 * GIB
    """Most bytes of datasets and models kept; fewer where the disk has no room for so many."""
    device: Literal["cpu", "auto", "cuda"] = "auto"
    """Where models run: `auto` is the CPU, too, and `cuda` stops the start with the reason."""
    model_servers: str = ""
    """Open Inference Protocol servers to use instead of own children: `NAME=ADDRESS` or `NAME=ADDRESS@PARTICIPANT_ID`,
    comma-separated. The id is that of a server's key, which then gets a token signed by the validator's. With grpcs://
    before it an address is called by TLS, with grpc:// in plaintext, else as TILTYARD_TLS_CA says for all peers."""
    model_share: Path | None = None
    """The folder that those servers load models from; needed with `model_servers`."""
    model_template: Path | None = None
    """A folder whose files are put into each model's folder, `${MODEL}` in them replaced by the model's name."""

    node_endpoints: str = ""
    """Where training nodes' own endpoints may lead, which are asked for a model that this validator cannot evaluate
    itself, in tasks that allow it: `public` for the public internet, networks as 10.0.0.0/8; empty for nowhere."""

    @property
    def written_folders(self) -> tuple[Path, ...]:
        """With the folder that model servers load from, if there is one."""
        return super().written_folders if self.model_share is None else (*super().written_folders, self.model_share)

    @field_validator("node_endpoints")
    @classmethod
    def _reachable(cls, value: str) -> str:
        parse_reach(value)
        return value

    @field_validator("model_servers")
    @classmethod
    def _parsed(cls, value: str) -> str:
        parse_servers(value)
        return value

    @model_validator(mode="after")
    def _shared(self) -> Self:
        if self.model_servers.strip() and self.model_share is None:
            raise ValueError("TILTYARD_MODEL_SERVERS needs TILTYARD_MODEL_SHARE, the folder that they load models from")
        return self

    @field_validator("device")
    @classmethod
    def _on_the_cpu(cls, value: str) -> str:
        if value == "cuda":
            raise ValueError(
                "own model servers run on the CPU alone: a GPU's memory and driver cannot be confined, and the CPU is "
                "the reference of disputes; name a model server on a GPU in TILTYARD_MODEL_SERVERS instead"
            )
        return value
