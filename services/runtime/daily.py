"""How often in a day what is kept for good may be caused: by one participant, from one address, and in all."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.runtime.auth import Role, current_address, maybe_caller
from services.runtime.errors import ResourceExhausted
from services.runtime.limits import Buckets, CallLimits

_DAY_S = 86_400.0


@dataclass(frozen=True)
class DailyLimits:
    """The operator's settings of the same names; 0 stands for any number."""

    strangers_per_day_per_address: int = 1000
    strangers_per_day: int = 20_000
    changes_per_day: int = 200


class Daily:
    """Counts for the caller of the call being served; outside of a call, and for `exempt` roles, nothing is counted.

    Each count may be used up at once, and comes back evenly over the next day. None outlives the process. `clock` gives
    seconds and never goes back.
    """

    def __init__(
        self,
        limits: DailyLimits,
        exempt: frozenset[Role] = CallLimits.exempt,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exempt = exempt
        self._addresses = _Count("STRANGERS_PER_DAY_PER_ADDRESS", limits.strangers_per_day_per_address, clock)
        self._strangers = _Count("STRANGERS_PER_DAY", limits.strangers_per_day, clock)
        self._changes = _Count("CHANGES_PER_DAY", limits.changes_per_day, clock)

    def count_stranger(self) -> None:
        """Before what anybody may cause who has made a key is recorded.

        Not counted on a Unix socket: who calls there is let in by this machine. Raises ResourceExhausted
        (STRANGERS_PER_DAY_PER_ADDRESS, STRANGERS_PER_DAY) with the wait.
        """
        address = current_address()
        if self._counts() and address:
            # The address first: what one of them asks for in vain takes nothing from the others.
            self._addresses.take(address, "those at your address may cause {} records a day without a stake")
            self._strangers.take("", "all together may cause {} records a day without a stake")

    def count_change(self) -> None:
        """Before a change that a member or creator makes as often as it likes. Raises ResourceExhausted
        (CHANGES_PER_DAY) with the wait."""
        caller = maybe_caller()
        if self._counts() and caller is not None:
            self._changes.take(caller.id, "a participant may change its tasks and memberships {} times a day")

    def _counts(self) -> bool:
        caller = maybe_caller()
        return caller is not None and self._exempt.isdisjoint(caller.roles)


class _Count:
    def __init__(self, reason: str, per_day: int, clock: Callable[[], float]) -> None:
        self._reason = reason
        self._per_day = per_day
        self._buckets = Buckets(per_day / _DAY_S, per_day, clock)

    def take(self, name: str, sentence: str) -> None:
        if not self._per_day:
            return
        wait_s = self._buckets.take(name)
        if wait_s:
            raise ResourceExhausted(
                self._reason,
                sentence.format(self._per_day),
                retry_after_s=math.ceil(wait_s * 1000) / 1000,
                limit=str(self._per_day),
            )
