"""How many calls one caller may start and have running, so that nobody takes a server from the others."""

import functools
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from services.runtime.auth import Caller, Role
from services.runtime.errors import ResourceExhausted
from services.runtime.kernel_sockets import network_of

_REMEMBERED = 10_000
_KEPT_FREE = 16
_BEGUN = 8
_MOST_PROBES = 64

Held = tuple[str, ...]
"""What a running call is counted for: its caller, its address."""


@dataclass(frozen=True)
class CallLimits:
    """Limits for each participant, and for all unproven callers of one address together.

    A bucket of `burst` calls fills up by `per_second`; 0 lets any number start. `in_flight` calls of a participant may
    run at once, and `in_flight_per_address` of all callers of one address, 0 again for any number. Keys cost nothing,
    so it is the second that keeps one machine from running all the calls that a server takes. Callers with a role in
    `exempt` have no limit. Of IPv6 a network of 64 bits counts as one address.
    """

    per_second: float = 500.0
    burst: int = 5000
    in_flight: int = 512
    in_flight_per_address: int = 1536
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
        level = self._level(name, now)
        wait_s = self._wait_s(level)
        self._levels[name] = (level if wait_s else level - 1, now)
        self._levels.move_to_end(name)
        if len(self._levels) > _REMEMBERED:
            self._levels.popitem(last=False)
        return wait_s

    def wait_s(self, name: str) -> float:
        """What `take` would return; nothing is taken, and nothing remembered."""
        return self._wait_s(self._level(name, self._clock()))

    def _level(self, name: str, now: float) -> float:
        level, since = self._levels.get(name, (self._burst, now))
        return min(self._burst, level + (now - since) * self._per_second)

    def _wait_s(self, level: float) -> float:
        return 0.0 if level >= 1 else (1 - level) / self._per_second


class CallGate:
    """Admits calls by their caller's limits. `clock` gives seconds and never goes back.

    Of the `room` for calls that a server has, a sixteenth is kept for exempt callers: who floods it does not shut out
    its operator, nor the services that it works with. None: there is no end to it.
    """

    def __init__(
        self, limits: CallLimits, clock: Callable[[], float] = time.monotonic, *, room: int | None = None
    ) -> None:
        self._limits = limits
        self.most_begun = room and _BEGUN * room
        """For gRPC, which counts the calls that were not let in, too, until their callers take that answer."""
        self._for_anyone = math.inf if room is None else room - room // _KEPT_FREE
        self._calls = 0
        self._probes = 0
        self._participants = Buckets(limits.per_second, limits.burst, clock)
        self._addresses = Buckets(limits.per_second, limits.burst, clock)
        self._running: dict[str, int] = {}

    def admit_stranger(self, peer: str) -> None:
        """Before anything is done for a call that proves no caller yet. Raises ResourceExhausted (CALL_RATE).

        `peer` is gRPC's name of the other end (`ipv4:10.0.0.1:5000`).
        """
        if self._limits.per_second and not peer.startswith("unix:"):
            self._take(self._addresses, address_of(peer), "callers without a known token at your address")

    def begin_probe(self) -> bool:
        """Whether a check of health goes above all limits: a supervisor may have its address together with strangers.

        64 at a time do, each until `end_probe`; any other is a call like all.
        """
        if self._probes >= _MOST_PROBES:
            return False
        self._probes += 1
        return True

    def end_probe(self, *_: object) -> None:
        """After a check that went above all limits."""
        self._probes -= 1

    def begin(self, caller: Caller | None, peer: str) -> Held:
        """Before a call of `caller`, or of one who needs no token; what it returns is to `end`.

        Raises ResourceExhausted: CALL_RATE with the wait, CALLS_IN_FLIGHT, CALLS_IN_FLIGHT_PER_ADDRESS, or
        CALLS_IN_FLIGHT_IN_ALL.
        """
        limits, held = self._limits, []
        if caller is not None:
            if self._is_exempt(caller):
                self._calls += 1
                return ()
            if limits.per_second:
                self._take(self._participants, caller.id, f"participants/{caller.id}")
            self._check(caller.id, limits.in_flight, "CALLS_IN_FLIGHT", "participants/" + caller.id)
            held.append(caller.id)
        if not peer.startswith("unix:"):
            address = address_of(peer)
            self._check(address, limits.in_flight_per_address, "CALLS_IN_FLIGHT_PER_ADDRESS", "your address")
            held.append(address)
        if self._calls >= self._for_anyone:
            raise ResourceExhausted("CALLS_IN_FLIGHT_IN_ALL", "this server runs as many calls as it may, try again")
        self._calls += 1
        for name in held:
            self._running[name] = self._running.get(name, 0) + 1
        return tuple(held)

    def counted_address(self, caller: Caller | None, peer: str) -> str | None:
        """What the messages of a call count for; None for those without limits."""
        trusted = peer.startswith("unix:") or (caller is not None and self._is_exempt(caller))
        return None if trusted else address_of(peer)

    def end(self, held: Held) -> None:
        """After a call that `begin` has let in, when its answer has been taken."""
        self._calls -= 1
        for name in held:
            running = self._running.pop(name) - 1
            if running:
                self._running[name] = running

    def _check(self, name: str, limit: int, reason: str, who: str) -> None:
        running = self._running.get(name, 0)
        if limit and running >= limit:
            raise ResourceExhausted(reason, f"{who} has {running} calls running, as many as it may", limit=str(limit))

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


def address_of(peer: str) -> str:
    """As what the other end of a connection counts; `peer` is gRPC's name of it (`ipv4:10.0.0.1:5000`)."""
    return _network(peer.rpartition(":")[0])


@functools.lru_cache(maxsize=4096)
def _network(host: str) -> str:
    """Of gRPC's name without the port: `ipv4:10.0.0.1`, or `ipv6:%5B2001:db8::1%5D`."""
    try:
        return str(network_of(unquote(host.partition(":")[2]).strip("[]")))
    except ValueError:
        return host
