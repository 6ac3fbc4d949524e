"""Lists that can be filtered and ordered: what each knows, which page is asked for, and where the next one begins."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from services.registry.convert.enums import (
    MEMBERSHIP_STATE,
    REJECTION_REASON,
    ROLE,
    SUBMISSION_STATE,
    TASK_STATE,
    VALIDATOR_FAULT_KIND,
)
from services.registry.listing import Condition, Listing, Place
from services.runtime import names
from services.runtime.errors import InvalidArgument
from services.runtime.filters import NUMBER, TEXT, TIME, Kind, parse_filter, parse_order, words
from services.runtime.paging import PageTokens, fitting, page_size

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class ListRequest(Protocol):
    """The fields that all these requests have."""

    @property
    def page_size(self) -> int: ...
    @property
    def page_token(self) -> str: ...
    @property
    def filter(self) -> str: ...
    @property
    def order_by(self) -> str: ...


@dataclass(frozen=True)
class ListedPage:
    """One page that is asked for. `listing` reads one row more than fits, to know whether there are more."""

    listing: Listing
    query: str
    size: int

    def close(
        self, tokens: PageTokens, found: Sequence[tuple[Place, T]], message: Callable[[T], M]
    ) -> tuple[list[M], str]:
        """What the page shows, each row as its `message`, and the token of the next one."""
        shown = fitting(message(row) for _, row in found[: self.size])
        cursor = json.dumps(found[len(shown) - 1][0]) if len(found) > len(shown) else ""
        return shown, tokens.encode(self.query, cursor)


@dataclass(frozen=True, eq=False)
class Lists:
    """One method's lists: the fields of its filter, by the names of records and contract alike, and of its order."""

    method: str
    fields: Mapping[str, Kind]
    orders: Sequence[str]
    default: str
    numbered_by: str = ""
    """The field that is the rows' own numbering."""

    def open(self, request: ListRequest, tokens: PageTokens, *, parent: str = "") -> ListedPage:
        """The page that is asked for. Raises InvalidArgument on `filter`, `order_by`, `page_token` and `page_size`."""
        terms = parse_filter(request.filter, self.fields)
        order, descending = parse_order(request.order_by, self.orders, default=self.default)
        # A token goes on with the list that it comes from, so all that makes one is bound to it.
        query = json.dumps(
            [self.method, parent, [[t.field, t.operator, str(t.value)] for t in terms], order, descending]
        )
        cursor = tokens.decode(request.page_token, query)
        size = page_size(request.page_size)
        listing = Listing(
            conditions=tuple(Condition(term.field, term.operator, term.value) for term in terms),
            order="" if order == self.numbered_by else order,
            descending=descending,
            after=tuple(json.loads(cursor)) if cursor else None,
            limit=size + 1,
        )
        return ListedPage(listing, query, size)


def _participant(text: str) -> str:
    try:
        return names.parse_participant(text)
    except InvalidArgument:
        raise ValueError("must be participants/{id}") from None


_PARTICIPANT = Kind(_participant)

PARTICIPANTS = Lists(
    "ListParticipants",
    {"display_name": TEXT, "owner": _PARTICIPANT, "create_time": TIME},
    orders=("create_time", "display_name"),
    default="create_time",
)
TASKS = Lists(
    "ListTasks",
    {"state": words(TASK_STATE.named), "creator": _PARTICIPANT, "create_time": TIME, "update_time": TIME},
    orders=("create_time", "update_time"),
    default="create_time desc",
)
MEMBERS = Lists(
    "ListMembers",
    {
        "participant": _PARTICIPANT,
        "role": words(ROLE.named),
        "state": words(MEMBERSHIP_STATE.named),
        "create_time": TIME,
    },
    orders=("create_time",),
    default="create_time",
)
SUBMISSIONS = Lists(
    "ListSubmissions",
    {
        "number": NUMBER,
        "participant": _PARTICIPANT,
        "state": words(SUBMISSION_STATE.named),
        "reason": words(REJECTION_REASON.named),
        "size_bytes": NUMBER,
        "commit_time": TIME,
    },
    orders=("number", "commit_time", "size_bytes"),
    default="number",
    numbered_by="number",
)
VALIDATOR_FAULTS = Lists(
    "ListValidatorFaults",
    {"validator": _PARTICIPANT, "kind": words(VALIDATOR_FAULT_KIND.named), "time": TIME},
    orders=("time",),
    default="time",
)
