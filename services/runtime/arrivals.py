"""How fast connections may come, in all and from one address."""

import asyncio
import contextlib
import errno
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from services.runtime.connections import REFUSALS, ConnectionLimits
from services.runtime.kernel_sockets import ArrivalFilter, EndedConnections, Network, Peer, connections, network_of

Name = TypeVar("Name", bound=Hashable)

_REMEMBERED = 10_000
_READ_AT_ONCE = 256
_EVERY_S = 0.1
_LONGEST_S = 60.0
# A limit for all shuts out those who did nothing, health checks too: never for longer than they try again.
_LONGEST_FOR_ALL_S = 1.0
_NAMED = 10
_TELL_EVERY_S = 60.0
_NO_FILES = (errno.EMFILE, errno.ENFILE)
_REASON_ADDRESS = "CONNECTIONS_PER_SECOND_PER_ADDRESS"
_REASON_ALL = "CONNECTIONS_PER_SECOND"

_log = structlog.get_logger("tiltyard.connections")


class Debts(Generic[Name]):
    """Token buckets that what has happened already is taken from: who took more than there was is in debt.

    A debt is never deeper than what `longest_s` seconds bring back, and over when the next second's tokens have come
    beside it. At most 10,000 buckets are remembered, those used last. `clock` gives seconds and never goes back.
    """

    def __init__(
        self, per_second: float, burst: int, *, longest_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._even = min(per_second, self._burst)
        self._deepest = -per_second * longest_s
        self._clock = clock
        self._levels: OrderedDict[Name, tuple[float, float]] = OrderedDict()
        self._debtors: set[Name] = set()

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, name: Name) -> bool:
        """Takes one token out of `name`'s; whether it is in debt by that. Without a rate nobody ever is."""
        if not self._per_second:
            return False
        level = max(self._level(name) - 1, self._deepest)
        self._levels[name] = (level, self._clock())
        self._levels.move_to_end(name)
        if level < 0:
            self._debtors.add(name)
        if len(self._levels) > _REMEMBERED:
            self._debtors.discard(self._levels.popitem(last=False)[0])
        return level < 0

    def debtors(self) -> list[Name]:
        """Who is in debt now, the deepest first."""
        levels = {name: self._level(name) for name in self._debtors}
        self._debtors = {name for name, level in levels.items() if level < self._even}
        return sorted(self._debtors, key=levels.__getitem__)

    def _level(self, name: Name) -> float:
        level, since = self._levels.get(name, (self._burst, self._clock()))
        return min(self._burst, level + (self._clock() - since) * self._per_second)


class ArrivalKeeper:
    """Keeps out who connects to `port` faster than `limits` say, until that has evened out.

    A connection counts when it has ended: how many are open has a limit of its own, and of those that end the kernel
    tells. So calls, and connections that stay, cost nothing here. Where this process may ask the kernel for a filter,
    who is kept out is not even answered; elsewhere its connections are cut within a tenth of a second.
    """

    def __init__(self, port: int, limits: ConnectionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._port = port
        self._addresses: Debts[Network] = Debts(
            limits.per_second_per_address, limits.burst_per_address, longest_s=_LONGEST_S, clock=clock
        )
        self._all: Debts[None] = Debts(limits.per_second, limits.burst, longest_s=_LONGEST_FOR_ALL_S, clock=clock)
        self._above = asyncio.Event()
        self._clock = clock
        self._tell_again = 0.0
        self._filters = True
        self._cutting = _Cutting(port)

    async def run(self) -> None:
        """Keeps out until cancelled; returns where the kernel does not tell which connections end."""
        try:
            ended = EndedConnections(self._port)
        except OSError as error:
            _log.warning("how fast connections come can't be limited here", error=str(error))
            return
        loop = asyncio.get_running_loop()
        with ended:
            loop.add_reader(ended.fileno(), self._note, ended)
            try:
                while True:
                    await self._above.wait()
                    self._above.clear()
                    try:
                        await self._until_even()
                    except OSError as error:
                        # Most likely there is no open file left just now.
                        _log.warning("connections could not be kept out", error=str(error))
                        await asyncio.sleep(_EVERY_S)
                        self._above.set()
            finally:
                loop.remove_reader(ended.fileno())

    def _note(self, ended: EndedConnections) -> None:
        for peer in ended.read(_READ_AT_ONCE):
            if self._cutting.has_cut(peer):
                continue  # a refusal costs nothing
            above = self._addresses.take(network_of(peer[0]))
            if self._all.take(None) or above:
                self._above.set()

    async def _until_even(self) -> None:
        if self._filters:
            try:
                await self._filter()
                return
            except OSError as error:
                if error.errno in _NO_FILES:
                    raise
                _log.info("this process may not filter: connections are cut instead", error=str(error))
                self._filters = False
        await self._cut()

    async def _filter(self) -> None:
        with contextlib.closing(ArrivalFilter(self._port)) as filter:
            asked, dropped = None, filter.dropped()
            while debts := self._debts():
                if debts != asked:
                    filter.keep_out(debts.networks, everyone=debts.everyone)
                    asked = debts
                before, dropped = dropped, filter.dropped()
                self._count(dropped - before, debts)
                await asyncio.sleep(_EVERY_S)

    async def _cut(self) -> None:
        self._cutting.begin()
        loop = asyncio.get_running_loop()
        while debts := self._debts():
            began = loop.time()
            cut = await asyncio.to_thread(self._cutting.look, debts.networks, everyone=debts.everyone)
            self._count(cut, debts)
            # Among many open files looking must not become this process's main occupation.
            await asyncio.sleep(max(_EVERY_S, 4 * (loop.time() - began)))

    def _debts(self) -> "_InDebt | None":
        networks, everyone = self._addresses.debtors(), bool(self._all.debtors())
        if not networks and not everyone:
            return None
        now = self._clock()
        if now >= self._tell_again:
            self._tell_again = now + _TELL_EVERY_S
            named = [str(network) for network in networks[:_NAMED]]
            _log.warning("connections come too fast", addresses=named, number=len(networks), in_all=everyone)
        return _InDebt(networks, everyone)

    def _count(self, refused: int, debts: "_InDebt") -> None:
        if refused:
            REFUSALS.add(refused, reason=_REASON_ALL if debts.everyone else _REASON_ADDRESS)


@dataclass(frozen=True)
class _InDebt:
    networks: Sequence[Network]
    everyone: bool


class _Cutting:
    """Cuts connections that came after `begin`, wherever they are in their handshakes."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._seen: set[Peer] | None = None
        self._cut: set[Peer] = set()

    def begin(self) -> None:
        """What the next look finds stays."""
        self._seen = None

    def has_cut(self, peer: Peer) -> bool:
        """Whether the connection of `peer`, which has ended, was one of those. Says so once."""
        try:
            self._cut.remove(peer)
        except KeyError:
            return False
        return True

    def look(self, networks: Collection[Network], *, everyone: bool) -> int:
        """Cuts those of `networks`, or all; how many. Raises OSError where the open files can't be looked through."""
        out = frozenset(networks)
        peers: set[Peer] = set()
        cut = 0
        for connection, peer in connections(self._port):
            peers.add(peer)
            if self._seen is None or peer in self._seen or peer in self._cut:
                continue
            if everyone or network_of(peer[0]) in out:
                self._cut.add(peer)
                cut += 1
                # Below gRPC, which then finds the connection ended and closes its own end.
                with contextlib.suppress(OSError):  # it has ended by itself
                    connection.shutdown(socket.SHUT_RDWR)
        if len(self._cut) > _REMEMBERED:
            self._cut &= peers  # the ends of some were left out
        self._seen = peers - self._cut
        return cut
