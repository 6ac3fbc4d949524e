"""Tables of commands: what participants call themselves is shown letter by letter."""

import pytest

from tiltyard.cli.draws import outcome_of
from tiltyard.cli.evaluations import row_of
from tiltyard.cli.output import print_table
from tiltyard.cli.submissions import describe as describe_submission
from tiltyard.cli.task_steps import describe as describe_task
from tiltyard.registry.v1 import evaluation_pb2, submission_pb2, task_pb2
from tiltyard.type.v1 import draw_pb2

NEWER = 99
"""The number of a value that these stubs don't know."""


@pytest.mark.parametrize("name", ["[/nope] x", "[bold]x[/bold]", "[link=https://example.org]me[/link]", ":smile:"])
def test_a_name_is_no_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("participant", "name"), [("participants/1", name), ("participants/2", "y")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split(maxsplit=1) == ["participants/1", name] for line in map(str.strip, lines))


def test_into_a_pipe_a_row_is_one_line_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    why = "the second tensor has another shape; " * 30
    print_table(("submission", "why"), [("tasks/t/submissions/1", why)])
    assert why.strip() in capsys.readouterr().out


def test_what_only_a_newer_server_knows_is_shown_by_its_number() -> None:
    evaluation = evaluation_pb2.Evaluation(name="e", verdict=NEWER)  # type: ignore[arg-type]
    evaluation.report.SetInParent()
    evaluation.finding.fault = NEWER  # type: ignore[assignment]
    assert row_of(evaluation) == ("e", "99", "", "", "", "99")
    assert describe_task(task_pb2.Task(name="tasks/t", state=NEWER)).startswith("tasks/t 99: ")  # type: ignore[arg-type]
    assert describe_submission(submission_pb2.Submission(name="s", state=NEWER)) == "s 99"  # type: ignore[arg-type]
    over = draw_pb2.PassedOver(owner_group="g", reason=NEWER)  # type: ignore[arg-type]
    assert outcome_of(draw_pb2.DrawReceipt(passed_over=[over]), "p", "g")[0] == "passed over at place 0: reason 99"
