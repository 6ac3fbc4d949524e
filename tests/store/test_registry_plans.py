"""Each documented list, and each question of the background loop, is answered from an index, not by reading a table."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any

import pytest

from services.registry import migrations
from services.registry.convert import listings
from services.registry.convert.listings import Lists
from services.registry.listing import Condition, Listing
from services.registry.queries import SqlReading
from services.registry.states import (
    MembershipState,
    RejectionReason,
    Role,
    RoundState,
    SubmissionState,
    TaskState,
    ValidatorFaultKind,
)
from services.runtime.engines import migrate
from tests.support.postgres_server import PostgresServer
from tests.support.query_plans import Plans
from tests.support.registry_fakes import START

NOW: datetime = START

# Every list in each of its orders, and with a condition on each of its fields: the first page and a later one.
LISTED: dict[Lists, Callable[[SqlReading, Listing], Any]] = {
    listings.PARTICIPANTS: lambda tx, listing: tx.participants(listing),
    listings.TASKS: lambda tx, listing: tx.tasks(listing),
    listings.MEMBERS: lambda tx, listing: tx.members("t", listing),
    listings.SUBMISSIONS: lambda tx, listing: tx.submissions_listed("t", listing),
    listings.VALIDATOR_FAULTS: lambda tx, listing: tx.validator_faults(listing, task="t"),
}
VALUES = {
    "state": TaskState.OPEN,
    "role": Role.VALIDATOR,
    "reason": RejectionReason.COPY,
    "kind": ValidatorFaultKind.OUTLIER,
    "number": 3,
    "size_bytes": 3,
    "create_time": NOW,
    "update_time": NOW,
    "commit_time": NOW,
    "time": NOW,
}


def documented() -> Iterator[tuple[str, Callable[[SqlReading], Any]]]:
    for lists, ask in LISTED.items():
        for order in lists.orders:
            own = order != lists.numbered_by
            last = ("a" if order == "display_name" else 5, 5)
            for descending, after in ((False, None), (True, None), (False, last), (True, last)):
                listing = Listing(order=order if own else "", descending=descending, after=after, limit=10)
                name = f"{lists.method} by {order}{' desc' * descending}{', a later page' * bool(after)}"
                yield name, lambda tx, ask=ask, listing=listing: ask(tx, listing)  # type: ignore[misc]
        for field in lists.fields:
            # A range in its own order, anything else in the list's.
            order, operator = (field, ">=") if field in lists.orders else (lists.default.split(" ")[0], "=")
            condition = Condition(field, operator, VALUES.get(field, "a"))
            listing = Listing((condition,), "" if order == lists.numbered_by else order, limit=10)
            yield f"{lists.method} with a {field}", lambda tx, ask=ask, listing=listing: ask(tx, listing)  # type: ignore[misc]


# Lists that the contract pages through: also their order comes from an index.
LISTS: dict[str, Callable[[SqlReading], Any]] = {
    **dict(documented()),
    "ListValidatorFaults of a validator": lambda tx: tx.validator_faults(Listing(order="time"), validator="a"),
    "ListEligibilityVerdicts": lambda tx: tx.verdicts("t", after=5, limit=10),
    "ListEvaluations": lambda tx: tx.evaluations("t", 1),
    "WatchAssignments": lambda tx: tx.assignments_of("a", after=5, limit=10),
    "ListEntries": lambda tx: tx.leaves(start=5, limit=10),
}
QUESTIONS: dict[str, Callable[[SqlReading], Any]] = {
    "GetSubmission": lambda tx: tx.submission("t", 1),
    "the assignments of a submission": lambda tx: tx.assignments("t", 1),
    "what is due of tasks": lambda tx: tx.tasks_due(NOW),
    "what is due of submissions": lambda tx: tx.submissions_due(SubmissionState.COMMITTED, NOW),
    "what is due of rounds": lambda tx: tx.rounds_due(RoundState.SEALING, NOW),
    "what was touched of rounds": lambda tx: tx.rounds_touched(RoundState.SEALING, after=5),
    "what is due of assignments": lambda tx: tx.assignments_due(NOW),
    "what is not settled": lambda tx: tx.assignments_unsettled(limit=10),
    "what is not settled of a task": lambda tx: tx.assignments_unsettled(task="t", limit=1),
    "whether anybody was drawn": lambda tx: tx.has_draws("t"),
    "whose structure is unchecked": lambda tx: tx.submissions_unchecked(),
    "what is hidden": lambda tx: tx.submissions_hidden("t", limit=10),
    "models of one digest": lambda tx: tx.submissions_with_digest("t", b"d"),
    "the daily limit": lambda tx: tx.count_submissions("t", "a", since=NOW),
    "members in a state": lambda tx: tx.members_in(MembershipState.LEFT, removed=False),
    "the track record": lambda tx: tx.track_record("a", outside_owner_group_of="a"),
    "tasks in a state": lambda tx: tx.tasks_in(TaskState.CLOSED),
    "artifact uses": lambda tx: tx.artifact_uses("00"),
    "artifacts of an owner": lambda tx: tx.artifacts_of("a"),
    "artifacts by their first digits": lambda tx: tx.artifacts_with("ab"),
    "the next deadline": lambda tx: tx.next_deadline(),
    "the nodes of a proof": lambda tx: prove(tx),
    "endorsements": lambda tx: tx.endorsements("a", limit=100),
    "endorsements by some": lambda tx: tx.endorsements("a", by={"b", "c"}, limit=100),
}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def plans(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plans]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('plans') / 'registry.db'}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.database()
    migrate(url, migrations)
    found = Plans(url)
    yield found
    found.close()


def prove(tx: SqlReading) -> None:
    """The two questions of a proof, which find nothing here."""
    with suppress(LookupError):
        tx.log_nodes([(0, 5), (1, 3), (2, 0)])


@pytest.mark.parametrize("name", LISTS)
def test_a_list_reads_its_page_in_order_from_an_index(plans: Plans, name: str) -> None:
    steps = plans.of(lambda connection: LISTS[name](SqlReading(connection)), in_order=True)
    assert steps
    # A list over everything in order of an index reads that from one end, and stops at the limit.
    whole = name.startswith(("ListParticipants by", "ListTasks by"))
    assert not [step for step in steps if step.whole_table or (step.whole_index and not whole)], steps
    assert not [step for step in steps if step.sorts], steps


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_reads_no_whole_table(plans: Plans, name: str) -> None:
    steps = plans.of(lambda connection: QUESTIONS[name](SqlReading(connection)))
    assert steps
    assert not [step for step in steps if step.whole_table or step.whole_index], steps


def test_a_question_without_an_index_would_be_found(plans: Plans) -> None:
    steps = plans.of(lambda connection: connection.exec_driver_sql("SELECT * FROM submissions WHERE size_bytes = 1"))
    assert [step for step in steps if step.whole_table or step.whole_index], steps
    unordered = "SELECT * FROM submissions WHERE task = 't' ORDER BY detail"
    steps = plans.of(lambda connection: connection.exec_driver_sql(unordered), in_order=True)
    assert [step for step in steps if step.sorts], steps
