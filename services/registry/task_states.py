"""A task as a call finds it, when its next state falls due, and the steps into the later ones, in one transaction."""

from dataclasses import replace
from datetime import datetime

from services.registry.entries import HoldoutChanged, TaskChanged
from services.registry.records import Task
from services.registry.rounds import disclose, reject
from services.registry.states import HoldoutState, RejectionReason, SubmissionState, TaskState
from services.registry.transaction import Reading, Writing
from services.runtime.errors import FailedPrecondition, NotFound, PermissionDenied

ENDED = frozenset({TaskState.FINAL, TaskState.CANCELLED})


def known_task(tx: Reading, task: str) -> Task:
    """A task that exists. Raises NotFound."""
    found = tx.task(task)
    if found is None:
        raise NotFound("TASK_NOT_FOUND", f"there is no task {task}")
    return found


def own_task(tx: Reading, caller: str, task: str) -> Task:
    """A task of the caller. Raises NotFound, PermissionDenied."""
    found = known_task(tx, task)
    if found.creator != caller:
        raise PermissionDenied("NOT_THE_CREATOR", f"task {task} was created by somebody else")
    return found


def check_unended(task: Task) -> None:
    """Raises FailedPrecondition(TASK_ENDED)."""
    if task.state in ENDED:
        raise FailedPrecondition("TASK_ENDED", f"the task is {task.state.name}")


def deadline_of(task: Task) -> datetime | None:
    """When the task's state changes by itself; None when it waits for others, or has ended."""
    match task.state:
        case TaskState.PREPARING if task.open_time is None:
            return task.config.schedule.prepare_deadline
        case TaskState.OPEN:
            return task.config.schedule.close_time
        case TaskState.CLOSED if task.holdout is HoldoutState.EXPECTED:
            return holdout_deadline(task)
        case _:
            return None


def holdout_deadline(task: Task) -> datetime:
    """Until when a closed task's holdout may be published."""
    return (task.close_time or task.config.schedule.close_time) + task.config.schedule.holdout_time


def close(tx: Writing, task: Task, *, reason: str = "") -> Task:
    """No new submissions; those made are still revealed and judged. What was hidden shows from now on; the referee lays
    it open in the log."""
    tx.append(TaskChanged(task.id, TaskState.CLOSED, reason=reason))
    return tx.put_task(replace(task, state=TaskState.CLOSED, close_time=tx.now))


def cancel(tx: Writing, task: Task, *, reason: str) -> Task:
    """End a task without a result, and with it its submissions; validators at work are released."""
    # First the state: what it has hidden is laid open with its submissions.
    cancelled = tx.put_task(replace(task, state=TaskState.CANCELLED, state_reason=reason))
    for submission in tx.submissions(task.id):
        if submission.state is not SubmissionState.REJECTED:
            submission = reject(tx, submission, RejectionReason.TASK_CANCELLED, detail="the task was cancelled")
        if submission.hidden:
            disclose(tx, submission)
    tx.append(TaskChanged(task.id, TaskState.CANCELLED, reason=reason))
    return tx.task(task.id) or cancelled


def fail_holdout(tx: Writing, task: Task, *, reason: str) -> Task:
    """The first round ranks, and the log says why."""
    tx.append(HoldoutChanged(task.id, accepted=False, reason=reason))
    return tx.put_task(replace(task, holdout=HoldoutState.FAILED, state_reason=reason))
