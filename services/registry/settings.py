"""Settings of the registry."""

import importlib.util
from datetime import timedelta
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from services.registry.artifacts.keeping import Keeping
from services.registry.artifacts.storage import bucket_of
from services.registry.artifacts.uploads import Quotas
from services.runtime.daily import DailyLimits
from services.runtime.settings import ParticipantIds, PeerAddress, ServiceSettings

PerDay = Annotated[int, Field(ge=0, le=10**9)]
MaxBytes = Annotated[int, Field(ge=1, le=1 << 42)]


class RegistrySettings(ServiceSettings):
    """What an operator decides about the registry. Minimum stakes are the selector's to know."""

    service: ClassVar[str] = "registry"

    listen: str = "127.0.0.1:7401"
    selector: PeerAddress = "127.0.0.1:7402"
    """Address of the selector: `HOST:PORT` or `unix:/PATH`."""
    trusted_endorsers: ParticipantIds = frozenset()
    """Whose endorsements count for eligibility, beside the operators'."""
    max_artifact_bytes: MaxBytes = 1 << 40
    """Largest dataset or model that is taken, whatever a task allows."""
    artifacts: str = ""
    """A folder that gets `artifacts` and `uploads` in it, or `s3://BUCKET/PREFIX` (extra `s3`; AWS_* variables name
    region, endpoint and credentials). Default: `state_dir`."""
    max_open_uploads: Annotated[int, Field(ge=1)] = Quotas.max_open_uploads
    """Most uploads of one participant that have begun and not ended."""
    max_pending_bytes: MaxBytes = Quotas.max_pending_bytes
    """Most bytes of one participant's open uploads, models not revealed and base models that no task names."""
    max_pending_artifacts: Annotated[int, Field(ge=1)] = Quotas.max_pending_artifacts
    """Most of these in number."""
    max_participant_bytes: MaxBytes = Quotas.max_participant_bytes
    """Most bytes that are kept for one participant."""
    keep_free_bytes: Annotated[int, Field(ge=0, le=1 << 50)] = 1 << 30
    """Uploads end before less than this would be free of the disk that they are received on: what is left is for the
    database, which has to grow for everything else."""
    keep_uploads_hours: Annotated[int, Field(ge=1)] = 24
    """How long broken uploads, and base models that no task names, are kept."""
    keep_refused_days: Annotated[int, Field(ge=0)] = 7
    """How long models of rejected submissions and datasets of cancelled tasks are kept."""
    strangers_per_day_per_address: PerDay = DailyLimits.strangers_per_day_per_address
    """Records a day that callers of one address may cause with nothing at stake: registrations, owner bindings,
    endorsements, refused verdicts; 0: any number. A Unix socket counts for none."""
    strangers_per_day: PerDay = DailyLimits.strangers_per_day
    """The same of all addresses together; 0: any number."""
    changes_per_day: PerDay = DailyLimits.changes_per_day
    """Changes a day that one participant may make to its tasks and memberships; 0: any number."""

    @field_validator("trusted_endorsers", mode="before")
    @classmethod
    def _split_endorsers(cls, value: object) -> object:
        return frozenset(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("trusted_endorsers")
    @classmethod
    def _endorser_ids(cls, value: frozenset[str]) -> frozenset[str]:
        return cls._participant_ids(value)

    @field_validator("artifacts")
    @classmethod
    def _folder_or_bucket(cls, value: str) -> str:
        if bucket_of(value) is not None and importlib.util.find_spec("obstore") is None:
            raise ValueError("a bucket needs the extra s3: pip install 'tiltyard[s3]'")
        return value

    @property
    def written_folders(self) -> tuple[Path, ...]:
        """With the artifacts' own folder, if they have one."""
        if not self.artifacts or bucket_of(self.artifacts) is not None:
            return super().written_folders
        return (*super().written_folders, Path(self.artifacts))

    @property
    def quotas(self) -> Quotas:
        """What one participant may hand in."""
        return Quotas(
            max_open_uploads=self.max_open_uploads,
            max_pending_bytes=self.max_pending_bytes,
            max_pending_artifacts=self.max_pending_artifacts,
            max_participant_bytes=self.max_participant_bytes,
        )

    @property
    def daily_limits(self) -> DailyLimits:
        """What may be caused in a day."""
        return DailyLimits(self.strangers_per_day_per_address, self.strangers_per_day, self.changes_per_day)

    @property
    def keeping(self) -> Keeping:
        """How long what nobody needs is kept."""
        return Keeping(timedelta(hours=self.keep_uploads_hours), timedelta(days=self.keep_refused_days))

    @property
    def trusted(self) -> frozenset[str]:
        """All whose endorsements count."""
        return self.operators | self.trusted_endorsers
