"""How long connections live and how many there may be, in all and from one address."""

import asyncio
import ipaddress
import os
import resource
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import structlog

MAX_STREAMS = 1024
"""Calls at once on one connection; a client queues further ones."""
_OPEN_FILES = "/dev/fd"
_EVERY_S = 1.0
_MANY_FILES = 1 << 20

_log = structlog.get_logger("tiltyard.connections")

Option = tuple[str, int]
_Peer = tuple[str, int]


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of one server; times in seconds, counts of connections, 0 for no such limit.

    A connection older than `age_s` is asked to go, and cut `age_grace_s` later: long streams end then, and go on over
    another. One without calls ends after `idle_s`. Who connects has `handshake_s` to say what it wants.
    """

    total: int = 0
    per_address: int = 0
    age_s: float = 3600.0
    age_grace_s: float = 600.0
    idle_s: float = 600.0
    handshake_s: float = 20.0

    def options(self) -> list[Option]:
        """gRPC's options for all but `per_address`, and the rules for pings: none sooner than 10 s after another."""
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
    through, once a second, and only while it has more than `per_address` open files. An IPv6 network of 64 bits counts
    as one address.
    """

    def __init__(self, port: int, per_address: int) -> None:
        self._port = port
        self._per_address = per_address
        self._known: set[_Peer] = set()

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                if len(os.listdir(_OPEN_FILES)) > self._per_address:
                    cut = await asyncio.to_thread(self.look)
                    if cut:
                        _log.warning("cut connections above the limit of their address", connections=dict(cut))
            except OSError as error:
                # Listing takes an open file, too, and there may be none left just now; or this system lists none.
                _log.warning("connections could not be counted", error=str(error))

    def look(self) -> Counter[str]:
        """One look through the sockets; how many were cut, by address."""
        peers: dict[str, list[_Peer]] = defaultdict(list)
        for _, peer in self._connections():
            peers[_network(peer[0])].append(peer)
        condemned: set[_Peer] = set()
        for each in peers.values():
            # Those that an earlier look found come first, and so stay.
            each.sort(key=lambda peer: peer not in self._known)
            condemned.update(each[self._per_address :])
        cut: Counter[str] = Counter()
        if condemned:
            for connection, peer in self._connections():
                if peer in condemned:
                    # Below gRPC, which then finds the connection ended and closes its own end.
                    connection.shutdown(socket.SHUT_RDWR)
                    cut[_network(peer[0])] += 1
        self._known = {peer for each in peers.values() for peer in each} - condemned
        return cut

    def _connections(self) -> Iterator[tuple[socket.socket, _Peer]]:
        """The server's connections, each as a further handle of its socket that is closed after use."""
        for name in os.listdir(_OPEN_FILES):
            try:
                # A duplicate can't become another file while it is looked at.
                duplicate = os.dup(int(name))
            except OSError:
                continue  # closed by now
            try:
                connection = socket.socket(fileno=duplicate)
            except OSError:
                os.close(duplicate)
                continue  # no socket
            with closing(connection):
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                try:
                    if connection.getsockname()[1] == self._port:
                        yield connection, connection.getpeername()[:2]
                except OSError:
                    continue  # it listens, or has ended


def raise_file_limit() -> None:
    """Lets this process have as many open files as the system allows it: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (file_limit(), hard))


def file_limit() -> int:
    """The most open files that the system allows this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)


def _network(host: str) -> str:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
