"""Assignments and leases in the contract's words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from services.registry.assignments import EvaluationOrder, Lease
from services.registry.convert.enums import ASSIGNMENT_STATE, METRIC, MODEL_FORMAT
from services.registry.convert.times import duration, timestamp
from services.registry.duty_watch import Told
from services.registry.records import Assignment
from services.runtime import names
from services.runtime.errors import InvalidArgument
from services.runtime.fields import FieldChecks
from services.runtime.names import AssignmentId
from services.runtime.paging import PageTokens, page_size
from tiltyard.registry.v1 import assignment_pb2
from tiltyard.wire import model_spec_to_proto

# A cursor is what has been told: `seen`, `seen:begun`, and after either `,first-last` for each range beyond.
_CURSOR = re.compile(r"(?P<seen>[0-9]{1,18})(:(?P<begun>[0-9]{1,18}))?(?P<beyond>(,[0-9]{1,18}-[0-9]{1,18})*)")
_MAX_CURSOR_CHARS = 50_000
_MAX_TOKEN_CHARS = 100
_MAX_REASON_CHARS = 500


@dataclass(frozen=True)
class AssignmentQuery:
    """One page of ListAssignments: of a submission, or of the caller where there is none."""

    submission: tuple[str, int] | None
    after: tuple[int, int]
    """Round and position in a submission; 0 and the sequence over all tasks."""
    size: int
    query: str

    @property
    def limit(self) -> int:
        """How many to read: one more, to know whether there are."""
        return self.size + 1


def told_of(request: assignment_pb2.WatchAssignmentsRequest) -> Told | None:
    """What the watcher has been told, None for nothing yet."""
    if not request.cursor:
        return None
    read = _CURSOR.fullmatch(request.cursor) if len(request.cursor) <= _MAX_CURSOR_CHARS else None
    if read is None:
        raise InvalidArgument.field("cursor", "is not a cursor of this stream")
    ranges = [each.split("-") for each in read["beyond"].split(",")[1:]]
    return Told(int(read["seen"]), tuple((int(first), int(last)) for first, last in ranges), int(read["begun"] or 0))


def accept_of(request: assignment_pb2.AcceptAssignmentRequest) -> tuple[AssignmentId, bytes]:
    """The assignment and the secret of its holder."""
    checks = FieldChecks()
    checks.octets("lease_holder", request.lease_holder, size=32)
    checks.finish()
    return names.parse_assignment(request.name), request.lease_holder


def renew_of(request: assignment_pb2.RenewAssignmentRequest) -> tuple[AssignmentId, str]:
    """The assignment and the lease's token."""
    checks = FieldChecks()
    checks.text("lease_token", request.lease_token, max_chars=_MAX_TOKEN_CHARS)
    checks.finish()
    return names.parse_assignment(request.name), request.lease_token


def decline_of(request: assignment_pb2.DeclineAssignmentRequest) -> tuple[AssignmentId, str]:
    """The assignment and the lease's token, empty where it was not accepted."""
    checks = FieldChecks()
    checks.text("lease_token", request.lease_token, min_chars=0, max_chars=_MAX_TOKEN_CHARS)
    checks.text("reason", request.reason, min_chars=0, max_chars=_MAX_REASON_CHARS)
    checks.finish()
    return names.parse_assignment(request.name), request.lease_token


def query_of(request: assignment_pb2.ListAssignmentsRequest, tokens: PageTokens, *, caller: str) -> AssignmentQuery:
    """The page that is asked for."""
    submission = names.parse_submission(request.parent, "parent") if request.parent else None
    query = f"ListAssignments {request.parent or caller}"
    round_, _, place = (tokens.decode(request.page_token, query) or "0.-1").partition(".")
    return AssignmentQuery(submission, (int(round_), int(place)), page_size(request.page_size), query)


def page_message(
    query: AssignmentQuery, found: Sequence[Assignment], tokens: PageTokens
) -> assignment_pb2.ListAssignmentsResponse:
    """The page, and where the next one begins."""
    page = found[: query.size]
    cursor = ""
    if len(found) > query.size:
        last = page[-1]
        cursor = f"{last.round}.{last.position}" if query.submission else f"0.{last.sequence}"
    return assignment_pb2.ListAssignmentsResponse(
        assignments=[assignment_message(assignment) for assignment in page],
        next_page_token=tokens.encode(query.query, cursor),
    )


def watched_message(assignment: Assignment, told: Told) -> assignment_pb2.WatchAssignmentsResponse:
    """One message of WatchAssignments, and what the watcher has been told with it."""
    begun = f":{told.begun}" if told.begun > told.seen else ""
    cursor = "".join([f"{told.seen}{begun}", *(f",{first}-{last}" for first, last in told.beyond)])
    return assignment_pb2.WatchAssignmentsResponse(assignment=assignment_message(assignment), cursor=cursor)


def accepted_message(lease: Lease) -> assignment_pb2.AcceptAssignmentResponse:
    """The answer of AcceptAssignment."""
    return assignment_pb2.AcceptAssignmentResponse(
        assignment=assignment_message(lease.assignment),
        lease_token=lease.assignment.lease_token,
        order=_order_message(lease.order),
    )


def renewed_message(assignment: Assignment) -> assignment_pb2.RenewAssignmentResponse:
    """The answer of RenewAssignment."""
    return assignment_pb2.RenewAssignmentResponse(assignment=assignment_message(assignment))


def declined_message(assignment: Assignment) -> assignment_pb2.DeclineAssignmentResponse:
    """The answer of DeclineAssignment."""
    return assignment_pb2.DeclineAssignmentResponse(assignment=assignment_message(assignment))


def assignment_message(assignment: Assignment) -> assignment_pb2.Assignment:
    """An assignment without the secrets of its lease."""
    duty = AssignmentId(assignment.task, assignment.number, assignment.round, assignment.validator)
    return assignment_pb2.Assignment(
        name=names.format_assignment(duty),
        validator=names.format_participant(assignment.validator),
        state=ASSIGNMENT_STATE.number(assignment.state),
        deadline=timestamp(assignment.deadline),
        opening=assignment.opening,
        position=assignment.position,
        round=assignment.round,
        create_time=timestamp(assignment.create_time),
        update_time=timestamp(assignment.update_time),
        traceparent=assignment.trace,
    )


def _order_message(order: EvaluationOrder) -> assignment_pb2.EvaluationOrder:
    return assignment_pb2.EvaluationOrder(
        dataset=names.format_artifact(order.dataset.sha256.hex()),
        dataset_size_bytes=order.dataset.size_bytes,
        model=names.format_artifact(order.model_sha256),
        model_size_bytes=order.model_size_bytes,
        format=MODEL_FORMAT.number(order.format),
        spec=model_spec_to_proto(order.spec),
        max_cpu_time=duration(order.limits.max_cpu_time),
        max_memory_bytes=order.limits.max_memory_bytes,
        metric=METRIC.number(order.metric),
        top_k=order.top_k,
        bound=order.bound,
        node=names.format_participant(order.node) if order.node_endpoint else "",
        node_endpoint=order.node_endpoint,
    )
