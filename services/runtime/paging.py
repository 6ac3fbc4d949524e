"""Page tokens that a caller can neither read meaning into, forge, nor carry over to another list."""

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from services.runtime.errors import InvalidArgument

_SECRET_BYTES = 32
_MAC_BYTES = 16
_MAX_TOKEN_CHARS = 2048
# Half of what an answer may have: rows are far smaller than the other half.
MAX_PAGE_BYTES = 2 * 1024 * 1024

M = TypeVar("M", bound=Message)


def load_secret(path: Path) -> bytes:
    """The 32-byte secret in `path`, created with mode 0600 when it is missing; two starts at once agree on one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            # A link, unlike a rename, leaves the file of whoever came first in place.
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink(missing_ok=True)
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise ValueError(f"{path} holds {len(secret)} bytes, a page secret has {_SECRET_BYTES}")
    return secret


class PageTokens:
    """Encodes where a list goes on (`cursor`), bound to what is listed (`query`: method, parent, filter and order)."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def _mac(self, query: str, cursor: bytes) -> bytes:
        bound = query.encode()
        message = len(bound).to_bytes(8, "big") + bound + cursor
        return hmac.new(self._secret, message, hashlib.sha256).digest()[:_MAC_BYTES]

    def encode(self, query: str, cursor: str) -> str:
        """The token of the page that begins after `cursor`; an empty cursor (the list has ended) is an empty token."""
        if not cursor:
            return ""
        raw = cursor.encode()
        return base64.urlsafe_b64encode(self._mac(query, raw) + raw).decode().rstrip("=")

    def decode(self, token: str, query: str) -> str:
        """The cursor in `token`, empty for the first page.

        Raises InvalidArgument on `page_token` for a token that was forged or comes from another list.
        """
        if not token:
            return ""
        wrong = InvalidArgument.field("page_token", "is not a token of this list", reason="INVALID_PAGE_TOKEN")
        if len(token) > _MAX_TOKEN_CHARS:
            raise wrong
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise wrong from None
        mac, cursor = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        if not cursor or not hmac.compare_digest(mac, self._mac(query, cursor)):
            raise wrong
        return cursor.decode()


def page_size(requested: int, default: int = 50, maximum: int = 1000) -> int:
    """The number of rows of a page: `default` for 0, at most `maximum` (AIP-158 lowers rather than refuses).

    Raises InvalidArgument on `page_size` for a negative number.
    """
    if requested < 0:
        raise InvalidArgument.field("page_size", f"is {requested}, must not be negative")
    return min(requested or default, maximum)


def fitting(rows: Iterable[M]) -> list[M]:
    """The first rows that go into one answer: one at least where there is one, and at most 2 MiB otherwise."""
    page: list[M] = []
    size_bytes = 0
    for row in rows:
        size_bytes += row.ByteSize()
        if page and size_bytes > MAX_PAGE_BYTES:
            break
        page.append(row)
    return page
