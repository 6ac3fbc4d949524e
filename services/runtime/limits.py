"""How many calls one caller may start and have running, so that nobody takes a server from the others."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from services.runtime.auth import Caller, Role
from services.runtime.errors import ResourceExhausted

_REMEMBERED = 10_000


@dataclass(frozen=True)
class CallLimits:
    """Limits for each participant, and for all unproven callers of one address together.

    A bucket of `burst` calls fills up by `per_second`; 0 lets any number start. `in_flight` calls may run at once, 0
    again for any number. Callers with a role in `exempt` have no limit.
    """

    per_second: float = 500.0
    burst: int = 5000
    in_flight: int = 512
    exempt: frozenset[Role] = frozenset({Role.OPERATOR, Role.SERVICE})


class Buckets:
    """Token buckets by name. At most 10,000 are remembered, those used last; the others have most likely filled up."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, name: str) -> float:
        """Takes one token out: 0 when there was one, otherwise the seconds until there will be."""
        now = self._clock()
        level, since = self._levels.get(name, (self._burst, now))
        level = min(self._burst, level + (now - since) * self._per_second)
        wait_s = 0.0 if level >= 1 else (1 - level) / self._per_second
        self._levels[name] = (level if wait_s else level - 1, now)
        self._levels.move_to_end(name)
        if len(self._levels) > _REMEMBERED:
            self._levels.popitem(last=False)
        return wait_s


class CallGate:
    """Admits calls by their caller's limits. `clock` gives seconds and never goes back."""

    def __init__(self, limits: CallLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._participants = Buckets(limits.per_second, limits.burst, clock)
        self._addresses = Buckets(limits.per_second, limits.burst, clock)
        self._running: dict[str, int] = {}

    def admit_stranger(self, peer: str) -> None:
        """Before anything is done for a call that proves no caller yet. Raises ResourceExhausted (CALL_RATE).

        `peer` is gRPC's name of the other end (`ipv4:10.0.0.1:5000`).
        """
        if self._limits.per_second and not peer.startswith("unix:"):
            self._take(self._addresses, peer.rpartition(":")[0], "callers without a known token at your address")

    def begin(self, caller: Caller) -> None:
        """Before a call of `caller`. Raises ResourceExhausted: CALL_RATE with the wait, or CALLS_IN_FLIGHT.

        A call that was let in is to `end`.
        """
        if self._is_exempt(caller):
            return
        if self._limits.per_second:
            self._take(self._participants, caller.id, f"participants/{caller.id}")
        running = self._running.get(caller.id, 0)
        if self._limits.in_flight and running >= self._limits.in_flight:
            raise ResourceExhausted(
                "CALLS_IN_FLIGHT",
                f"participants/{caller.id} has {running} calls running, as many as it may",
                limit=str(self._limits.in_flight),
            )
        self._running[caller.id] = running + 1

    def end(self, caller: Caller) -> None:
        """After a call that `begin` has let in."""
        if self._is_exempt(caller):
            return
        running = self._running.pop(caller.id) - 1
        if running:
            self._running[caller.id] = running

    def _is_exempt(self, caller: Caller) -> bool:
        return not self._limits.exempt.isdisjoint(caller.roles)

    def _take(self, buckets: Buckets, name: str, who: str) -> None:
        wait_s = buckets.take(name)
        if wait_s:
            raise ResourceExhausted(
                "CALL_RATE",
                f"{who} may start {self._limits.per_second:g} calls a second here",
                retry_after_s=math.ceil(wait_s * 1000) / 1000,
                limit=f"{self._limits.per_second:g}",
            )
