"""What `tiltyard train` leaves behind: the loss curve as a table, a picture and TensorBoard's logs."""

import csv
import struct
import sys
from pathlib import Path

import pytest

from tests.unit.test_cli_commands import tiltyard
from tiltyard.cli.loss_curves import COLUMNS, LossCurve, TensorBoardLogs
from tiltyard.cli.training_progress import Remarks, describe_data
from tiltyard.identity import Key
from tiltyard.trainer.v1 import trainer_pb2

STEPS = (0, 10, 20, 30, 20, 30)
"""The steps of the points: it went back to a checkpoint once."""


def point(step: int) -> trainer_pb2.TrainingProgress:
    return trainer_pb2.TrainingProgress(
        step=step, epoch=1, loss=1 / (step + 1), learning_rate=0.5, holdout_total=step, holdout_loss=0.25
    )


def curve() -> LossCurve:
    points = LossCurve()
    for step in STEPS:
        points.add(point(step))
    return points


def test_a_curve_is_written_as_a_table(tmp_path: Path) -> None:
    curve().write_csv(tmp_path / "curve.csv")
    with (tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == [10, 20, 30]
    assert float(rows[1]["loss"]) == 1 / 21


@pytest.mark.filterwarnings("default")  # what matplotlib's own imports warn of is not ours
def test_a_curve_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve().write_png(tmp_path / "curve.png", title="trainings/1")
    content = (tmp_path / "curve.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (960, 600)


@pytest.mark.filterwarnings("default")
def test_a_curve_is_written_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    logs = TensorBoardLogs(tmp_path / "logs")
    for step in STEPS:
        logs.add(point(step))
    logs.close()
    (log,) = (tmp_path / "logs").iterdir()
    content = log.read_bytes()
    assert content.count(b"holdout_loss") == 3
    assert content.count(b"learning_rate") == 3


@pytest.mark.parametrize(
    "options",
    [
        ("--optimizer", "adam"),
        ("--schedule", "linear"),
        ("--class-weights", "1,many"),
    ],
    ids=" ".join,
)
def test_an_option_that_means_nothing_is_a_usage_error(tmp_path: Path, options: tuple[str, str]) -> None:
    Key.generate().save(tmp_path / "me.pem")
    result = tiltyard("train", "d.safetensors", "--task", "t", "--key", tmp_path / "me.pem", *options)
    assert result.exit_code == 2
    assert options[0] in result.stderr
    assert options[1] in result.stderr


def test_what_a_curve_needs_is_missed_before_the_training_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Key.generate().save(tmp_path / "me.pem")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    for options, extra in ((("--curve", "c.png"), "plot"), (("--tensorboard", "logs"), "tensorboard")):
        result = tiltyard("train", "d", "--task", "t", "--key", tmp_path / "me.pem", *options)
        assert result.exit_code == 1
        assert f"tiltyard[{extra}]" in result.stderr


def test_a_data_report_is_one_line() -> None:
    data = trainer_pb2.DataReport(rows=1797, class_rows=[178, 182], minimum=0, maximum=16, mean=4.884, duplicate_rows=3)
    assert describe_data(data) == (
        "1,797 rows, features 0 to 16, mean 4.884, 2 classes of 178 to 182 rows, 3 duplicates, 0 rows with NaN"
    )


def test_each_warning_is_said_once_also_where_old_ones_go_for_new_ones(capsys: pytest.CaptureFixture[str]) -> None:
    remarks = Remarks()
    # The last is what a node has that died before it had written the others down.
    for warnings in ("", "ab", "abcb", "acbd", "cbda", "cb"):
        remarks.look(trainer_pb2.Training(warnings=warnings))
        remarks.look(trainer_pb2.Training(warnings=warnings))
    said = [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines()]
    assert said == list("abcbda")
