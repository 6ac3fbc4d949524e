"""The selector's settings: safe without any, refused by name when wrong."""

from datetime import timedelta
from pathlib import Path

import pytest

from services.selector.settings import SelectorSettings


def test_the_selector_starts_without_any_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TILTYARD_STATE_DIR", str(tmp_path))
    settings = SelectorSettings.load()
    assert settings.database_url == f"sqlite:///{tmp_path}/selector.db"
    assert settings.unbonding_time == timedelta(days=7)
    assert settings.validator_min_stake_micros == 100_000_000


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TILTYARD_VALIDATOR_MIN_STAKE_MICROS", "0"),
        ("TILTYARD_TRAINING_NODE_MIN_STAKE_MICROS", "-1"),
        ("TILTYARD_TASK_CREATOR_MIN_STAKE_MICROS", str(2**63)),
        ("TILTYARD_UNBONDING_TIME_S", "soon"),
    ],
)
def test_a_bad_setting_stops_the_start_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as stopped:
        SelectorSettings.load()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"{variable}: ")
