"""What a process tells of its machine, asked for when it is collected."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.runtime import process_metrics
from tiltyard.telemetry import metrics


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[metrics.Gauge]:
    monkeypatch.setattr(metrics, "_declared", {})
    gauge = metrics.Gauge("disk", unit="By", description="")
    monkeypatch.setattr(process_metrics, "_DISK", gauge)
    metrics.collect(True)
    yield gauge
    metrics.collect(False)


def test_used_and_free_add_up_to_the_disk_but_for_what_is_kept_for_root(disk: metrics.Gauge, tmp_path: Path) -> None:
    process_metrics.follow_disk(tmp_path)
    told = disk.values()
    total = shutil.disk_usage(tmp_path).total
    assert told.keys() == {(("system.filesystem.state", state),) for state in ("used", "free")}
    assert 0 < sum(told.values()) <= total


def test_a_folder_that_is_gone_keeps_nothing_else_from_being_told(disk: metrics.Gauge, tmp_path: Path) -> None:
    process_metrics.follow_disk(tmp_path / "gone")
    disk.set(1)
    assert disk.values() == {(): 1}
