"""Settings of the registry."""

from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from services.runtime.settings import ParticipantIds, ServiceSettings

MaxBytes = Annotated[int, Field(ge=1, le=1 << 42)]


class RegistrySettings(ServiceSettings):
    """What an operator decides about the registry. Minimum stakes are the selector's to know."""

    service: ClassVar[str] = "registry"

    listen: str = "127.0.0.1:7401"
    selector: Annotated[str, Field(min_length=1)] = "127.0.0.1:7402"
    """Address of the selector: `HOST:PORT` or `unix:/PATH`."""
    trusted_endorsers: ParticipantIds = frozenset()
    """Whose endorsements count for eligibility, beside the operators'."""
    max_artifact_bytes: MaxBytes = 1 << 40
    """Largest dataset or model that is taken, whatever a task allows."""

    @field_validator("trusted_endorsers", mode="before")
    @classmethod
    def _split_endorsers(cls, value: object) -> object:
        return frozenset(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("trusted_endorsers")
    @classmethod
    def _endorser_ids(cls, value: frozenset[str]) -> frozenset[str]:
        return cls._participant_ids(value)

    @property
    def trusted(self) -> frozenset[str]:
        """All whose endorsements count."""
        return self.operators | self.trusted_endorsers
