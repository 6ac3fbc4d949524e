"""When a task's next state falls due, and which of its states are over."""

from datetime import datetime

from services.registry.records import HoldoutState, Task, TaskState

ENDED = frozenset({TaskState.FINAL, TaskState.CANCELLED})


def deadline_of(task: Task) -> datetime | None:
    """When the task's state changes by itself; None when it waits for others, or has ended."""
    match task.state:
        case TaskState.PREPARING:
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
