"""How fast connections may come to a server, in all and from one address."""

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from services.runtime import arrivals, connections
from services.runtime.arrivals import Debts
from services.runtime.connections import ConnectionLimits
from services.runtime.kernel_sockets import (
    MOST_KEPT_OUT,
    ArrivalFilter,
    EndedConnections,
    network_of,
)
from services.runtime.server import ArenaServer
from tests.rpc.test_runtime_limits import Seconds, closing, connect, get, is_open, serving, until_open
from tiltyard.calls.channel import open_channel
from tiltyard.telemetry import metrics

STRICT = ConnectionLimits(per_second_per_address=20, burst_per_address=20)
IMPATIENT_S = 0.5


def may_filter() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        filter = ArrivalFilter(listener.getsockname()[1])
        try:
            filter.keep_out([])
        except OSError:
            return False
        finally:
            filter.close()
    return True


def is_told() -> bool:
    try:
        with EndedConnections(1):
            return True
    except OSError:
        return False


needs_filter = pytest.mark.skipif(not may_filter(), reason="this process may not filter")
pytestmark = pytest.mark.skipif(not is_told(), reason="the kernel does not tell which connections end")


@pytest.fixture
def counting() -> Iterator[None]:
    metrics.collect(True)
    yield
    metrics.collect(False)


@pytest.fixture(params=["kept out", "cut"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of refusing."""
    way: str = request.param
    if way == "cut":

        def refused(*_: object, **__: object) -> None:
            raise PermissionError(errno.EPERM, "no filters")

        monkeypatch.setattr(ArrivalFilter, "keep_out", refused)
    elif not may_filter():
        pytest.skip("this process may not filter")
    return way


def come_and_go(server: ArenaServer, count: int, source: str) -> None:
    """Opens and closes that many connections, or as many as it may."""
    with contextlib.suppress(TimeoutError):
        for _ in range(count):
            with socket.create_connection(("127.0.0.1", server.port), timeout=IMPATIENT_S, source_address=(source, 0)):
                pass


def refusals(reason: str) -> float:
    return connections.REFUSALS.sums().get((("reason", reason),), 0)


async def is_refused(server: ArenaServer, source: str, *, within_s: float = IMPATIENT_S) -> bool:
    """Whether a fresh connection is not made or, soon after, cut."""
    try:
        (connection,) = await asyncio.to_thread(connect, server, 1, source=source, timeout_s=IMPATIENT_S)
    except (TimeoutError, ConnectionError):
        return True
    with closing([connection]):
        try:
            await asyncio.wait_for(until_open([connection], 0), within_s)
        except TimeoutError:
            return False
    return True


def test_a_debt_is_over_when_a_second_s_tokens_are_there_again() -> None:
    clock = Seconds()
    debts: Debts[str] = Debts(per_second=2, burst=3, longest_s=4, clock=clock)
    assert [debts.take("a") for _ in range(5)] == [False, False, False, True, True]
    assert debts.take("b") is False
    assert debts.debtors() == ["a"]
    clock.now = 1.9
    assert debts.debtors() == ["a"]
    clock.now = 2
    assert debts.debtors() == []
    clock.now = 1000
    assert [debts.take("a") for _ in range(4)] == [False, False, False, True]


def test_a_debt_lasts_no_longer_than_it_may_and_the_deepest_comes_first() -> None:
    clock = Seconds()
    debts: Debts[str] = Debts(per_second=2, burst=3, longest_s=4, clock=clock)
    for name, taken in (("shallow", 4), ("deep", 1000), ("deeper than shallow", 6)):
        for _ in range(taken):
            debts.take(name)
    assert debts.debtors() == ["deep", "deeper than shallow", "shallow"]
    clock.now = 4.9
    assert debts.debtors() == ["deep"]
    clock.now = 5
    assert debts.debtors() == []


def test_debts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_REMEMBERED", 100)
    debts: Debts[int] = Debts(per_second=1, burst=1, longest_s=60, clock=Seconds())
    for number in range(1000):
        debts.take(number)
        debts.take(number)
        assert len(debts) <= 100
    assert sorted(debts.debtors()) == list(range(900, 1000))


def test_without_a_rate_nobody_is_in_debt() -> None:
    debts: Debts[str] = Debts(per_second=0, burst=1, longest_s=60)
    assert not any(debts.take("a") for _ in range(100))
    assert len(debts) == 0


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_what_counts_as_one_address(host: str, network: str) -> None:
    assert str(network_of(host)) == network


async def ended(told: EndedConnections, count: int) -> list[tuple[str, int]]:
    peers: list[tuple[str, int]] = []
    async with asyncio.timeout(10):
        while len(peers) < count:
            peers += told.read(100)
            await asyncio.sleep(0.01)
    return peers


async def test_each_connection_is_told_of_when_it_has_ended_however_short_it_was() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        port = listener.getsockname()[1]
        with EndedConnections(port) as told, EndedConnections(port + 1 if port < 65535 else port - 1) as other:
            mine = []
            for host in ("127.0.0.1", "::1"):
                for _ in range(5):
                    with socket.create_connection((host, port)) as connection:
                        listener.accept()[0].close()
                        mine.append(connection.getsockname()[:2])
            assert sorted(await ended(told, 10)) == sorted(mine)
            # That port may be some other connection's own, which ends when it likes.
            assert not set(other.read(100)) & set(mine)


def accepts(port: int, host: str, source: str) -> bool:
    try:
        with socket.create_connection((host, port), timeout=0.2, source_address=(source, 0)):
            return True
    except TimeoutError:
        return False


@needs_filter
def test_the_kernel_keeps_out_networks_and_nobody_else() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        port = listener.getsockname()[1]
        filter = ArrivalFilter(port)

        def open_to() -> list[bool]:
            return [accepts(port, host, source) for host, source in callers]

        callers = [("127.0.0.1", "127.0.0.2"), ("127.0.0.1", "127.0.0.3"), ("::1", "::1")]
        many = [ipaddress.IPv6Network((number << 64, 64)) for number in range(1, MOST_KEPT_OUT)]
        for networks, expected in (
            ([], [True, True, True]),
            ([network_of("127.0.0.3")], [True, False, True]),
            ([network_of("127.0.0.2"), network_of("127.0.0.3"), network_of("fd00::1")], [False, False, True]),
            ([network_of("fd00::1"), network_of("::2"), network_of("127.0.0.9")], [True, True, False]),
            (many, [True, True, True]),
            ([*many, network_of("::1")], [True, True, False]),
            ([*many, network_of("fd00::1"), network_of("::1")], [True, True, True]),
        ):
            filter.keep_out(networks)
            assert open_to() == expected
        before = filter.dropped()
        filter.keep_out([], everyone=True)
        assert open_to() == [False, False, False]
        assert filter.dropped() == before + 3
        filter.close()
        assert open_to() == [True, True, True]


@pytest.mark.usefixtures("counting")
async def test_who_connects_too_fast_is_refused_until_it_evens_out_and_others_are_served(way: str) -> None:
    reason = "CONNECTIONS_PER_SECOND_PER_ADDRESS"
    before = refusals(reason)
    async with serving(authenticator=None, connections=STRICT) as server, open_channel(server.address) as channel:
        await get(channel)
        with closing(connect(server, 5, source="127.0.0.2")) as early:
            await asyncio.to_thread(come_and_go, server, 40, "127.0.0.2")
            async with asyncio.timeout(20):
                # On a busy machine they may have come slowly enough.
                while not await is_refused(server, "127.0.0.2"):
                    await asyncio.to_thread(come_and_go, server, 40, "127.0.0.2")
            # Who was there before stays, and other addresses notice nothing.
            assert sum(map(is_open, early)) == 5
            assert not await is_refused(server, "127.0.0.3")
            await get(channel)
            async with open_channel(server.address) as another:
                await get(another)
            async with asyncio.timeout(20):
                while await is_refused(server, "127.0.0.2"):
                    pass
    assert refusals(reason) > before


async def test_as_many_connections_as_the_rate_allows_are_never_refused(way: str) -> None:
    limits = ConnectionLimits(per_second_per_address=1, burst_per_address=30, per_second=1, burst=30)
    async with serving(authenticator=None, connections=limits) as server:
        with closing(connect(server, 100)) as opened:  # these don't end, and are for the counts to limit
            await asyncio.to_thread(come_and_go, server, 25, "127.0.0.1")
            assert not await is_refused(server, "127.0.0.1", within_s=0.5)
            assert sum(map(is_open, opened)) == 100


@pytest.mark.usefixtures("counting")
async def test_connections_in_all_have_a_rate(way: str) -> None:
    before = refusals("CONNECTIONS_PER_SECOND")
    limits = ConnectionLimits(per_second=20, burst=20)
    async with serving(authenticator=None, connections=limits) as server, open_channel(server.address) as channel:
        await get(channel)
        for number in range(20):
            await asyncio.to_thread(come_and_go, server, 2, f"127.0.1.{number + 1}")
        async with asyncio.timeout(20):
            while not await is_refused(server, "127.0.0.9"):
                await asyncio.to_thread(come_and_go, server, 20, "127.0.1.99")
        await get(channel)
        async with asyncio.timeout(20):
            while await is_refused(server, "127.0.0.9"):
                pass
    assert refusals("CONNECTIONS_PER_SECOND") > before


async def test_refusals_cost_nothing_where_connections_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or an address that tries on and on would never be let in again."""
    taken: list[object] = []
    take = Debts.take

    def counted(debts: Debts[Any], name: Any) -> bool:
        taken.append(name)
        return take(debts, name)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "no filters")

    monkeypatch.setattr(ArrivalFilter, "keep_out", refused)
    monkeypatch.setattr(Debts, "take", counted)
    limits = ConnectionLimits(per_second_per_address=10, burst_per_address=10)
    async with serving(authenticator=None, connections=limits) as server:
        await asyncio.to_thread(come_and_go, server, 40, "127.0.0.2")
        async with asyncio.timeout(20):
            while not await is_refused(server, "127.0.0.2"):
                await asyncio.to_thread(come_and_go, server, 40, "127.0.0.2")
        before = len(taken)
        with closing(connect(server, 50, source="127.0.0.2")) as late:
            await until_open(late, 0)
        # Each of them has ended in the kernel when one that came later has.
        await asyncio.to_thread(come_and_go, server, 1, "127.0.0.3")
        async with asyncio.timeout(20):
            while network_of("127.0.0.3") not in taken:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.01)
        assert len(taken) - before <= 2 * 2  # that one, and who came while nobody looked


async def test_a_kernel_that_does_not_tell_leaves_a_server_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(_port: int) -> EndedConnections:
        raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")

    monkeypatch.setattr(arrivals, "EndedConnections", silent)
    with structlog.testing.capture_logs() as logs:
        async with serving(authenticator=None, connections=STRICT) as server, open_channel(server.address) as channel:
            await get(channel)
            await asyncio.to_thread(come_and_go, server, 40, "127.0.0.2")
            assert not await is_refused(server, "127.0.0.2")
    assert [each for each in logs if "can't be limited here" in each["event"]]


async def test_no_open_file_left_is_no_reason_to_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    exhausted = [True, True]
    build = ArrivalFilter.__init__

    def building(filter: ArrivalFilter, port: int) -> None:
        if exhausted:
            exhausted.pop()
            raise OSError(errno.EMFILE, "Too many open files")
        build(filter, port)

    monkeypatch.setattr(ArrivalFilter, "__init__", building)
    async with serving(authenticator=None, connections=STRICT) as server:
        await asyncio.to_thread(come_and_go, server, 40, "127.0.0.2")
        async with asyncio.timeout(20):
            while exhausted:
                await asyncio.to_thread(come_and_go, server, 10, "127.0.0.2")
            while not await is_refused(server, "127.0.0.2"):
                await asyncio.to_thread(come_and_go, server, 40, "127.0.0.2")
