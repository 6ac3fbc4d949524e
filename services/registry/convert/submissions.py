"""Submissions in the contract's words, and the statements that make them checked field by field."""

from collections.abc import Sequence

from services.registry.convert.enums import MODEL_FORMAT, REJECTION_REASON, SUBMISSION_STATE
from services.registry.convert.envelopes import envelope, open_own_statement
from services.registry.convert.listings import ListedPage
from services.registry.convert.scores import score_message
from services.registry.convert.times import timestamp
from services.registry.listing import Place
from services.registry.states import SubmissionState
from services.registry.submissions import Reveal, SubmissionView
from services.runtime import names
from services.runtime.fields import FieldChecks
from services.runtime.paging import PageTokens
from tiltyard.identity import Envelope
from tiltyard.registry.v1 import submission_pb2
from tiltyard.type.v1 import envelope_pb2


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


def page_message(
    page: ListedPage, found: Sequence[tuple[Place, SubmissionView]], tokens: PageTokens
) -> submission_pb2.ListSubmissionsResponse:
    """The page, and where the next one begins."""
    submissions, token = page.close(tokens, found, submission_message)
    return submission_pb2.ListSubmissionsResponse(submissions=submissions, next_page_token=token)


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
