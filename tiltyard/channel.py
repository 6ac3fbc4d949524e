"""Opens asyncio gRPC channels: a token and a deadline on every call, keepalive, retries of what is UNAVAILABLE."""

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tiltyard.identity import TokenSource

DEADLINE_S = 20.0
MAX_MESSAGE_BYTES = 4 * 1024 * 1024

# Four attempts at most. Mutating calls may be retried because they carry a request id.
SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


@dataclass(frozen=True)
class ChannelTls:
    """PEM files for TLS: the authority of the server (None: the system's), our certificate and key for mutual TLS."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """The files read."""
        return grpc.ssl_channel_credentials(*(path.read_bytes() if path else None for path in self._files()))

    def _files(self) -> tuple[Path | None, Path | None, Path | None]:
        return self.ca, self.key, self.certificate


class _Bearer:
    def __init__(self, tokens: TokenSource) -> None:
        self._tokens = tokens

    def _signed(self, details: Any) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata["authorization"] = f"Bearer {self._tokens.token()}"
        return _changed(details, metadata=metadata)


def _changed(details: Any, **changes: Any) -> grpc.aio.ClientCallDetails:
    fields = ("method", "timeout", "metadata", "credentials", "wait_for_ready")
    return grpc.aio.ClientCallDetails(**{name: changes.get(name, getattr(details, name)) for name in fields})


# gRPC files an interceptor under the first shape it finds: each shape needs a class of its own.
class _UnaryUnaryBearer(_Bearer, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._signed(client_call_details), request)


class _UnaryStreamBearer(_Bearer, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._signed(client_call_details), request)


class _StreamUnaryBearer(_Bearer, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self._signed(client_call_details), request_iterator)


class _StreamStreamBearer(_Bearer, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self._signed(client_call_details), request_iterator)


class _UnaryDeadline(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        if client_call_details.timeout is None:
            client_call_details = _changed(client_call_details, timeout=self._deadline_s)
        return await continuation(client_call_details, request)


def bearer_interceptors(tokens: TokenSource) -> Sequence[grpc.aio.ClientInterceptor]:
    """Interceptors that add `authorization: Bearer ...` to calls of all four shapes, on plaintext channels too."""
    return [
        _UnaryUnaryBearer(tokens),
        _UnaryStreamBearer(tokens),
        _StreamUnaryBearer(tokens),
        _StreamStreamBearer(tokens),
    ]


def deadline_interceptor(deadline_s: float = DEADLINE_S) -> grpc.aio.ClientInterceptor:
    """An interceptor that gives unary calls without a deadline one of `deadline_s` seconds."""
    return _UnaryDeadline(deadline_s)


def is_local(address: str) -> bool:
    """Whether `address` (`HOST:PORT` or `unix:PATH`) is on this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def channel_options(address: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, int | str]]:
    """Options of a channel to `address`: retries, keepalive, quick reconnects, message limits in bytes."""
    return [
        ("grpc.service_config", SERVICE_CONFIG),
        ("grpc.enable_retries", 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A peer that restarts on the same port is found again within a second or two.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A proxy from the environment can't reach this machine's loopback interface.
        ("grpc.enable_http_proxy", 0 if is_local(address) else 1),
    ]


def open_channel(
    address: str,
    *,
    tokens: TokenSource | None = None,
    tls: ChannelTls | None = None,
    deadline_s: float = DEADLINE_S,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """A channel to `address` (`HOST:PORT` or `unix:PATH`), plaintext without `tls`; call it in a running loop."""
    interceptors = [deadline_interceptor(deadline_s), *(bearer_interceptors(tokens) if tokens else ())]
    options = channel_options(address, max_message_bytes=max_message_bytes)
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(address, tls.credentials(), options=options, interceptors=interceptors)
