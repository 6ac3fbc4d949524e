"""Submissions in the contract's words, and the statements that make them checked field by field."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.registry.convert.enums import MODEL_FORMAT, REJECTION_REASON, SUBMISSION_STATE
from services.registry.convert.envelopes import envelope, open_own_statement
from services.registry.convert.scores import score_message
from services.registry.convert.times import timestamp
from services.registry.records import SubmissionState
from services.registry.submissions import Reveal, SubmissionView
from services.runtime import names
from services.runtime.errors import InvalidArgument
from services.runtime.fields import FieldChecks
from services.runtime.filters import parse_filter
from services.runtime.paging import PageTokens, page_size
from tiltyard.identity import Envelope
from tiltyard.registry.v1 import submission_pb2
from tiltyard.type.v1 import envelope_pb2


@dataclass(frozen=True)
class SubmissionQuery:
    """One page of ListSubmissions: those of a number above `after`, `size` and one more to know whether there are."""

    task: str
    state: SubmissionState | None
    participant: str | None
    after: int
    size: int
    query: str

    @property
    def limit(self) -> int:
        """How many to read."""
        return self.size + 1


def commit_of(
    request: submission_pb2.CommitSubmissionRequest, *, origin: str, caller: str
) -> tuple[str, bytes, Envelope]:
    """Task, commitment, and the statement as it came."""
    statement = open_own_statement(request.statement, envelope_pb2.CommitStatement, origin=origin, caller=caller)
    checks = FieldChecks()
    checks.require(
        "statement.participant", statement.participant == names.format_participant(caller), "is not the signer"
    )
    checks.octets("statement.commitment", statement.commitment, size=32)
    checks.finish()
    return names.parse_task(statement.task, "statement.task"), statement.commitment, envelope(request.statement)


def reveal_of(request: submission_pb2.RevealSubmissionRequest, *, origin: str, caller: str) -> tuple[Reveal, Envelope]:
    """What is revealed, and the statement as it came."""
    statement = open_own_statement(request.statement, envelope_pb2.RevealStatement, origin=origin, caller=caller)
    task, number = names.parse_submission(statement.submission, "statement.submission")
    checks = FieldChecks()
    checks.digest("statement.model_digest", statement.model_digest)
    checks.octets("statement.salt", statement.salt, size=32)
    checks.one_of("statement.format", statement.format, MODEL_FORMAT.numbers)
    checks.finish()
    reveal = Reveal(
        task=task,
        number=number,
        model_digest=statement.model_digest,
        salt=statement.salt,
        format=MODEL_FORMAT.member(statement.format),
        model_index=statement.model_index,
    )
    return reveal, envelope(request.statement)


def query_of(request: submission_pb2.ListSubmissionsRequest, tokens: PageTokens) -> SubmissionQuery:
    """The page that is asked for."""
    task = names.parse_task(request.parent, "parent")
    terms = parse_filter(request.filter, ("state", "participant"))
    state = participant = None
    if "state" in terms:
        state = SUBMISSION_STATE.named(terms["state"])
        if state is None:
            raise InvalidArgument.field("filter", f"{terms['state']} is no state of a submission")
    if "participant" in terms:
        participant = names.parse_participant(terms["participant"], "filter")
    query = f"ListSubmissions {task} {state and state.name} {participant}"
    cursor = tokens.decode(request.page_token, query)
    return SubmissionQuery(task, state, participant, int(cursor or 0), page_size(request.page_size), query)


def page_message(
    query: SubmissionQuery, found: Sequence[SubmissionView], tokens: PageTokens
) -> submission_pb2.ListSubmissionsResponse:
    """The page, and where the next one begins."""
    page = found[: query.size]
    cursor = str(page[-1].submission.number) if len(found) > query.size else ""
    return submission_pb2.ListSubmissionsResponse(
        submissions=[submission_message(view) for view in page], next_page_token=tokens.encode(query.query, cursor)
    )


def committed_message(view: SubmissionView) -> submission_pb2.CommitSubmissionResponse:
    """The answer of CommitSubmission."""
    return submission_pb2.CommitSubmissionResponse(submission=submission_message(view))


def revealed_message(view: SubmissionView) -> submission_pb2.RevealSubmissionResponse:
    """The answer of RevealSubmission."""
    return submission_pb2.RevealSubmissionResponse(submission=submission_message(view))


def submission_message(view: SubmissionView) -> submission_pb2.Submission:
    """A submission with its scores, as far as the domain shows them."""
    submission = view.submission
    task, number = submission.task, submission.number
    scores = {round_: score_message(score, task=task, number=number) for round_, score in submission.scores.items()}
    scored = submission.state is SubmissionState.SCORED
    return submission_pb2.Submission(
        name=names.format_submission(task, number),
        participant=names.format_participant(submission.participant),
        state=SUBMISSION_STATE.number(submission.state),
        reason=REJECTION_REASON.number(submission.reason),
        detail=submission.detail,
        original="" if submission.original is None else names.format_submission(task, submission.original),
        commitment=submission.commitment,
        model_digest=submission.model_digest,
        size_bytes=submission.size_bytes,
        format=MODEL_FORMAT.number(submission.format),
        model_index=submission.model_index,
        score=scores.get(view.ranking_round) if scored else None,
        scores=[scores[round_] for round_ in sorted(scores)],
        draws=[names.format_draw(submission.draws[round_]) for round_ in sorted(submission.draws)],
        validators=[names.format_participant(validator) for validator in view.validators],
        deadline=timestamp(submission.deadline),
        commit_time=timestamp(submission.commit_time),
        reveal_time=timestamp(submission.reveal_time),
        end_time=timestamp(submission.end_time),
    )
