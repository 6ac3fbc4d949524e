"""A state folder has one process at a time."""

import os
import stat
from pathlib import Path

import pytest

from services.runtime.state_folder import own_state_folder


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
