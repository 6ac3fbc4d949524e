"""Who but its owner may ask a submitted model: a validator that is judging it now, where the task lets it ask."""

from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Protocol

from services.runtime.errors import PermissionDenied
from services.trainer.training import Training

_REMEMBERED = 4096
# A lease that has just ended may go on so long; one that was refused may have been taken a moment later.
_GRANTED_FOR = timedelta(seconds=30)
_REFUSED_FOR = timedelta(seconds=1)


class Leases(Protocol):
    """The registry's word on who judges what."""

    async def is_judging(self, validator: str, submission: str) -> bool:
        """Whether a participant holds a lease on a submission of a task that lets nodes' endpoints be asked.

        Raises Unavailable when the registry cannot be asked.
        """
        ...


class Submitted(Protocol):
    """The trainings whose models were handed in."""

    async def submitted(self, model_digest: bytes) -> list[Training]:
        """Those with this SHA-256, 32 bytes."""
        ...


class Judges:
    """Finds the training behind a model's digest for those who may ask it."""

    def __init__(self, trainings: Submitted, leases: Leases, clock: Callable[[], datetime]) -> None:
        self._trainings = trainings
        self._leases = leases
        self._clock = clock
        self._known: OrderedDict[tuple[str, str], tuple[str, datetime]] = OrderedDict()

    async def training_for(self, validator: str, model: str) -> str:
        """The id of the training whose model has this digest (64 hex digits). Raises PermissionDenied and Unavailable.

        Whether there is such a model is told to nobody who may not ask it.
        """
        asked = (validator, model)
        now = self._clock()
        training, until = self._known.get(asked, ("", now))
        # One that holds for longer is of before the clock was set back.
        if not now < until <= now + _GRANTED_FOR:
            training = await self._look_up(validator, model)
            self._known[asked] = (training, self._clock() + (_GRANTED_FOR if training else _REFUSED_FOR))
            self._known.move_to_end(asked)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        if not training:
            raise PermissionDenied("NOT_DRAWN", "only who judges a model may ask it, where its task allows that")
        return training

    async def _look_up(self, validator: str, model: str) -> str:
        try:
            digest = bytes.fromhex(model)
        except ValueError:
            return ""
        if len(model) != 64 or len(digest) != 32:
            return ""
        for training in await self._trainings.submitted(digest):
            if await self._leases.is_judging(validator, training.submission):
                return training.id
        return ""
