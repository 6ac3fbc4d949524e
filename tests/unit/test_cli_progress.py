"""Progress where nobody sees a bar: plain lines, each of which says something new."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tiltyard.cli import output
from tiltyard.cli.commands import app
from tiltyard.cli.output import ProgressLine


def test_a_line_is_not_said_twice_and_has_no_count_before_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "_PLAIN_EVERY_S", 0.0)
    with ProgressLine("training", unit="steps") as line:
        line.update(0, 0, "waiting for its first step")
        line.update(1, 2, "loss 1")
        for _ in range(3):
            line.update(2, 2, "loss 0.5")
    out, said = capsys.readouterr()
    assert out == ""
    assert said.splitlines() == [
        "training: waiting for its first step",
        "training: 1/2 steps loss 1",
        "training: 2/2 steps loss 0.5",
    ]


def test_packing_says_how_far_it_is(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.arange(12.0).reshape(6, 2), y=np.arange(6) % 2)
    result = CliRunner().invoke(app, ["dataset", "pack", str(tmp_path / "d.npz"), str(tmp_path / "d.safetensors")])
    assert (result.exit_code, result.stderr) == (0, "packing: 6 rows read\n")
