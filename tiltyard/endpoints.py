"""Addresses as people write them: of a service, and of a training node's own inference server."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

MAX_ENDPOINT_CHARS = 255

_ADDRESS = re.compile(
    r"unix(-abstract)?:.+|(dns:///)?([^\s:/\[\]@]+|\[[0-9A-Fa-f:.%\w]+\]):(?P<port>[0-9]{1,5})", re.ASCII
)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?\Z|[0-9A-Fa-f:.]+\Z")


def check_address(text: str) -> str:
    """The address of a service as it is. Raises ValueError, saying what one looks like; nothing is looked up."""
    parts = _ADDRESS.fullmatch(text)
    if parts is None or (parts["port"] and not 0 < int(parts["port"]) < 65536):
        raise ValueError(f"{text!r} is no address: it must be HOST:PORT, [IPV6]:PORT or unix:PATH")
    return text


@dataclass(frozen=True)
class InferenceEndpoint:
    """What a training node registers, grpc://HOST:PORT or grpcs:// with TLS.

    A host name or bare IP address, a port, and whether the connection is by TLS.
    """

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
