"""Tables of commands: what participants call themselves is shown letter by letter."""

import pytest

from tiltyard.cli.output import print_table


@pytest.mark.parametrize("name", ["[/nope] x", "[bold]x[/bold]", "[link=https://example.org]me[/link]", ":smile:"])
def test_a_name_is_no_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("participant", "name"), [("participants/1", name), ("participants/2", "y")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split(maxsplit=1) == ["participants/1", name] for line in map(str.strip, lines))


def test_into_a_pipe_a_row_is_one_line_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    why = "the second tensor has another shape; " * 30
    print_table(("submission", "why"), [("tasks/t/submissions/1", why)])
    assert why.strip() in capsys.readouterr().out
