"""Tiltyard: an open arena for machine-learning models that anyone can host and check."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiltyard.blocking import BlockingClient, BlockingNode
    from tiltyard.client import Client, ClientError, Node, client_errors, pages, watch
    from tiltyard.identity import Key
    from tiltyard.submitting import submit_model
    from tiltyard.transfers import download, upload

__all__ = [
    "BlockingClient",
    "BlockingNode",
    "Client",
    "ClientError",
    "Key",
    "Node",
    "client_errors",
    "download",
    "pages",
    "submit_model",
    "upload",
    "watch",
]

_HOME = {
    **dict.fromkeys(("BlockingClient", "BlockingNode"), "tiltyard.blocking"),
    **dict.fromkeys(("Client", "ClientError", "Node", "client_errors", "pages", "watch"), "tiltyard.client"),
    "Key": "tiltyard.identity",
    "submit_model": "tiltyard.submitting",
    **dict.fromkeys(("download", "upload"), "tiltyard.transfers"),
}


def __getattr__(name: str) -> Any:
    # The client carries grpc and all stubs; nobody pays for them who only recomputes a draw.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
