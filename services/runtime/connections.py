"""How long connections live and how many there may be, in all and from one address."""

import asyncio
import os
import resource
import socket
from collections import Counter, defaultdict
from dataclasses import dataclass

import structlog

from services.runtime.kernel_sockets import OPEN_FILES, Network, Peer, connections, network_of
from tiltyard.telemetry import metrics

MAX_STREAMS = 1024
"""Calls at once on one connection; a client queues further ones."""
_EVERY_S = 1.0
_MANY_FILES = 1 << 20

_log = structlog.get_logger("tiltyard.connections")

REFUSALS = metrics.Counter(
    "tiltyard.connection.refusals",
    unit="{connection}",
    description="Connections cut or kept out, by the limit that they were above.",
)

Option = tuple[str, int]


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of one server; times in seconds, counts of connections, 0 for no such limit.

    `total` and `per_address` may be open at once. After a `burst` no more than `per_second` may come in all, and the
    same for each address; of IPv6 a network of 64 bits counts as one.
    A connection older than `age_s` is asked to go, and cut `age_grace_s` later: long streams end then, and go on over
    another. One without calls ends after `idle_s`. Who connects has `handshake_s` to say what it wants.
    """

    total: int = 0
    per_address: int = 0
    per_second: float = 0.0
    burst: int = 20_000
    per_second_per_address: float = 0.0
    burst_per_address: int = 2000
    age_s: float = 3600.0
    age_grace_s: float = 600.0
    idle_s: float = 600.0
    handshake_s: float = 20.0

    def options(self) -> list[Option]:
        """gRPC's options for what it limits itself, and the rules for pings: none sooner than 10 s after another."""
        options = [
            ("grpc.server_handshake_timeout_ms", round(self.handshake_s * 1000)),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.max_ping_strikes", 2),
        ]
        if self.total:
            options.append(("grpc.max_allowed_incoming_connections", self.total))
        if self.age_s:
            options.append(("grpc.max_connection_age_ms", round(self.age_s * 1000)))
            options.append(("grpc.max_connection_age_grace_ms", round(self.age_grace_s * 1000)))
        if self.idle_s:
            options.append(("grpc.max_connection_idle_ms", round(self.idle_s * 1000)))
        return options


class Doorkeeper:
    """Cuts the newest connections of an address that holds more than `per_address` of them to the server on `port`.

    gRPC for Python says nothing of a connection before its first call, so the open sockets of this process are looked
    through, once a second, and only while it has more than `per_address` open files.
    """

    def __init__(self, port: int, per_address: int) -> None:
        self._port = port
        self._per_address = per_address
        self._known: set[Peer] = set()

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                if len(os.listdir(OPEN_FILES)) > self._per_address:
                    cut = await asyncio.to_thread(self.look)
                    if cut:
                        REFUSALS.add(cut.total(), reason="CONNECTIONS_PER_ADDRESS")
                        _log.warning("cut connections above the limit of their address", connections=dict(cut))
            except OSError as error:
                # Listing takes an open file, too, and there may be none left just now; or this system lists none.
                _log.warning("connections could not be counted", error=str(error))

    def look(self) -> Counter[str]:
        """One look through the sockets; how many were cut, by address."""
        peers: dict[Network, list[Peer]] = defaultdict(list)
        for _, peer in connections(self._port):
            peers[network_of(peer[0])].append(peer)
        condemned: set[Peer] = set()
        for each in peers.values():
            # Those that an earlier look found come first, and so stay.
            each.sort(key=lambda peer: peer not in self._known)
            condemned.update(each[self._per_address :])
        cut: Counter[str] = Counter()
        if condemned:
            for connection, peer in connections(self._port):
                if peer in condemned:
                    # Below gRPC, which then finds the connection ended and closes its own end.
                    connection.shutdown(socket.SHUT_RDWR)
                    cut[str(network_of(peer[0]))] += 1
        self._known = {peer for each in peers.values() for peer in each} - condemned
        return cut


def raise_file_limit() -> None:
    """Lets this process have as many open files as the system allows it: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (file_limit(), hard))


def file_limit() -> int:
    """The most open files that the system allows this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
