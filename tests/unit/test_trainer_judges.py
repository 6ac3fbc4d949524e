"""Who may ask a submitted model: the registry's word, remembered for a moment."""

from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from services.runtime.errors import PermissionDenied
from services.trainer.judges import Judges
from services.trainer.training import Training

MODEL, VALIDATOR = "ab" * 32, "f" * 40


class Handed:
    """One training whose model was handed in."""

    id, submission = "t1", "tasks/t/submissions/1"

    async def submitted(self, model_digest: bytes) -> list[Training]:
        return [cast(Training, self)] if model_digest.hex() == MODEL else []


class Leases:
    """The registry's word, and how often it was asked for."""

    def __init__(self) -> None:
        self.judging = False
        self.asked = 0

    async def is_judging(self, validator: str, submission: str) -> bool:
        self.asked += 1
        return self.judging


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


async def test_a_word_is_remembered_for_a_moment() -> None:
    leases, clock = Leases(), Clock()
    judges = Judges(Handed(), leases, clock)
    leases.judging = True
    for seconds, asked in ((0, 1), (29, 1), (1, 2)):
        clock.now += timedelta(seconds=seconds)
        assert await judges.training_for(VALIDATOR, MODEL) == "t1"
        assert leases.asked == asked


async def test_a_refusal_from_before_the_clock_was_set_back_is_forgotten() -> None:
    leases, clock = Leases(), Clock()
    judges = Judges(Handed(), leases, clock)
    with pytest.raises(PermissionDenied):
        await judges.training_for(VALIDATOR, MODEL)
    leases.judging = True
    clock.now -= timedelta(hours=1)
    assert await judges.training_for(VALIDATOR, MODEL) == "t1"
    # Nor does a lease from then hold for an hour.
    leases.judging = False
    clock.now -= timedelta(hours=1)
    with pytest.raises(PermissionDenied):
        await judges.training_for(VALIDATOR, MODEL)
