"""Tiltyard: an open arena for machine-learning models that anyone can host and check."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiltyard.client import Client, Node
    from tiltyard.identity import Key

__all__ = ["Client", "Key", "Node"]

_HOME = {"Client": "tiltyard.client", "Node": "tiltyard.client", "Key": "tiltyard.identity"}


def __getattr__(name: str) -> Any:
    # The client carries grpc and all stubs; nobody pays for them who only recomputes a draw.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
