"""The address of a training node's own inference server, as it registers it: grpc://HOST:PORT, or grpcs:// with TLS."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

MAX_ENDPOINT_CHARS = 255

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?\Z|[0-9A-Fa-f:.]+\Z")


@dataclass(frozen=True)
class InferenceEndpoint:
    """A host name or bare IP address, a port, and whether the connection is by TLS."""

    host: str
    port: int
    tls: bool


def parse_endpoint(text: str) -> InferenceEndpoint:
    """Raises ValueError, saying what an endpoint looks like, for anything else; nothing is looked up."""
    wanted = "must be grpc://HOST:PORT or grpcs://HOST:PORT, at most 255 characters"
    if len(text) > MAX_ENDPOINT_CHARS or not text.isascii():
        raise ValueError(wanted)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(wanted) from None
    # Compared as a whole, so that nothing hides before an @, after a slash or in a spelling.
    if parts.scheme not in ("grpc", "grpcs") or not host or not port or not _HOST.match(host):
        raise ValueError(wanted)
    if text.lower() != f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}":
        raise ValueError(wanted)
    return InferenceEndpoint(host, port, tls=parts.scheme == "grpcs")
