"""What the kernel tells of the sockets at one port, and what it can be asked to keep from them."""

import contextlib
import ctypes
import errno
import functools
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

OPEN_FILES = "/dev/fd"
MOST_KEPT_OUT = 128
"""Networks that one filter names: what it takes of a socket's memory for options is limited."""

Peer = tuple[str, int]
Network = ipaddress.IPv4Address | ipaddress.IPv6Network
"""What counts as one address: of IPv6 a network of 64 bits, since a host chooses freely within one."""

# https://docs.kernel.org/networking/filter.html, linux/sock_diag.h, linux/inet_diag.h, asm-generic/socket.h
_SOCK_DIAG = 4
_TCP_DESTROYED = 1 << 0 | 1 << 2  # the groups of IPv4 and of IPv6
_LOCAL_PORT = struct.Struct("!H")
_LOCAL_PORT_AT, _PEER_PORT_AT, _PEER_HOST_AT = 20, 22, 40
_ATTACH_FILTER, _DETACH_FILTER, _MEMORY_INFO = 26, 27, 55
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD_BYTE, _LOAD_HALF, _LOAD_WORD, _LOAD_KEPT, _KEEP = 0x30, 0x28, 0x20, 0x60, 0x02
_AND, _JUMP, _EQUAL, _ANSWER = 0x54, 0x05, 0x15, 0x06
_PROTOCOL, _NETWORK_HEADER = 0xFFFFF000, 0xFFF00000
_IPV4, _TCP_FLAGS_AT, _SYN, _SYN_ACK = 0x0800, 13, 0x02, 0x12
_DROP = (_ANSWER, 0, 0, 0)
_TAKE = (_ANSWER, 0, 0, 0xFFFFFFFF)

_Program = list[tuple[int, int, int, int]]


@functools.lru_cache(maxsize=4096)
def network_of(host: str) -> Network:
    """What `host` (an address) counts as."""
    address = ipaddress.ip_address(plain(host))
    if isinstance(address, ipaddress.IPv4Address):
        return address
    return ipaddress.IPv6Network((int(address) >> 64 << 64, 64))


@functools.lru_cache(maxsize=4096)
def plain(host: str) -> str:
    """`host` without a zone, and in IPv4 where a socket for both kinds has it as an address of IPv6."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return str(address if isinstance(address, ipaddress.IPv4Address) else address.ipv4_mapped or address)


def connections(port: int) -> Iterator[tuple[socket.socket, Peer]]:
    """This process's connections whose own end is at `port`, each as a further handle that is closed after use."""
    for each in _sockets(port):
        try:
            host, number = each.getpeername()[:2]
        except OSError:
            continue  # it listens, or has ended
        yield each, (plain(host), number)


def _listeners(port: int) -> list[socket.socket]:
    found: dict[int, socket.socket] = {}
    for each in _sockets(port):
        # A handle that is kept may have got a number that is still to be looked at.
        number = os.fstat(each.fileno()).st_ino
        if number not in found and each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            # Not by its `dup`, which makes the socket blocking, for gRPC too.
            found[number] = socket.socket(fileno=each.detach())
    return list(found.values())


def _sockets(port: int) -> Iterator[socket.socket]:
    for name in os.listdir(OPEN_FILES):
        try:
            # A duplicate can't become another file while it is looked at.
            duplicate = os.dup(int(name))
        except OSError:
            continue  # closed by now
        try:
            found = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            continue  # no socket
        with contextlib.closing(found):
            if found.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            try:
                if found.getsockname()[1] != port:
                    continue
            except OSError:
                continue
            yield found


class EndedConnections:
    """Tells of each TCP connection to `port` when the kernel has let go of it, however short it was.

    Of connections that end faster than they are read some are left out. Raises OSError where the kernel does not tell:
    elsewhere than on Linux, and in sandboxes without sock_diag. It takes no privilege.
    """

    def __init__(self, port: int) -> None:
        if sys.platform != "linux":
            raise OSError(errno.EOPNOTSUPP, "only Linux tells when connections end")
        self._port = port
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _SOCK_DIAG)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            # What other processes of this machine do is told, too: it need not wake this one.
            at_port = [(_LOAD_HALF, 0, 0, _LOCAL_PORT_AT), (_EQUAL, 0, 1, port), _TAKE, _DROP]
            _attach(self._socket, at_port)
            self._socket.bind((0, _TCP_DESTROYED))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """What becomes readable when there is something to tell."""
        return self._socket.fileno()

    def read(self, most: int) -> list[Peer]:
        """The other ends of up to `most` connections that have ended, without waiting for any."""
        ended: list[Peer] = []
        for _ in range(most):
            try:
                message = self._socket.recv(1024)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                continue  # some were left out here
            (port,) = _LOCAL_PORT.unpack_from(message, _LOCAL_PORT_AT)
            if port == self._port:
                family = socket.AddressFamily(message[16])
                length = 4 if family is socket.AF_INET else 16
                host = socket.inet_ntop(family, message[_PEER_HOST_AT : _PEER_HOST_AT + length])
                ended.append((plain(host), _LOCAL_PORT.unpack_from(message, _PEER_PORT_AT)[0]))
        return ended

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()


class ArrivalFilter:
    """Has the kernel drop what opens connections to `port`, until it is closed.

    Who is kept out hears nothing and tries again by itself, after 1, 3, 7 s; connections that exist go on.
    """

    def __init__(self, port: int) -> None:
        self._listeners = _listeners(port)

    def keep_out(self, networks: Sequence[Network], *, everyone: bool = False) -> None:
        """From now on those that come from `networks` and no others (the first `MOST_KEPT_OUT` count), or all.

        Raises OSError where this process may not filter: some kernels ask for CAP_NET_ADMIN, others for nothing.
        """
        program = _opening_from(networks[:MOST_KEPT_OUT], everyone=everyone)
        for listener in self._listeners:
            _attach(listener, program)

    def dropped(self) -> int:
        """How often anybody who tried to connect has been dropped since the server listens, each try counted."""
        # The kernel counts there, too, what it drops since nobody takes connections out of the queue fast enough.
        return sum(
            int.from_bytes(each.getsockopt(socket.SOL_SOCKET, _MEMORY_INFO, 36)[32:], sys.byteorder)
            for each in self._listeners
        )

    def close(self) -> None:
        """Keeps nobody out any more."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):  # it had none, or listens no more
                listener.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)
            listener.close()


def _opening_from(networks: Sequence[Network], *, everyone: bool) -> _Program:
    """Drops SYN without ACK from these networks. The sockets of accepted connections take the filter over."""
    program = [(_LOAD_BYTE, 0, 0, _TCP_FLAGS_AT), (_AND, 0, 0, _SYN_ACK), (_EQUAL, 1, 0, _SYN), _TAKE]
    if everyone:
        return [*program, _DROP]
    of_ipv4: _Program = [(_LOAD_WORD, 0, 0, _NETWORK_HEADER + 12)]
    # Source addresses are read once: a load from the packet takes as much room as ten other instructions.
    of_ipv6: _Program = [
        (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 8),
        (_KEEP, 0, 0, 0),
        (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 12),
        (_KEEP, 0, 0, 1),
    ]
    for each in networks:
        if isinstance(each, ipaddress.IPv4Address):
            of_ipv4 += [(_EQUAL, 0, 1, int(each)), _DROP]
        else:
            high, low = struct.unpack("!II", each.network_address.packed[:8])
            of_ipv6 += [(_LOAD_KEPT, 0, 0, 0), (_EQUAL, 0, 3, high), (_LOAD_KEPT, 0, 0, 1), (_EQUAL, 0, 1, low), _DROP]
    of_ipv4.append(_TAKE)
    which = [(_LOAD_HALF, 0, 0, _PROTOCOL), (_EQUAL, 1, 0, _IPV4), (_JUMP, 0, 0, len(of_ipv4))]
    return [*program, *which, *of_ipv4, *of_ipv6, _TAKE]


def _attach(to: socket.socket, program: _Program) -> None:
    instructions = ctypes.create_string_buffer(b"".join(_INSTRUCTION.pack(*line) for line in program))
    to.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(instructions)))
