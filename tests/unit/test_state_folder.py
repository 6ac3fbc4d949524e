"""A state folder has one process at a time."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from services.runtime.state_folder import make_state_folder, own_state_folder


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "state"
    first = own_state_folder(folder, "trainer")
    with pytest.raises(SystemExit) as refused:
        own_state_folder(folder, "trainer")
    assert refused.value.code == 2
    assert capsys.readouterr().err == f"TILTYARD_STATE_DIR: {folder} is in use by another trainer\n"
    os.close(first)
    os.close(own_state_folder(folder, "trainer"))


def test_a_folder_that_was_made_is_closed_to_others(tmp_path: Path) -> None:
    os.close(own_state_folder(tmp_path / "state", "validator"))
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize("service", ["registry", "selector", "trainer", "validator"])
def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path: Path, service: str) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "state"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")}
    done = subprocess.run(
        [sys.executable, "-m", f"services.{service}"],
        env=environment | {"TILTYARD_STATE_DIR": str(folder), "TILTYARD_REGISTRY": "127.0.0.1:1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, f"TILTYARD_STATE_DIR: {folder} can't be made: Not a directory\n")


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as refused:
        make_state_folder(tmp_path / "file")
    assert refused.value.code == 2
    assert capsys.readouterr().err == f"TILTYARD_STATE_DIR: {tmp_path / 'file'} is no folder\n"
