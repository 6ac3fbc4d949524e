"""One gRPC server for every service: health, reflection, channelz, the interceptors, limits, and a graceful drain."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
import structlog
from grpc_channelz.v1 import channelz, channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from services.runtime import process_metrics
from services.runtime.arrivals import ArrivalKeeper
from services.runtime.auth import AccessPolicy, Authenticator, utc_now
from services.runtime.certificates import ServerTls
from services.runtime.connections import ConnectionLimits, Doorkeeper, raise_file_limit
from services.runtime.drain import Drain
from services.runtime.idempotency import RequestMemory
from services.runtime.interceptors import CallInterceptor
from services.runtime.limits import CallGate, CallLimits
from services.runtime.memory import keep_what_is_loaded
from tiltyard.calls.allocator import keep_message_memory

if TYPE_CHECKING:  # a model server has no database: it need not wait for SQLAlchemy's import
    from services.runtime.database import Database
    from services.runtime.settings import ServiceSettings

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_CONCURRENT_RPCS = 2048
GRACE_S = 10.0
# The event loop and the database's threads take turns. With Python's 5 ms a call waits as long wherever it passes from
# one to the other: under 16 clients of the registry the 99th percentile of its writes fell to a fifth.
_SWITCH_S = 0.0002
_REMEMBER_REQUESTS_FOR = timedelta(days=7)
_FORGET_EVERY_S = 3600.0
_MAX_BACKOFF_S = 30.0
_CANCEL_AGAIN_S = 0.2

_log = structlog.get_logger("tiltyard.server")

Background = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Mount:
    """A servicer to serve: its full proto name, and a function that adds it to a server."""

    service_name: str
    add: Callable[[grpc.aio.Server], None]


class ArenaServer:
    """A grpc.aio server that is NOT_SERVING until told otherwise, and that drains before it stops.

    Without an `authenticator` no call is asked for a token: for a private Unix socket only. `remembered` is where
    `@idempotent` methods find earlier answers (the service's Database). Without `limits` callers have none of their
    own. A client's stream that is silent for `stream_idle_s` seconds ends with UNAVAILABLE (0: never).
    """

    def __init__(
        self,
        listen: str,
        mounts: Sequence[Mount],
        *,
        authenticator: Authenticator | None,
        policy: AccessPolicy | None = None,
        remembered: RequestMemory | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_concurrent_rpcs: int | None = MAX_CONCURRENT_RPCS,
        tls: ServerTls | None = None,
        limits: CallLimits | None = None,
        connections: ConnectionLimits = ConnectionLimits(),  # noqa: B008 - frozen
        stream_idle_s: float = 0.0,
    ) -> None:
        keep_message_memory()
        self._listen = listen
        self._mounts = tuple(mounts)
        self._tls = tls
        self._port = 0
        self._drain = Drain()
        self._connections = connections
        self._keepers: list[asyncio.Task[None]] = []
        gate = CallGate(limits, room=max_concurrent_rpcs) if limits else None
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(self._drain, authenticator, policy, remembered, gate, stream_idle_s)],
            options=[*_options(max_message_bytes, strangers=limits is not None), *connections.options()],
            maximum_concurrent_rpcs=gate.most_begun if gate else max_concurrent_rpcs,
        )
        self._health = health.HealthServicer()

    @property
    def port(self) -> int:
        """The TCP port bound to, after `start`; 0 on a Unix socket."""
        return self._port

    @property
    def address(self) -> str:
        """What a client connects to."""
        if self._listen.startswith("unix:"):
            return self._listen
        return f"{self._listen.rpartition(':')[0]}:{self._port}"

    async def start(self) -> None:
        """Binds and answers calls, health with NOT_SERVING. Raises RuntimeError when the address can't be bound."""
        for mount in self._mounts:
            mount.add(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        channelz_pb2_grpc.add_ChannelzServicer_to_server(channelz.aio.ChannelzServicer(), self._server)
        names = [mount.service_name for mount in self._mounts]
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        channelz_name = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
        reflection.enable_server_reflection([*names, health_name, channelz_name, reflection.SERVICE_NAME], self._server)
        await self.set_serving(False)
        try:
            # Nobody listens in on a Unix socket.
            if self._tls is None or self._listen.startswith("unix:"):
                self._port = self._server.add_insecure_port(self._listen)
            else:
                self._port = self._server.add_secure_port(self._listen, self._tls.credentials())
        except RuntimeError as error:
            raise RuntimeError(f"TILTYARD_LISTEN: {self._listen} is taken, or no address of this machine") from error
        if self._listen.startswith("unix:"):
            self._port = 0
        await self._server.start()
        if self._port and self._connections.per_address:
            doorkeeper = Doorkeeper(self._port, self._connections.per_address)
            self._keepers.append(asyncio.create_task(doorkeeper.run(), name="doorkeeper"))
        if self._port and (self._connections.per_second or self._connections.per_second_per_address):
            arrivals = ArrivalKeeper(self._port, self._connections)
            self._keepers.append(asyncio.create_task(arrivals.run(), name="arrivals"))

    async def set_serving(self, serving: bool) -> None:
        """What health answers, for the server as a whole ("") and for each mounted service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *(mount.service_name for mount in self._mounts)):
            await self._health.set(name, status)

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Says NOT_SERVING, ends the watches, takes no new call, lets those in flight finish for `grace_s` seconds."""
        await self.set_serving(False)
        # Calls in flight keep the connection open, so health still answers on it while they finish.
        draining = asyncio.create_task(self._drain.drain())
        await self._server.stop(grace_s)
        draining.cancel()
        for keeper in self._keepers:
            keeper.cancel()

    async def __aenter__(self) -> Self:
        await self.start()
        await self.set_serving(True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop(grace_s=0)


def _options(max_message_bytes: int, *, strangers: bool) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Two servers on one port would share its calls at random.
        ("grpc.so_reuseport", 0),
        ("grpc.enable_channelz", 1),
    ]
    if strangers:
        # To fill fast connections gRPC lets each stream send up to half a gigabyte that nobody has asked for.
        options.append(("grpc.http2.bdp_probe", 0))
    return options


def server_tls(settings: "ServiceSettings") -> ServerTls | None:
    """The TLS files named in the settings, None for plaintext."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return ServerTls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)


async def serve(
    settings: "ServiceSettings",
    mounts: Sequence[Mount],
    *,
    name: str,
    authenticator: Authenticator | None,
    policy: AccessPolicy | None = None,
    remembered: "Database | None" = None,
    background: Sequence[Background] = (),
    on_close: Sequence[Background] = (),
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_concurrent_rpcs: int | None = MAX_CONCURRENT_RPCS,
    grace_s: float = GRACE_S,
    switch_s: float = _SWITCH_S,
) -> None:
    """Serves until SIGTERM or SIGINT: starts, runs `background`, says SERVING; then drains and runs `on_close`.

    A background function that dies is logged and started again after a growing pause; one that returns is done.
    `remembered` is the service's Database: without it, repeated requests are found out only at their first write.
    `switch_s` is how long one thread keeps the interpreter while another waits for it.
    """
    raise_file_limit()
    process_metrics.follow_disks(settings.written_folders)
    if remembered is not None:
        sys.setswitchinterval(switch_s)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = ArenaServer(
        settings.listen,
        mounts,
        authenticator=authenticator,
        policy=policy,
        remembered=remembered,
        max_message_bytes=max_message_bytes,
        max_concurrent_rpcs=max_concurrent_rpcs,
        tls=server_tls(settings),
        limits=settings.call_limits,
        connections=settings.connection_limits,
        stream_idle_s=settings.stream_idle_s,
    )
    jobs = list(background)
    if remembered is not None:
        jobs.append(lambda: _forget_requests(remembered))
    tasks: list[asyncio.Task[None]] = []
    try:
        await server.start()
        tasks = [asyncio.create_task(_keep_running(job)) for job in jobs]
        keep_what_is_loaded()
        await server.set_serving(True)
        _log.info("serving", name=name, address=server.address)
        await stop.wait()
        _log.info("draining", name=name)
        await server.set_serving(False)
    finally:
        await _cancel(tasks)
        await server.stop(grace_s)
        for close in on_close:
            await close()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    _log.info("stopped", name=name)


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        # asyncio.wait_for (before Python 3.12) and calls of grpc.aio swallow a cancellation that comes as they end.
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)


async def _keep_running(job: Background, first_pause_s: float = 0.2) -> None:
    pause_s = first_pause_s
    loop = asyncio.get_running_loop()
    while True:
        started = loop.time()
        try:
            await job()
            return
        except Exception as error:
            if loop.time() - started > _MAX_BACKOFF_S:
                pause_s = first_pause_s
            name = getattr(job, "__qualname__", repr(job))
            _log.error("background work died, it starts again", work=name, pause_s=pause_s, exc_info=error)
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, _MAX_BACKOFF_S)


async def _forget_requests(database: "Database") -> None:
    while True:
        await database.forget_requests(utc_now() - _REMEMBER_REQUESTS_FOR)
        await asyncio.sleep(_FORGET_EVERY_S)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a composition root to its end: `run(main())` under `if __name__ == "__main__"`.

    What ends it before is logged whole, and told once more in the last line on standard error; the status is 1.
    """
    # An interrupt that came before serve() took the signals over ends the process just the same.
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(main)
        except Exception as error:
            _log.critical("ended by an error", exc_info=error)
            # SQLAlchemy puts the statement and a link behind what the database has said.
            cause = getattr(error, "orig", None) or error
            sys.stderr.write(f"{type(cause).__name__}: {' '.join(str(cause).split())}\n")
            raise SystemExit(1) from None
