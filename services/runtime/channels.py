"""Channels from a service to its peers: the public channel, signed with the service's own key."""

import grpc

from tiltyard.calls.channel import MAX_MESSAGE_BYTES, open_channel
from tiltyard.calls.outgoing import DEADLINE_S
from tiltyard.calls.tls import ChannelTls
from tiltyard.identity import Key, TokenSource


def open_peer(
    address: str,
    *,
    key: Key,
    audience: str,
    tls: ChannelTls | None = None,
    deadline_s: float = DEADLINE_S,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """A channel to the peer at `address` whose calls carry a token of `key` for `audience` (`{origin}/selector`)."""
    return open_channel(
        address,
        tokens=TokenSource(key, audience),
        tls=tls,
        deadline_s=deadline_s,
        max_message_bytes=max_message_bytes,
    )
