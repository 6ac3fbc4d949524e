"""The one rule for what a task shows of its scores, and when."""

from dataclasses import replace

from services.registry.records import Score, Submission, Task
from services.registry.states import ScoreVisibility, TaskState
from tiltyard import ladder

_FIRST_ROUND = 1
_SCORED = "SCORED"


def hides(task: Task) -> bool:
    """Whether counts are kept from everybody now: with LADDER until the task is closed (or cancelled).

    While it is so, reports stay with the registry and the log holds commitments to scores; a public best in steps is
    all that leaves the registry.
    """
    return task.config.score_visibility is ScoreVisibility.LADDER and task.state in (
        TaskState.PREPARING,
        TaskState.OPEN,
    )


def visible(task: Task, submission: Submission) -> Submission:
    """The submission as anybody may see it: its scores, or where they are hidden the node's public best that it set."""
    if not hides(task):
        return submission
    scores = {}
    if submission.public_best is not None:
        step = task.config.ladder_step_micros
        correct = ladder.shown(submission.public_best, task.evaluation_rows, step)
        scores[_FIRST_ROUND] = Score(_FIRST_ROUND, _SCORED, correct=correct, total=task.evaluation_rows)
    return replace(submission, scores=scores)
