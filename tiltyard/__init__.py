"""Tiltyard: an open arena for machine-learning models that anyone can host and check."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiltyard.blocking import BlockingClient, BlockingNode
    from tiltyard.calls.tls import ChannelTls
    from tiltyard.client import Client, ClientError, Node, client_errors, new_request_id, pages, persist, watch
    from tiltyard.identity import Key
    from tiltyard.submitting import JournalMismatch, submit_model
    from tiltyard.transfers import DigestMismatch, download, upload

__all__ = [
    "BlockingClient",
    "BlockingNode",
    "ChannelTls",
    "Client",
    "ClientError",
    "DigestMismatch",
    "JournalMismatch",
    "Key",
    "Node",
    "client_errors",
    "download",
    "new_request_id",
    "pages",
    "persist",
    "submit_model",
    "upload",
    "watch",
]

_HOME = {
    **dict.fromkeys(("BlockingClient", "BlockingNode"), "tiltyard.blocking"),
    "ChannelTls": "tiltyard.calls.tls",
    **dict.fromkeys(
        ("Client", "ClientError", "Node", "client_errors", "new_request_id", "pages", "persist", "watch"),
        "tiltyard.client",
    ),
    "Key": "tiltyard.identity",
    **dict.fromkeys(("JournalMismatch", "submit_model"), "tiltyard.submitting"),
    **dict.fromkeys(("DigestMismatch", "download", "upload"), "tiltyard.transfers"),
}


def __getattr__(name: str) -> Any:
    # The client carries grpc and all stubs; nobody pays for them who only recomputes a draw.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
