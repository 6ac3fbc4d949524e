"""Pages of the lists whose rows are numbered: where one goes on, and how the next one is asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from services.runtime.paging import PageTokens, fitting, page_size

T = TypeVar("T")
M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Page:
    """One page of a list: rows beyond the position `after` (None: from the start), and one more than fit."""

    query: str
    after: int | None
    size: int

    @property
    def limit(self) -> int:
        """How many rows to read: one more than are shown, to know whether there are."""
        return self.size + 1


def open_page(query: str, tokens: PageTokens, *, size: int, token: str) -> Page:
    """The page that a request asks for. `query` names the list: a token of another one is refused."""
    cursor = tokens.decode(token, query)
    return Page(query, int(cursor) if cursor else None, page_size(size))


def close_page(
    page: Page, tokens: PageTokens, found: Sequence[tuple[int, T]], message: Callable[[T], M]
) -> tuple[list[M], str]:
    """What the page shows, each row as its `message`, and the token of the next one."""
    shown = fitting(message(row) for _, row in found[: page.size])
    cursor = str(found[len(shown) - 1][0]) if len(found) > len(shown) else ""
    return shown, tokens.encode(page.query, cursor)
