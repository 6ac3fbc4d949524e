"""Lists with filters and orders, read in pages while others write, on SQLite and on PostgreSQL."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest

from services.registry.changes import ChangeBoard
from services.registry.convert import listings
from services.registry.convert.listings import Lists
from services.registry.convert.submissions import submission_message
from services.registry.listing import Condition, Listing, Place
from services.registry.records import Participant, Submission, Task, ValidatorFault
from services.registry.states import SubmissionState, TaskState, ValidatorFaultKind
from services.registry.store import SqlStore
from services.registry.submissions import SubmissionView
from services.registry.transaction import Writing
from services.runtime.database import Database
from services.runtime.errors import InvalidArgument
from services.runtime.names import parse_submission
from services.runtime.paging import PageTokens
from tests.support.registry_fakes import START, SettableClock
from tests.support.registry_world import task_config
from tiltyard.registry.v1 import submission_pb2

TOKENS = PageTokens(bytes(32))
ADA, BOB = "a" * 40, "b" * 40
SECOND = timedelta(seconds=1)


@dataclass
class Request:
    """What all list requests have."""

    filter: str = ""
    order_by: str = ""
    page_size: int = 0
    page_token: str = ""


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[SqlStore]:
    clock = SettableClock()
    database = Database.open(database_url, migrations="services.registry.migrations", clock=clock)
    yield SqlStore(database, ChangeBoard(), clock)
    await database.close()


def submission(number: int, **changes: object) -> Submission:
    made = Submission(
        task="t",
        number=number,
        participant=BOB if number % 2 else ADA,
        state=SubmissionState.REVEALED if number > 2 else SubmissionState.COMMITTED,
        commitment=bytes(32),
        commit_time=START + number * SECOND,
        deadline=None,
        size_bytes=number % 3 * 100,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def put_submissions(*numbers: int) -> Callable[[Writing], None]:
    def put(tx: Writing) -> None:
        for number in numbers:
            tx.put_submission(submission(number))

    return put


def message_of(found: Submission) -> submission_pb2.Submission:
    return submission_message(SubmissionView(found, validators=(), ranking_round=1))


async def listed(store: SqlStore, **fields: str) -> list[int]:
    """Numbers of submissions, all pages of two."""
    numbers: list[int] = []
    request = Request(**fields, page_size=2)  # type: ignore[arg-type]
    while True:
        page = listings.SUBMISSIONS.open(request, TOKENS, parent="t")
        found = await store.read(lambda tx, page=page: tx.submissions_listed("t", page.listing))  # type: ignore[misc]
        shown, request.page_token = page.close(TOKENS, found, message_of)
        numbers += [parse_submission(each.name)[1] for each in shown]
        if not request.page_token:
            return numbers


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"order_by": "number desc"}, [5, 4, 3, 2, 1]),
        ({"order_by": " commit_time  desc "}, [5, 4, 3, 2, 1]),
        # Those of one size in the order of their numbers, also across pages.
        ({"order_by": "size_bytes"}, [3, 1, 4, 2, 5]),
        ({"order_by": "size_bytes desc"}, [5, 2, 4, 1, 3]),
        ({"filter": "number > 1 AND number <= 4"}, [2, 3, 4]),
        ({"filter": "size_bytes >= 100", "order_by": "size_bytes desc"}, [5, 2, 4, 1]),
        ({"filter": "size_bytes != 100"}, [2, 3, 5]),
        ({"filter": "state != COMMITTED"}, [3, 4, 5]),
        ({"filter": f"state = REVEALED AND participant = participants/{BOB}"}, [3, 5]),
        ({"filter": f"participant != participants/{BOB}"}, [2, 4]),
        ({"filter": "commit_time < 2026-01-01T00:00:03Z"}, [1, 2]),
        ({"filter": "commit_time >= 2026-01-01T01:00:03+01:00"}, [3, 4, 5]),
        ({"filter": "commit_time = 2026-01-01T00:00:02.000000Z"}, [2]),
        # What has no reason is not of this one, and is other than it.
        ({"filter": "reason = COPY"}, []),
        ({"filter": "reason != COPY"}, [1, 2, 3, 4, 5]),
    ],
)
async def test_submissions_are_filtered_and_ordered(
    store: SqlStore, fields: dict[str, str], numbers: list[int]
) -> None:
    await store.write(put_submissions(1, 2, 3, 4, 5))
    assert await listed(store, **fields) == numbers


@pytest.mark.parametrize("order", ["number", "number desc", "size_bytes", "size_bytes desc"])
async def test_what_is_written_between_pages_neither_repeats_nor_hides_a_row(store: SqlStore, order: str) -> None:
    at_first = list(range(10, 40, 2))
    await store.write(put_submissions(*at_first))
    seen: list[int] = []
    request, later = Request(order_by=order, page_size=4), iter((*range(1, 9), *range(11, 40, 4), *range(50, 60)))
    while True:
        page = listings.SUBMISSIONS.open(request, TOKENS, parent="t")
        found = await store.read(lambda tx, page=page: tx.submissions_listed("t", page.listing))  # type: ignore[misc]
        shown, request.page_token = page.close(TOKENS, found, message_of)
        seen += [parse_submission(each.name)[1] for each in shown]
        if not request.page_token:
            break
        # Before, within and behind what has been read; and a change of what has been.
        await store.write(put_submissions(*(next(later, 99) for _ in range(5))))
        first = submission(seen[0], detail="changed")
        await store.write(lambda tx, first=first: tx.put_submission(first))  # type: ignore[misc]
    assert len(seen) == len(set(seen))
    assert [number for number in seen if number in at_first] == sorted(
        at_first, key=lambda n: (n % 3 if "size" in order else 0, n), reverse=order.endswith("desc")
    )


async def test_tasks_participants_and_faults_are_ordered_by_times_and_names(store: SqlStore) -> None:
    def put(tx: Writing) -> None:
        for place, name in enumerate(("Cy", "Ada", "Bob", "Ada")):
            when = START + (3 - place) * SECOND
            owner = ADA if name == "Bob" else None
            tx.put_participant(Participant(f"{place}" * 40, name, bytes(32), owner, when))
            state = TaskState.OPEN if place else TaskState.PREPARING
            tx.put_task(Task(f"t{place}", ADA if place else BOB, task_config(), state, when, when))
            kind = ValidatorFaultKind.OUTLIER if place else ValidatorFaultKind.OFFER_EXPIRED
            tx.put_validator_fault(ValidatorFault("t", 1, 1, f"{place}" * 40, kind, when), costs_stake=False)

    await store.write(put)

    async def people(**fields: str) -> list[str]:
        page = listings.PARTICIPANTS.open(Request(**fields), TOKENS)  # type: ignore[arg-type]
        return [found.id[0] for _, found in await store.read(lambda tx: tx.participants(page.listing))]

    async def tasks(**fields: str) -> list[str]:
        page = listings.TASKS.open(Request(**fields), TOKENS)  # type: ignore[arg-type]
        return [found.id for _, found in await store.read(lambda tx: tx.tasks(page.listing))]

    async def faults(**fields: str) -> list[str]:
        page = listings.VALIDATOR_FAULTS.open(Request(**fields), TOKENS)  # type: ignore[arg-type]
        return [found.validator[0] for _, found in await store.read(lambda tx: tx.validator_faults(page.listing))]

    assert await people() == ["3", "2", "1", "0"]
    assert await people(order_by="display_name") == ["1", "3", "2", "0"]
    assert await people(filter='display_name = "Ada"') == ["3", "1"]
    assert await people(filter=f"owner = participants/{ADA}") == ["2"]
    assert await people(filter=f"owner != participants/{ADA}") == ["3", "1", "0"]
    assert await tasks() == ["t0", "t1", "t2", "t3"]
    assert await tasks(order_by="create_time asc", filter="state = TASK_STATE_OPEN") == ["t3", "t2", "t1"]
    assert await tasks(filter=f"creator = participants/{BOB}") == ["t0"]
    assert await faults(order_by="time desc", filter="kind = OUTLIER") == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ("colour", "at character 1: expected one of commit_time, number, size_bytes"),
        ("number down", "at character 8: expected asc, desc or the end"),
        ("number desc, size_bytes", "at character 12: expected asc, desc or the end"),
        ("numberdesc", "at character 1: expected one of commit_time, number, size_bytes"),
    ],
)
def test_an_order_that_cannot_be_read_is_named_by_its_position(order: str, problem: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        listings.SUBMISSIONS.open(Request(order_by=order), TOKENS, parent="t")
    assert [(v.field, v.description) for v in refused.value.violations] == [("order_by", problem)]


@pytest.mark.parametrize(
    ("lists", "request_", "parent"),
    [
        (listings.MEMBERS, Request(), "t"),
        (listings.SUBMISSIONS, Request(), "u"),
        (listings.SUBMISSIONS, Request(order_by="number desc"), "t"),
        (listings.SUBMISSIONS, Request(filter="number > 1"), "t"),
        (listings.SUBMISSIONS, Request(order_by="size_bytes"), "t"),
    ],
)
def test_a_token_goes_on_with_its_own_list_alone(lists: Lists, request_: Request, parent: str) -> None:
    first = listings.SUBMISSIONS.open(Request(page_size=1), TOKENS, parent="t")
    found: list[tuple[Place, Submission]] = [((1, 1), submission(1)), ((2, 2), submission(2))]
    shown, token = first.close(TOKENS, found, message_of)
    assert shown == [message_of(submission(1))]
    again = listings.SUBMISSIONS.open(Request(page_size=1, order_by="number asc", page_token=token), TOKENS, parent="t")
    assert again.listing == Listing(after=(1, 1), limit=2)
    for strange in (replace(request_, page_token=token), Request(page_token=token[:-1] + "A", page_size=1)):
        with pytest.raises(InvalidArgument) as refused:
            lists.open(strange, TOKENS, parent=parent)
        assert refused.value.violations[0].field == "page_token"


def test_a_condition_keeps_its_kind() -> None:
    page = listings.TASKS.open(Request(filter="state != OPEN"), TOKENS)
    assert page.listing.conditions == (Condition("state", "!=", TaskState.OPEN),)
    assert (page.listing.order, page.listing.descending) == ("create_time", True)
