"""Models by commit and reveal: whoever commits first owns a model, and nobody gains by copying."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from services.registry.entries import SubmissionCommitted, SubmissionRevealed
from services.registry.listing import Listing, Place
from services.registry.records import Artifact, ArtifactUse, Submission, Task
from services.registry.rounds import FIRST_ROUND, reject
from services.registry.states import (
    ArtifactPurpose,
    MembershipState,
    ModelFormat,
    RejectionReason,
    Role,
    SubmissionState,
    TaskState,
)
from services.registry.transaction import Reading, Store, Writing
from services.registry.visibility import visible
from services.runtime.errors import (
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from services.runtime.names import format_participant, format_task
from tiltyard.commitments import matches, submission_commitment
from tiltyard.identity import Envelope
from tiltyard.modelspec import Onnx
from tiltyard.telemetry import tracing

DAY = timedelta(hours=24)
STRUCTURE_TIME = timedelta(minutes=1)


@dataclass(frozen=True)
class SubmissionView:
    """A submission with what is read beside it. `ranking_round` is the round whose score ranks."""

    submission: Submission
    validators: tuple[str, ...]
    """All who were assigned so far, reserves included, in the order of their rounds and positions."""
    ranking_round: int


@dataclass(frozen=True)
class Reveal:
    """What a training node says of its model; digest and salt are 32 bytes."""

    task: str
    number: int
    model_digest: bytes
    salt: bytes
    format: ModelFormat
    model_index: int


class Submissions:
    """Takes commitments and reveals, and shows what became of them."""

    def __init__(self, store: Store, clock: Callable[[], datetime], *, origin: str) -> None:
        self._store = store
        self._clock = clock
        self._origin = origin

    async def commit(self, caller: str, *, task: str, commitment: bytes, statement: Envelope) -> SubmissionView:
        """Record a commitment of an active training node of an open task."""

        def write(tx: Writing) -> SubmissionView:
            found = _find_task(tx, task)
            if found.state is not TaskState.OPEN or tx.now >= found.config.schedule.close_time:
                raise FailedPrecondition("TASK_NOT_OPEN", "the task takes no submissions now", state=found.state.name)
            member = tx.member(task, caller)
            if member is None or member.role is not Role.TRAINING_NODE or member.state is not MembershipState.ACTIVE:
                raise FailedPrecondition("NOT_A_TRAINING_NODE", "only active training nodes of the task submit")
            _check_daily_limit(tx, found, caller)
            submission = Submission(
                task=task,
                number=tx.next_submission_number(task),
                participant=caller,
                state=SubmissionState.COMMITTED,
                commitment=commitment,
                commit_time=tx.now,
                deadline=tx.now + found.config.schedule.reveal_time,
            )
            tx.put_submission(submission)
            tx.append(SubmissionCommitted(task=task, number=submission.number, statement=statement))
            return _view(tx, found, submission)

        return await self._store.write(write, quick=True)

    async def reveal(self, caller: str, *, reveal: Reveal, statement: Envelope) -> SubmissionView:
        """Open a commitment whose model has been uploaded; copies are rejected at once, whichever comes to light."""

        def write(tx: Writing) -> SubmissionView:
            task, submission = _find_task(tx, reveal.task), _find(tx, reveal.task, reveal.number)
            if submission.participant != caller:
                raise PermissionDenied("NOT_YOUR_SUBMISSION", "the submission is another participant's")
            _check_revealable(tx, submission)
            self._check_commitment(submission, reveal)
            _check_model(task, reveal)
            artifact = _uploaded(tx, submission, reveal)
            leaf = tx.append(
                SubmissionRevealed(
                    task=submission.task,
                    number=submission.number,
                    statement=statement,
                    size_bytes=artifact.size_bytes,
                )
            )
            submission = replace(
                submission,
                state=SubmissionState.REVEALED,
                model_digest=reveal.model_digest,
                size_bytes=artifact.size_bytes,
                format=reveal.format,
                model_index=reveal.model_index,
                salt=reveal.salt,
                reveal_leaf=leaf.hash,
                reveal_time=tx.now,
                trace=tracing.carried(),
                deadline=tx.now + STRUCTURE_TIME,
            )
            tx.put_submission(submission)
            return _view(tx, task, _reject_copies(tx, submission))

        return await self._store.write(write)

    def _check_commitment(self, submission: Submission, reveal: Reveal) -> None:
        commitment = submission_commitment(
            origin=self._origin,
            task=format_task(submission.task),
            participant=format_participant(submission.participant),
            model_digest=reveal.model_digest,
            salt=reveal.salt,
        )
        if not matches(commitment, submission.commitment):
            problem = "does not give the commitment that was made"
            raise InvalidArgument(
                [FieldViolation("statement.model_digest", problem), FieldViolation("statement.salt", problem)],
                reason="COMMITMENT_MISMATCH",
            )

    async def get(self, task: str, number: int) -> SubmissionView:
        """One submission."""
        return await self._store.look_up(lambda tx: _view(tx, _find_task(tx, task), _find(tx, task, number)))

    async def page(self, task: str, listing: Listing) -> Sequence[tuple[Place, SubmissionView]]:
        """Submissions of a task, each with its place."""

        def read(tx: Reading) -> Sequence[tuple[Place, SubmissionView]]:
            found = _find_task(tx, task)
            listed = tx.submissions_listed(task, listing)
            return [(place, _view(tx, found, submission)) for place, submission in listed]

        return await self._store.read(read)

    async def expire_reveals(self) -> int:
        """A step of the referee: commitments that were not opened in time are rejected."""
        now = self._clock()
        if not await self._store.finds(lambda tx: tx.submissions_due(SubmissionState.COMMITTED, now)):
            return 0

        def expire(tx: Writing) -> int:
            late = tx.submissions_due(SubmissionState.COMMITTED, tx.now)
            for submission in late:
                reject(tx, submission, RejectionReason.REVEAL_EXPIRED, detail="it was not revealed in time")
            return len(late)

        return await self._store.write(expire)


def _find_task(tx: Reading, task: str) -> Task:
    found = tx.task(task)
    if found is None:
        raise NotFound("TASK_NOT_FOUND", f"there is no task {task}", task=task)
    return found


def _find(tx: Reading, task: str, number: int) -> Submission:
    found = tx.submission(task, number)
    if found is None:
        raise NotFound("SUBMISSION_NOT_FOUND", f"task {task} has no submission {number}", task=task, number=str(number))
    return found


def _view(tx: Reading, task: Task, submission: Submission) -> SubmissionView:
    return SubmissionView(
        submission=visible(task, submission),
        validators=tuple(tx.validators_of(submission.task, submission.number)),
        ranking_round=task.ranking_round or FIRST_ROUND,
    )


def _check_daily_limit(tx: Writing, task: Task, participant: str) -> None:
    # What was committed exactly a day ago does not count any more.
    since = tx.now - DAY + timedelta(microseconds=1)
    used = tx.count_submissions(task.id, participant, since=since)
    limit = task.config.limits.daily_submissions
    if used < limit:
        return
    oldest = tx.oldest_submission_since(task.id, participant, since=since)
    raise ResourceExhausted(
        "DAILY_LIMIT",
        f"{used} of {limit} submissions have been made in the last 24 hours",
        # When the oldest is a day old there is room for one more.
        retry_after_s=((oldest or tx.now) + DAY - tx.now).total_seconds(),
        limit=str(limit),
        used=str(used),
    )


def _check_revealable(tx: Writing, submission: Submission) -> None:
    expired = submission.reason is RejectionReason.REVEAL_EXPIRED
    late = submission.deadline is not None and tx.now >= submission.deadline
    if expired or (submission.state is SubmissionState.COMMITTED and late):
        raise FailedPrecondition("REVEAL_EXPIRED", "the time to reveal this submission is over")
    if submission.state is not SubmissionState.COMMITTED:
        raise FailedPrecondition(
            "NOT_COMMITTED", f"the submission is {submission.state.name}", state=submission.state.name
        )


def _check_model(task: Task, reveal: Reveal) -> None:
    violations = []
    if not 0 <= reveal.model_index < len(task.config.models):
        problem = f"is {reveal.model_index}, the task has {len(task.config.models)} models, counted from 0"
        violations.append(FieldViolation("statement.model_index", problem))
    else:
        onnx = isinstance(task.config.models[reveal.model_index].architecture, Onnx)
        expected = ModelFormat.ONNX if onnx else ModelFormat.SAFETENSORS
        if reveal.format is not expected:
            problem = f"is {reveal.format.name}, the task's model {reveal.model_index} is handed in as {expected.name}"
            violations.append(FieldViolation("statement.format", problem))
    if violations:
        raise InvalidArgument(violations)


def _uploaded(tx: Writing, submission: Submission, reveal: Reveal) -> Artifact:
    """The model's bytes, as handed in for this very submission.

    That somebody else has uploaded the same digest is not enough: digests are public once revealed, and a reader's
    right to the bytes follows from having had them.
    """
    sha256 = reveal.model_digest.hex()
    artifact = tx.artifact(sha256)
    own = ArtifactUse(
        sha256=sha256,
        task=submission.task,
        purpose=ArtifactPurpose.MODEL,
        owner=submission.participant,
        create_time=tx.now,
        number=submission.number,
    )
    if artifact is None or own not in tx.artifact_uses(sha256):
        raise FailedPrecondition(
            "MODEL_NOT_UPLOADED", "upload the model for this submission before revealing it", artifact=sha256
        )
    return artifact


def _reject_copies(tx: Writing, revealed: Submission) -> Submission:
    """Of several revealed submissions of one model the earliest commit owns it; numbers are in the order of commits."""
    same = [s for s in tx.submissions_with_digest(revealed.task, revealed.model_digest) if s.number != revealed.number]
    for later in same:
        if later.number > revealed.number and later.state is not SubmissionState.REJECTED:
            _reject_copy(tx, later, original=revealed.number)
    # Whoever failed through the platform's fault alone may submit the same model again.
    earlier = [
        s.number
        for s in same
        if s.number < revealed.number
        and not (s.participant == revealed.participant and s.reason is RejectionReason.VALIDATORS_UNAVAILABLE)
    ]
    return _reject_copy(tx, revealed, original=min(earlier)) if earlier else revealed


def _reject_copy(tx: Writing, submission: Submission, *, original: int) -> Submission:
    detail = f"submission {original} committed the same model earlier"
    return reject(tx, submission, RejectionReason.COPY, detail=detail, original=original)
