"""How long an artifact is kept: as long as a task or submission needs it, and a while after nothing does."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from services.registry.records import ArtifactUse, Submission
from services.registry.states import ArtifactPurpose, HoldoutState, SubmissionState, TaskState
from services.registry.transaction import Reading


@dataclass(frozen=True)
class Keeping:
    """How long what nobody needs is kept."""

    uploads: timedelta = timedelta(days=1)
    """Broken uploads without a further byte, and base models that no task names."""
    refused: timedelta = timedelta(days=7)
    """Models of rejected submissions and datasets of cancelled tasks: time to look at what was wrong with them."""


def is_pending(tx: Reading, use: ArtifactUse) -> bool:
    """Whether nothing on record rests on this use: a base model not named, a model that is not the one revealed."""
    if use.purpose is ArtifactPurpose.BASE_MODEL:
        return not use.task
    if use.purpose is not ArtifactPurpose.MODEL:
        return False
    submission = tx.submission(use.task, use.number)
    return submission is not None and submission.model_digest.hex() != use.sha256


def removable_from(tx: Reading, sha256: str, keeping: Keeping) -> datetime | None:
    """When an artifact may be removed; None while any of its uses is needed."""
    times = [_removable_from(tx, use, keeping) for use in tx.artifact_uses(sha256)]
    ends = [time for time in times if time is not None]
    return max(ends) if ends and len(ends) == len(times) else None


def _removable_from(tx: Reading, use: ArtifactUse, keeping: Keeping) -> datetime | None:
    if not use.task:
        return use.create_time + keeping.uploads
    task = tx.task(use.task)
    if task is None:
        return None
    if task.state is TaskState.CANCELLED:
        # What the cancelled task has changed last is that its pool was closed.
        return task.update_time + keeping.refused
    if use.purpose is ArtifactPurpose.HOLDOUT and task.holdout is HoldoutState.FAILED:
        return task.update_time + keeping.refused
    if use.purpose is not ArtifactPurpose.MODEL:
        # Until the end and after it: results are recomputed and exported with what they rest on.
        return None
    submission = tx.submission(use.task, use.number)
    ended = None if submission is None else _model_unneeded(submission, use.sha256)
    return None if ended is None else ended + keeping.refused


def _model_unneeded(submission: Submission, sha256: str) -> datetime | None:
    """Since when a submission needs this model no more; None while it does."""
    if submission.state is SubmissionState.COMMITTED:
        return None
    if submission.state is SubmissionState.REJECTED:
        return submission.end_time
    # Handed in for it, and another one was revealed.
    return submission.reveal_time if submission.model_digest.hex() != sha256 else None
