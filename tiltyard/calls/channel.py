"""Opens asyncio gRPC channels: TLS that follows its files, tokens, deadlines, keepalive, retries on a budget."""

import ipaddress
import json
from typing import TYPE_CHECKING

import grpc

from tiltyard.calls.allocator import keep_message_memory
from tiltyard.calls.outgoing import DEADLINE_S, outgoing_interceptors
from tiltyard.identity import TokenSource

if TYPE_CHECKING:
    from tiltyard.calls.tls import ChannelTls, Pem

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
INFERENCE_MESSAGE_BYTES = 16 * 1024 * 1024
"""Of the Open Inference Protocol alone: batches of rows, and what a model answers to them."""

SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                # All methods: a change is keyed by what it changes, or carries a request id (see `outgoing`).
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        # The budget: a failure costs one of a hundred tokens, a success brings a tenth of one back, and with half of
        # them gone nothing is repeated. A peer in trouble gets a tenth more calls in the end, not four times as many.
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
    }
)


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
        # How long an attempt may take, not a pause: an encrypted one is four round trips, of 0.3 s between continents.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # And so is one that comes back at another address: a container, say. gRPC would ask for it every 30 s only.
        ("grpc.dns_min_time_between_resolutions_ms", 2_000),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A proxy from the environment can't reach this machine's loopback interface.
        ("grpc.enable_http_proxy", 0 if is_local(address) else 1),
    ]


def open_channel(
    address: str,
    *,
    tokens: TokenSource | None = None,
    tls: "ChannelTls | None" = None,
    deadline_s: float = DEADLINE_S,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """A channel to `address` (`HOST:PORT` or `unix:PATH`), plaintext without `tls`; call it in a running loop.

    The files of `tls` are read again when they change. Raises tls.InvalidPem and OSError when they can't
    be used.
    """
    keep_message_memory()
    interceptors = outgoing_interceptors(address, tokens=tokens, deadline_s=deadline_s)
    options = channel_options(address, max_message_bytes=max_message_bytes)
    # Nobody listens in on a Unix socket.
    if tls is None or address.startswith("unix:"):
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    # Loading X.509 takes a command 30 ms.
    from tiltyard.calls.tls import FollowingChannel, channel_credentials

    def connect(pem: "Pem") -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, channel_credentials(pem), options=options, interceptors=interceptors)

    return FollowingChannel(tls.files, connect)
