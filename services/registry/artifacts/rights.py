"""Who may hand an artifact in, and who may read it: each right follows from a use."""

from dataclasses import dataclass
from datetime import datetime

from services.registry.records import Artifact, ArtifactUse, Assignment, Submission, Task
from services.registry.rounds import FIRST_ROUND, HOLDOUT_ROUND
from services.registry.states import (
    ArtifactPurpose,
    AssignmentState,
    HoldoutState,
    MembershipState,
    Role,
    SubmissionState,
    TaskState,
)
from services.registry.task_config import DatasetDigest
from services.registry.task_states import holdout_deadline, own_task
from services.registry.transaction import Reading
from services.runtime.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)


@dataclass(frozen=True)
class Upload:
    """What an upload says of itself: of `task` (a dataset), of `submission` (task and number), or of neither (a base
    model)."""

    sha256: str
    """Empty where it comes later."""
    size_bytes: int
    offset: int
    task: str | None = None
    submission: tuple[str, int] | None = None

    @property
    def is_base_model(self) -> bool:
        """Whether it is of neither a task nor a submission."""
        return self.task is None and self.submission is None


def may_read(tx: Reading, caller: str, use: ArtifactUse, now: datetime) -> bool:
    """Whether this use of an artifact lets the caller read it.

    A dataset: its creator and who holds a running lease on an assignment of its task and round. A model: its submitter,
    who holds a running lease on an assignment of its submission, and the task's creator once the task is closed. A base
    model: who uploaded it or named it in a task, and that task's active training nodes.
    """
    if caller == use.owner:
        return True
    match use.purpose:
        case ArtifactPurpose.BASE_MODEL:
            member = tx.member(use.task, caller) if use.task else None
            node = member is not None and member.role is Role.TRAINING_NODE
            return node and member is not None and member.state is MembershipState.ACTIVE
        case ArtifactPurpose.EVALUATION_DATASET | ArtifactPurpose.HOLDOUT:
            round_ = FIRST_ROUND if use.purpose is ArtifactPurpose.EVALUATION_DATASET else HOLDOUT_ROUND
            return any((lease.task, lease.round) == (use.task, round_) for lease in _leases(tx, caller, now))
        case ArtifactPurpose.MODEL:
            return _may_read_model(tx, caller, use, now)


def _may_read_model(tx: Reading, caller: str, use: ArtifactUse, now: datetime) -> bool:
    submission = tx.submission(use.task, use.number)
    if submission is None or submission.model_digest.hex() != use.sha256:
        # Uploaded, but never revealed as the model of this submission.
        return False
    task = tx.task(use.task)
    if task is not None and task.creator == caller:
        return task.state in (TaskState.CLOSED, TaskState.FINAL)
    return any((lease.task, lease.number) == (use.task, use.number) for lease in _leases(tx, caller, now))


def _leases(tx: Reading, caller: str, now: datetime) -> list[Assignment]:
    return [
        assignment
        for assignment in tx.assignments_unended_of(caller)
        if assignment.state is AssignmentState.ACCEPTED
        and assignment.deadline is not None
        and now < assignment.deadline
    ]


def readable(tx: Reading, caller: str, sha256: str, now: datetime) -> Artifact:
    """An artifact that the caller may read. Raises NotFound, PermissionDenied."""
    uses = tx.artifact_uses(sha256)
    artifact = tx.artifact(sha256)
    if not uses or artifact is None:
        raise NotFound("ARTIFACT_NOT_FOUND", f"there is no artifact {sha256}")
    if not any(may_read(tx, caller, use, now) for use in uses):
        raise PermissionDenied("ARTIFACT_NOT_YOURS", "this artifact is for others to read")
    return artifact


def expected_use(tx: Reading, caller: str, upload: Upload, now: datetime) -> ArtifactUse:
    """The use that an upload is for, where the caller may hand it in now.

    Raises FailedPrecondition(UPLOAD_NOT_EXPECTED), InvalidArgument(SIZE_MISMATCH), ResourceExhausted(TOO_LARGE),
    NotFound, PermissionDenied.
    """
    if upload.submission is not None:
        task, number = upload.submission
        submission = _own_submission(tx, caller, upload.submission, upload.size_bytes)
        if not _awaits_model(submission, upload.sha256, now):
            raise _not_expected(f"the submission is {submission.state.name} and awaits no model")
        return ArtifactUse(upload.sha256, task, ArtifactPurpose.MODEL, caller, now, number)
    if upload.task is not None:
        digest, purpose = _awaited(own_task(tx, caller, upload.task), upload.sha256, now)
        if digest.size_bytes != upload.size_bytes:
            raise size_mismatch(f"is {upload.size_bytes}, the task announced {digest.size_bytes}", "header.size_bytes")
        return ArtifactUse(upload.sha256, upload.task, purpose, caller, now)
    _check_registered(tx, caller)
    return ArtifactUse(upload.sha256, "", ArtifactPurpose.BASE_MODEL, caller, now)


def check_unnamed(tx: Reading, caller: str, upload: Upload) -> None:
    """What `expected_use` would refuse whatever the digest turns out to be, as far as that is soon told.

    Raises FailedPrecondition, ResourceExhausted(TOO_LARGE), NotFound, PermissionDenied.
    """
    if upload.submission is not None:
        _own_submission(tx, caller, upload.submission, upload.size_bytes)
    elif upload.task is not None:
        own_task(tx, caller, upload.task)
    else:
        _check_registered(tx, caller)


def size_mismatch(description: str, field: str = "chunk") -> InvalidArgument:
    """Fewer or more bytes than announced."""
    return InvalidArgument.field(field, description, reason="SIZE_MISMATCH")


def _awaited(task: Task, sha256: str, now: datetime) -> tuple[DatasetDigest, ArtifactPurpose]:
    config = task.config
    if config.evaluation_dataset.sha256.hex() == sha256 and task.state is TaskState.PREPARING:
        return config.evaluation_dataset, ArtifactPurpose.EVALUATION_DATASET
    if config.holdout is not None and config.holdout.sha256.hex() == sha256:
        unended = task.state in (TaskState.PREPARING, TaskState.OPEN, TaskState.CLOSED)
        late = task.state is TaskState.CLOSED and now >= holdout_deadline(task)
        if unended and task.holdout is not HoldoutState.FAILED and not late:
            return config.holdout, ArtifactPurpose.HOLDOUT
    raise _not_expected("the task does not await this artifact")


def _check_registered(tx: Reading, caller: str) -> None:
    if tx.participant(caller) is None:
        raise FailedPrecondition("NOT_REGISTERED", "only participants hand in base models")


def _own_submission(tx: Reading, caller: str, named: tuple[str, int], size_bytes: int) -> Submission:
    """The caller's submission, whose model may have so many bytes."""
    task_id, number = named
    submission, task = tx.submission(task_id, number), tx.task(task_id)
    if submission is None or task is None:
        raise NotFound("SUBMISSION_NOT_FOUND", f"task {task_id} has no submission {number}")
    if submission.participant != caller:
        raise PermissionDenied("NOT_THE_SUBMITTER", "this is somebody else's submission")
    limit = task.config.limits.max_model_bytes
    if size_bytes > limit:
        raise ResourceExhausted(
            "TOO_LARGE", f"the model has {size_bytes} bytes, the task allows {limit}", max_bytes=str(limit)
        )
    return submission


def _awaits_model(submission: Submission, sha256: str, now: datetime) -> bool:
    if submission.state is SubmissionState.COMMITTED:
        return submission.deadline is None or now < submission.deadline
    # An answer that was lost is asked for again after the reveal.
    return submission.model_digest.hex() == sha256


def _not_expected(why: str) -> FailedPrecondition:
    return FailedPrecondition("UPLOAD_NOT_EXPECTED", why)
