"""Resource names: parsed with the field's name in the error, and formatted, in one place."""

import re
from dataclasses import dataclass

from services.runtime.errors import InvalidArgument

_PARTICIPANT = "[0-9a-f]{40}"
_SLUG = "[a-z0-9-]{1,63}"
_NUMBER = "[1-9][0-9]{0,8}"


@dataclass(frozen=True)
class AssignmentId:
    """One validator's duty for one submission in one round; an evaluation has the same identity.

    `number` is the submission's in its task and `round` the scoring round (1, or 2 for a holdout), both from 1.
    """

    task: str
    number: int
    round: int
    participant: str


def _pattern(template: str) -> re.Pattern[str]:
    expression = template
    for placeholder, pattern in (
        ("{participant}", f"(?P<participant>{_PARTICIPANT})"),
        ("{task}", f"(?P<task>{_SLUG})"),
        ("{n}", f"(?P<n>{_NUMBER})"),
        ("{round}", f"(?P<round>{_NUMBER})"),
        ("{sha256}", "(?P<sha256>[0-9a-f]{64})"),
        ("{draw}", "(?P<draw>[a-z0-9-]{1,100})"),
        ("{training}", f"(?P<training>{_SLUG})"),
    ):
        expression = expression.replace(placeholder, pattern)
    return re.compile(expression)


def _parser(template: str) -> tuple[str, re.Pattern[str]]:
    return template, _pattern(template)


_PARTICIPANT_NAME = _parser("participants/{participant}")
_TASK_NAME = _parser("tasks/{task}")
_MEMBER_NAME = _parser("tasks/{task}/members/{participant}")
_SUBMISSION_NAME = _parser("tasks/{task}/submissions/{n}")
_ASSIGNMENT_NAME = _parser("tasks/{task}/submissions/{n}/assignments/{round}-{participant}")
_EVALUATION_NAME = _parser("tasks/{task}/submissions/{n}/evaluations/{round}-{participant}")
_ARTIFACT_NAME = _parser("artifacts/{sha256}")
_STAKE_NAME = _parser("stakes/{participant}")
_DRAW_NAME = _parser("draws/{draw}")
_TRAINING_NAME = _parser("trainings/{training}")


def _match(parser: tuple[str, re.Pattern[str]], name: str, field: str) -> re.Match[str]:
    template, pattern = parser
    if not name:
        raise InvalidArgument.field(field, f"is required, as {template}")
    match = pattern.fullmatch(name)
    if match is None:
        shown = name if len(name) <= 100 else name[:100] + "..."
        raise InvalidArgument.field(field, f"must look like {template}, not {shown!r}", reason="INVALID_NAME")
    return match


def parse_participant(name: str, field: str = "name") -> str:
    """`participants/{id}` -> id (40 hex digits). Raises InvalidArgument, like all parsers here."""
    return _match(_PARTICIPANT_NAME, name, field)["participant"]


def parse_task(name: str, field: str = "name") -> str:
    """`tasks/{task}` -> task id."""
    return _match(_TASK_NAME, name, field)["task"]


def parse_task_id(task: str, field: str = "task_id") -> str:
    """A bare task id, 1 to 63 of a-z, 0-9 and hyphen, as a creator may choose it."""
    if re.fullmatch(_SLUG, task) is None:
        raise InvalidArgument.field(field, "must be 1 to 63 characters of a-z, 0-9 and -", reason="INVALID_NAME")
    return task


def parse_participant_id(participant: str, field: str = "participant") -> str:
    """A bare participant id: 40 hex digits."""
    if re.fullmatch(_PARTICIPANT, participant) is None:
        raise InvalidArgument.field(field, "must be 40 lower-case hex digits", reason="INVALID_NAME")
    return participant


def parse_member(name: str, field: str = "name") -> tuple[str, str]:
    """`tasks/{task}/members/{participant}` -> (task, participant)."""
    match = _match(_MEMBER_NAME, name, field)
    return match["task"], match["participant"]


def parse_submission(name: str, field: str = "name") -> tuple[str, int]:
    """`tasks/{task}/submissions/{n}` -> (task, n)."""
    match = _match(_SUBMISSION_NAME, name, field)
    return match["task"], int(match["n"])


def _assignment_id(match: re.Match[str]) -> AssignmentId:
    return AssignmentId(
        task=match["task"], number=int(match["n"]), round=int(match["round"]), participant=match["participant"]
    )


def parse_assignment(name: str, field: str = "name") -> AssignmentId:
    """`tasks/{task}/submissions/{n}/assignments/{round}-{participant}`."""
    return _assignment_id(_match(_ASSIGNMENT_NAME, name, field))


def parse_evaluation(name: str, field: str = "name") -> AssignmentId:
    """`tasks/{task}/submissions/{n}/evaluations/{round}-{participant}`."""
    return _assignment_id(_match(_EVALUATION_NAME, name, field))


def parse_artifact(name: str, field: str = "name") -> str:
    """`artifacts/{sha256}` -> 64 hex digits."""
    return _match(_ARTIFACT_NAME, name, field)["sha256"]


def parse_stake(name: str, field: str = "name") -> str:
    """`stakes/{participant}` -> participant id."""
    return _match(_STAKE_NAME, name, field)["participant"]


def parse_draw(name: str, field: str = "name") -> str:
    """`draws/{draw}` -> draw id."""
    return _match(_DRAW_NAME, name, field)["draw"]


def parse_training(name: str, field: str = "name") -> str:
    """`trainings/{training}` -> training id."""
    return _match(_TRAINING_NAME, name, field)["training"]


def format_participant(participant: str) -> str:
    """`participants/{id}`."""
    return f"participants/{participant}"


def format_task(task: str) -> str:
    """`tasks/{task}`."""
    return f"tasks/{task}"


def format_member(task: str, participant: str) -> str:
    """`tasks/{task}/members/{participant}`."""
    return f"tasks/{task}/members/{participant}"


def format_submission(task: str, number: int) -> str:
    """`tasks/{task}/submissions/{n}`."""
    return f"tasks/{task}/submissions/{number}"


def format_assignment(assignment: AssignmentId) -> str:
    """`tasks/{task}/submissions/{n}/assignments/{round}-{participant}`."""
    parent = format_submission(assignment.task, assignment.number)
    return f"{parent}/assignments/{assignment.round}-{assignment.participant}"


def format_evaluation(evaluation: AssignmentId) -> str:
    """`tasks/{task}/submissions/{n}/evaluations/{round}-{participant}`."""
    parent = format_submission(evaluation.task, evaluation.number)
    return f"{parent}/evaluations/{evaluation.round}-{evaluation.participant}"


def format_artifact(sha256: str) -> str:
    """`artifacts/{sha256 hex}`."""
    return f"artifacts/{sha256}"


def format_stake(participant: str) -> str:
    """`stakes/{participant}`."""
    return f"stakes/{participant}"


def format_draw(draw: str) -> str:
    """`draws/{draw}`."""
    return f"draws/{draw}"


def format_training(training: str) -> str:
    """`trainings/{training}`."""
    return f"trainings/{training}"
