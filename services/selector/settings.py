"""Settings of the selector."""

from datetime import timedelta
from typing import Annotated, ClassVar

from pydantic import Field

from services.runtime.settings import ServiceSettings

Micros = Annotated[int, Field(ge=1, le=2**63 - 1)]


class SelectorSettings(ServiceSettings):
    """What an operator decides about stakes. Amounts are micro-units."""

    service: ClassVar[str] = "selector"

    listen: str = "127.0.0.1:7402"
    validator_min_stake_micros: Micros = 100_000_000
    """Least stake of a validator in tasks that name none."""
    training_node_min_stake_micros: Annotated[int, Field(ge=0, le=2**63 - 1)] = 10_000_000
    """Least stake of a training node in tasks that name none."""
    task_creator_min_stake_micros: Micros = 100_000_000
    """Stake by which a task creator qualifies."""
    unbonding_time_s: Annotated[int, Field(ge=0, le=10 * 366 * 24 * 3600)] = 7 * 24 * 3600
    """Time between asking stake back and getting it."""

    @property
    def unbonding_time(self) -> timedelta:
        """Time between asking stake back and getting it."""
        return timedelta(seconds=self.unbonding_time_s)
