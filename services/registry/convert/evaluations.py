"""Evaluations in the contract's words, and seals and reports checked field by field."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.registry.convert.enums import EVALUATION_VERDICT, VALIDATOR_FAULT_KIND
from services.registry.convert.envelopes import envelope, envelope_message, open_own_statement
from services.registry.convert.listings import ListedPage
from services.registry.convert.times import timestamp
from services.registry.evaluations import EvaluationView, Report
from services.registry.listing import Place
from services.registry.records import Counts, Evaluation, Finding, ValidatorFault
from services.runtime import names
from services.runtime.fields import FieldChecks
from services.runtime.names import AssignmentId
from services.runtime.paging import PageTokens, fitting, page_size
from tiltyard.identity import Envelope
from tiltyard.predictions import MAX_HASHES, rows_per_hash
from tiltyard.registry.v1 import evaluation_pb2
from tiltyard.transparency import HASH_BYTES
from tiltyard.type.v1 import envelope_pb2
from tiltyard.type.v1 import evaluation_pb2 as type_pb2

_FAULT_PREFIX = "MODEL_FAULT_"
_FAULTS = frozenset(type_pb2.ModelFault.values()) - {type_pb2.MODEL_FAULT_UNSPECIFIED}
_MAX_DETAIL_CHARS = 500
_MAX_TOKEN_CHARS = 100
_MAX_BLOCKS = (1 << 63) - 1


@dataclass(frozen=True)
class EvaluationQuery:
    """One page of ListEvaluations: those beyond the round and validator `after`."""

    task: str
    number: int
    after: tuple[int, str]
    size: int
    query: str

    @property
    def limit(self) -> int:
        """How many to read: one more, to know whether there are."""
        return self.size + 1


@dataclass(frozen=True)
class SealDraft:
    """A request of CommitEvaluation."""

    assignment: AssignmentId
    seal: bytes
    statement: Envelope
    token: str


@dataclass(frozen=True)
class ReportDraft:
    """A request of OpenEvaluation."""

    assignment: AssignmentId
    report: Report
    envelope: Envelope
    salt: bytes


def seal_of(request: evaluation_pb2.CommitEvaluationRequest, *, origin: str, caller: str) -> SealDraft:
    """The seal that is committed."""
    statement = open_own_statement(request.statement, envelope_pb2.SealStatement, origin=origin, caller=caller)
    checks = FieldChecks()
    checks.octets("statement.seal", statement.seal, size=32)
    # An empty token is no bad field: who has no lease is told so.
    checks.text("lease_token", request.lease_token, min_chars=0, max_chars=_MAX_TOKEN_CHARS)
    checks.finish()
    assignment = names.parse_assignment(statement.assignment, "statement.assignment")
    return SealDraft(assignment, statement.seal, envelope(request.statement), request.lease_token)


def report_of(request: evaluation_pb2.OpenEvaluationRequest, *, origin: str, caller: str) -> ReportDraft:
    """The report that is laid open."""
    statement = open_own_statement(
        request.report, envelope_pb2.EvaluationReport, origin=origin, caller=caller, field="report"
    )
    checks = FieldChecks()
    checks.octets("salt", request.salt, size=32)
    checks.digest("report.dataset_digest", statement.dataset_digest)
    checks.digest("report.model_digest", statement.model_digest)
    checks.text("report.detail", statement.detail, min_chars=0, max_chars=_MAX_DETAIL_CHARS)
    checks.range("report.prediction_blocks", statement.prediction_blocks, minimum=0, maximum=_MAX_BLOCKS)
    if len(request.prediction_hashes) > MAX_HASHES * HASH_BYTES:
        checks.fail("prediction_hashes", f"are more than {MAX_HASHES}")
    kind = statement.WhichOneof("finding")
    if checks.require("report.finding", kind, "must be counts or a fault") and kind == "fault":
        checks.one_of("report.fault", statement.fault, _FAULTS)
        checks.require("report.prediction_root", not statement.prediction_root, "must be empty with a fault")
    if kind == "counts":
        checks.digest("report.prediction_root", statement.prediction_root)
    checks.finish()
    counts = statement.counts
    finding = Finding(
        counts=Counts(counts.correct, counts.total, counts.ambiguous, counts.loss_sum_micros)
        if kind == "counts"
        else None,
        fault=type_pb2.ModelFault.Name(statement.fault).removeprefix(_FAULT_PREFIX) if kind == "fault" else None,
        node_endpoint=statement.node_endpoint,
        prediction_root=statement.prediction_root.hex(),
        prediction_blocks=statement.prediction_blocks,
    )
    report = Report(
        dataset_digest=statement.dataset_digest,
        model_digest=statement.model_digest,
        finding=finding,
        prediction_hashes=request.prediction_hashes,
    )
    assignment = names.parse_assignment(statement.assignment, "report.assignment")
    return ReportDraft(assignment, report, envelope(request.report), request.salt)


def query_of(request: evaluation_pb2.ListEvaluationsRequest, tokens: PageTokens) -> EvaluationQuery:
    """The page that is asked for."""
    task, number = names.parse_submission(request.parent, "parent")
    query = f"ListEvaluations {request.parent}"
    round_, _, validator = (tokens.decode(request.page_token, query) or "0.").partition(".")
    return EvaluationQuery(task, number, (int(round_), validator), page_size(request.page_size), query)


def page_message(
    query: EvaluationQuery, found: Sequence[Evaluation], tokens: PageTokens
) -> evaluation_pb2.ListEvaluationsResponse:
    """The page, and where the next one begins."""
    page = fitting(map(evaluation_message, found[: query.size]))
    last = found[len(page) - 1] if len(found) > len(page) else None
    cursor = "" if last is None else f"{last.round}.{last.validator}"
    return evaluation_pb2.ListEvaluationsResponse(evaluations=page, next_page_token=tokens.encode(query.query, cursor))


def committed_message(evaluation: Evaluation) -> evaluation_pb2.CommitEvaluationResponse:
    """The answer of CommitEvaluation."""
    return evaluation_pb2.CommitEvaluationResponse(evaluation=evaluation_message(evaluation))


def opened_message(evaluation: Evaluation) -> evaluation_pb2.OpenEvaluationResponse:
    """The answer of OpenEvaluation, which is its validator's."""
    return evaluation_pb2.OpenEvaluationResponse(evaluation=evaluation_message(evaluation))


def evaluation_message(evaluation: Evaluation) -> evaluation_pb2.Evaluation:
    """An evaluation; the report, where the domain shows it, both as it came and read."""
    duty = AssignmentId(evaluation.task, evaluation.number, evaluation.round, evaluation.validator)
    message = evaluation_pb2.Evaluation(
        name=names.format_evaluation(duty),
        validator=names.format_participant(evaluation.validator),
        seal=evaluation.seal,
        verdict=EVALUATION_VERDICT.number(evaluation.verdict),
        seal_time=timestamp(evaluation.seal_time),
        open_time=timestamp(evaluation.open_time),
    )
    if evaluation.report is not None:
        message.report.CopyFrom(envelope_message(evaluation.report))
        message.finding.ParseFromString(evaluation.report.payload)
    return message


def viewed_message(view: EvaluationView) -> evaluation_pb2.GetEvaluationResponse:
    """The answer of GetEvaluation."""
    message = evaluation_message(view.evaluation)
    finding = view.evaluation.finding
    if view.prediction_hashes and finding is not None:
        message.prediction_hashes = view.prediction_hashes
        message.rows_per_hash = rows_per_hash(finding.prediction_blocks)
    return evaluation_pb2.GetEvaluationResponse(evaluation=message)


def faults_of(request: evaluation_pb2.ListValidatorFaultsRequest) -> tuple[str | None, str | None]:
    """Of which task, or of which validator."""
    if request.parent.startswith("participants/"):
        return None, names.parse_participant(request.parent, "parent")
    return names.parse_task(request.parent, "parent"), None


def faults_message(
    page: ListedPage, found: Sequence[tuple[Place, ValidatorFault]], tokens: PageTokens
) -> evaluation_pb2.ListValidatorFaultsResponse:
    """The page, and where the next one begins."""
    faults, token = page.close(tokens, found, _fault_message)
    return evaluation_pb2.ListValidatorFaultsResponse(faults=faults, next_page_token=token)


def _fault_message(fault: ValidatorFault) -> evaluation_pb2.ValidatorFault:
    return evaluation_pb2.ValidatorFault(
        assignment=names.format_assignment(AssignmentId(fault.task, fault.number, fault.round, fault.validator)),
        validator=names.format_participant(fault.validator),
        kind=VALIDATOR_FAULT_KIND.number(fault.kind),
        time=timestamp(fault.time),
    )
