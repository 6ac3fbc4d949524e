"""TLS from PEM files that may be replaced at any time: read again when they change, and a channel that follows."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

SYSTEM_AUTHORITIES = "system"
"""Stands for the operating system's authorities where a file of one's own could be named."""

_LOOK_EVERY_S = 1.0

_log = logging.getLogger("tiltyard.calls.tls")


class InvalidPem(ValueError):
    """PEM files that can't be used, alone or together; the text names the file."""


@dataclass(frozen=True)
class Pem:
    """What the files held when they were read: each None where there is no such file."""

    ca: bytes | None
    certificate: bytes | None
    key: bytes | None


@dataclass(frozen=True)
class PemFiles:
    """The files of one end of a connection: the authority that it trusts, its own certificate chain, and their key."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def read(self) -> Pem:
        """Reads them and checks that they belong together. Raises InvalidPem, or OSError for a file that is not there.

        The key must be that of the certificate: two files are never replaced in one step.
        """
        if (self.certificate is None) != (self.key is None):
            raise InvalidPem(f"{self.certificate or self.key}: a certificate and its key go together")
        pem = Pem(*(path.read_bytes() if path else None for path in (self.ca, self.certificate, self.key)))
        if pem.ca is not None:
            _certificates(self.ca, pem.ca)
        if pem.certificate is not None and pem.key is not None:
            try:
                key = load_pem_private_key(pem.key, password=None).public_key()
            except (ValueError, TypeError) as error:
                raise InvalidPem(f"{self.key} holds no unencrypted PEM key") from error
            leaf = _certificates(self.certificate, pem.certificate)[0]
            if _spki(leaf.public_key()) != _spki(key):
                raise InvalidPem(f"{self.key} is not the key of {self.certificate}")
            if not _is_spoken(key):
                raise InvalidPem(f"{self.certificate}: gRPC takes certificates with keys of RSA, P-256 and P-384 alone")
        return pem

    def version(self) -> tuple[object, ...]:
        """Changes when a file is written or replaced. Raises OSError while one is not there."""
        return tuple(
            (status.st_mtime_ns, status.st_size, status.st_ino)
            for status in (os.stat(path) for path in (self.ca, self.certificate, self.key) if path)
        )


def _certificates(path: Path | None, pem: bytes) -> list[x509.Certificate]:
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise InvalidPem(f"{path} holds no PEM certificate") from error
    # One that is cut off would be passed over: the rest of a chain, or an authority that is still to be trusted.
    if len(certificates) < pem.count(b"-----BEGIN CERTIFICATE-----"):
        raise InvalidPem(f"{path} ends within a certificate")
    return certificates


def _is_spoken(public_key: object) -> bool:
    """Whether gRPC's own TLS takes a certificate with this key: others end each handshake, without a word of why."""
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        return isinstance(public_key.curve, ec.SECP256R1 | ec.SECP384R1)
    return isinstance(public_key, rsa.RSAPublicKey)


def _spki(public_key: Any) -> bytes:
    encoded: bytes = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


class FollowedPem:
    """The last good content of PEM files. While they are being replaced, or hold nonsense, the earlier one stays.

    Not safe between threads: its user sees to that.
    """

    def __init__(self, files: PemFiles) -> None:
        self._files = files
        self._version = files.version()
        self._complaint = ""
        self.pem = files.read()

    def changed(self) -> bool:
        """Reads again what has changed since the last look; whether `pem` is another now."""
        try:
            version = self._files.version()
            if version == self._version:
                return False
            pem = self._files.read()
        except (OSError, InvalidPem) as error:
            # Perhaps half replaced: the next look finds the rest.
            if str(error) != self._complaint:
                self._complaint = str(error)
                _log.warning("certificates can't be read again, the earlier ones stay: %s", error)
            return False
        self._version, self._complaint = version, ""
        changed, self.pem = pem != self.pem, pem
        return changed


@dataclass(frozen=True)
class ChannelTls:
    """TLS of a client: the server's authority (None: the system's), our certificate and key for mutual TLS."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def of(cls, ca: str, certificate: Path | None, key: Path | None) -> "ChannelTls | None":
        """TLS as settings say it: `ca` is a file, `system`, or empty for plaintext (None)."""
        if not ca:
            return None
        return cls(None if ca == SYSTEM_AUTHORITIES else Path(ca), certificate, key)

    @property
    def files(self) -> PemFiles:
        """What is read."""
        return PemFiles(self.ca, self.certificate, self.key)

    def credentials(self) -> grpc.ChannelCredentials:
        """The files as they are now. Raises InvalidPem and OSError."""
        return channel_credentials(self.files.read())


def channel_credentials(pem: Pem) -> grpc.ChannelCredentials:
    """Credentials of a client that trusts `pem.ca` and shows `pem.certificate`."""
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)


class _Leg:
    """One channel of several that follow each other, and the calls that still run on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.calls = 0
        self.retired = False


class FollowingChannel(grpc.aio.Channel):
    """A channel whose next call goes out with the certificates that lie in its files then.

    gRPC for Python reads a client's certificates once: here a changed file means a new connection for the calls from
    then on, while those that run end on the earlier one.
    """

    def __init__(
        self,
        files: PemFiles,
        connect: Callable[[Pem], grpc.aio.Channel],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._followed = FollowedPem(files)
        self._connect = connect
        self._clock = clock
        self._looked_at = clock()
        self._leg = _Leg(connect(self._followed.pem))
        self._closing: set[asyncio.Task[None]] = set()
        self._retired: set[_Leg] = set()

    def _current(self) -> _Leg:
        now = self._clock()
        if now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            if self._followed.changed():
                earlier, self._leg = self._leg, _Leg(self._connect(self._followed.pem))
                earlier.retired = True
                self._retired.add(earlier)
                self._close_when_idle(earlier)
        return self._leg

    def _close_when_idle(self, leg: _Leg) -> None:
        if leg.retired and not leg.calls and leg in self._retired:
            self._retired.discard(leg)
            closing = asyncio.ensure_future(leg.channel.close(None))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _call(self, leg: _Leg, call: Any) -> Any:
        leg.calls += 1

        def done(_call: object) -> None:
            leg.calls -= 1
            self._close_when_idle(leg)

        call.add_done_callback(done)
        return call

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """A method of this shape; see grpc.aio.Channel."""
        return _UnaryUnary(self, "unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """A method of this shape; see grpc.aio.Channel."""
        return _UnaryStream(self, "unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """A method of this shape; see grpc.aio.Channel."""
        return _StreamUnary(self, "stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """A method of this shape; see grpc.aio.Channel."""
        return _StreamStream(self, "stream_stream", args, kwargs)

    async def close(self, grace: float | None = None) -> None:
        """Closes it; calls that run have `grace` seconds to end."""
        channels = [self._leg.channel, *(leg.channel for leg in self._retired)]
        self._retired.clear()
        await asyncio.gather(*(channel.close(grace) for channel in channels), *self._closing)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """The connection's state."""
        return self._current().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Returns once the connection's state is another."""
        await self._current().channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Returns once there is a connection."""
        await self._current().channel.channel_ready()

    async def __aenter__(self) -> "FollowingChannel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close(None)


class _Method:
    def __init__(self, channel: FollowingChannel, shape: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._channel = channel
        self._bind: Callable[[grpc.aio.Channel], Any] = lambda on: getattr(on, shape)(*args, **kwargs)
        self._bound: tuple[_Leg, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leg = self._channel._current()
        if self._bound is None or self._bound[0] is not leg:
            self._bound = leg, self._bind(leg.channel)
        return self._channel._call(leg, self._bound[1](*args, **kwargs))


# Callers tell the shape of a method by its type.
class _UnaryUnary(_Method, grpc.aio.UnaryUnaryMultiCallable[Any, Any]):
    pass


class _UnaryStream(_Method, grpc.aio.UnaryStreamMultiCallable[Any, Any]):
    pass


class _StreamUnary(_Method, grpc.aio.StreamUnaryMultiCallable[Any, Any]):
    pass


class _StreamStream(_Method, grpc.aio.StreamStreamMultiCallable[Any, Any]):
    pass
