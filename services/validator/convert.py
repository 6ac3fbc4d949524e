"""Between the validator's messages and its domain."""

from datetime import datetime

from google.protobuf import timestamp_pb2

from services.runtime.names import parse_assignment
from services.runtime.paging import PageTokens, fitting, page_size
from services.validator.runs import RunView
from services.validator.signing import FAULT_NUMBER
from services.validator.validation import RunPage, Status
from tiltyard.type.v1 import evaluation_pb2
from tiltyard.validator.v1 import validator_pb2 as pb

_RUNS_QUERY = "ListEvaluationRuns"


def assignment_name(request: pb.WatchEvaluationRunRequest) -> str:
    """The name in a request, checked. Raises InvalidArgument."""
    parse_assignment(request.assignment, "assignment")
    return request.assignment


class RunPages:
    """Pages of the history, whose tokens nobody else can make."""

    def __init__(self, secret: bytes) -> None:
        self._tokens = PageTokens(secret)

    def below(self, request: pb.ListEvaluationRunsRequest) -> int | None:
        """Where the page asked for begins, None for the newest run. Raises InvalidArgument on `page_token`."""
        cursor = self._tokens.decode(request.page_token, _RUNS_QUERY)
        return int(cursor) if cursor else None

    def size(self, request: pb.ListEvaluationRunsRequest) -> int:
        """How many runs the page has. Raises InvalidArgument on `page_size`."""
        return page_size(request.page_size)

    def response(self, page: RunPage) -> pb.ListEvaluationRunsResponse:
        """One page with the token of the next; shorter where one message cannot hold all of it."""
        runs = fitting(run_message(each) for each in page.runs)
        below = page.next_below if len(runs) == len(page.runs) else page.runs[len(runs) - 1].run.number
        cursor = "" if below is None else str(below)
        return pb.ListEvaluationRunsResponse(runs=runs, next_page_token=self._tokens.encode(_RUNS_QUERY, cursor))


def status_response(status: Status) -> pb.GetStatusResponse:
    """What the validator does now."""
    return pb.GetStatusResponse(
        participant=status.participant,
        draining=status.draining,
        active=[run_message(each) for each in status.active],
        ended=status.ended,
        isolation=status.isolation,
    )


def run_message(view: RunView) -> pb.EvaluationRun:
    """One run at one moment."""
    run = view.run
    message = pb.EvaluationRun(
        assignment=run.assignment,
        state=pb.EvaluationRunState.Value(f"EVALUATION_RUN_STATE_{run.state}"),
        position=view.position,
        total=view.total,
        samples_per_second=view.samples_per_second,
        eta_s=view.eta_s,
        detail=run.detail,
        start_time=_timestamp(run.start_time),
        end_time=None if run.end_time is None else _timestamp(run.end_time),
    )
    if run.finding is not None and run.finding.counts is not None:
        counts = run.finding.counts
        message.counts.CopyFrom(
            evaluation_pb2.Counts(
                correct=counts.correct,
                total=counts.total,
                ambiguous=counts.ambiguous,
                loss_sum_micros=counts.loss_sum_micros,
            )
        )
    if run.finding is not None and run.finding.fault is not None:
        message.fault = FAULT_NUMBER[run.finding.fault]
    message.node_endpoint = run.finding is not None and run.finding.node_endpoint
    return message


def _timestamp(moment: datetime) -> timestamp_pb2.Timestamp:
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(moment)
    return message
