"""Tasks from their creation to their end, step by step."""

from tiltyard.audit import judging, memberships
from tiltyard.audit.names import Form, demand_name
from tiltyard.audit.reading import Reading
from tiltyard.audit.story import Task
from tiltyard.audit.wrong import Claim, demand, moment_ns
from tiltyard.type.v1 import log_pb2, task_pb2

_STEPS = {
    task_pb2.TASK_STATE_PREPARING: (task_pb2.TASK_STATE_OPEN, task_pb2.TASK_STATE_CANCELLED),
    task_pb2.TASK_STATE_OPEN: (task_pb2.TASK_STATE_CLOSED, task_pb2.TASK_STATE_CANCELLED),
    task_pb2.TASK_STATE_CLOSED: (task_pb2.TASK_STATE_FINAL, task_pb2.TASK_STATE_CANCELLED),
}


def task_created(reading: Reading, index: int, leaf: bytes, entry: log_pb2.TaskCreated) -> None:
    """A task is created, by somebody who may."""
    demand(entry.task not in reading.story.tasks, Claim.HISTORY, f"{entry.task} is created twice")
    memberships.demand_eligible(reading.story, entry.task, entry.creator, memberships.CREATOR)
    memberships.check_field(reading.story, entry.task, entry.creator, entry.config.field)
    reading.story.tasks[entry.task] = Task(entry.task, entry.creator, entry.config)
    if entry.config.base_model:
        demand_name(entry.config.base_model, Form.ARTIFACT, Claim.HISTORY)


def task_changed(reading: Reading, index: int, leaf: bytes, entry: log_pb2.TaskChanged) -> None:
    """A task goes on to its next state, or is amended."""
    task = reading.task(entry.task)
    if entry.HasField("config"):
        demand(entry.state == task.state, Claim.HISTORY, f"{entry.task} is amended and changes its state at once")
        _check_amendment(task, entry.config)
        task.config = entry.config
        return
    allowed = _STEPS.get(task.state, ())
    demand(entry.state in allowed, Claim.HISTORY, f"{entry.task} makes a step that there is not")
    if entry.state == task_pb2.TASK_STATE_FINAL:
        task.ranking_round = judging.ranking_round(reading.story, task)
        expected = f"round {task.ranking_round} ranks"
        demand(entry.reason == expected, Claim.SCORES, f"{entry.task} is final by {entry.reason!r}, not {expected!r}")
    task.state = entry.state
    reading.counts[Claim.HISTORY] += 1


def holdout_changed(reading: Reading, index: int, leaf: bytes, entry: log_pb2.HoldoutChanged) -> None:
    """The holdout of a closed task is accepted, or not."""
    task = reading.task(entry.task)
    demand(task.config.HasField("holdout"), Claim.HISTORY, f"{entry.task} has no holdout")
    demand(not task.holdout_told, Claim.HISTORY, f"the holdout of {entry.task} has two fates")
    closed = task.state == task_pb2.TASK_STATE_CLOSED
    demand(closed, Claim.HISTORY, f"the holdout of {entry.task} is told of, and the task is not closed")
    demand(entry.accepted != bool(entry.reason), Claim.HISTORY, f"the holdout of {entry.task} has no clear fate")
    task.holdout_told = True
    if entry.accepted:
        task.holdout_leaf = leaf


def _check_amendment(task: Task, config: task_pb2.TaskConfig) -> None:
    before, after = task_pb2.TaskConfig(), task_pb2.TaskConfig()
    before.CopyFrom(task.config)
    after.CopyFrom(config)
    what = f"the close of {task.name}"
    closes = [moment_ns(each.schedule.close_time, Claim.HISTORY, what) for each in (before, after)]
    for each in (before, after):
        for name in ("display_name", "description"):
            each.ClearField(name)
        each.schedule.ClearField("close_time")
    demand(before == after and closes[1] >= closes[0], Claim.HISTORY, f"{task.name} is amended in what does not change")
