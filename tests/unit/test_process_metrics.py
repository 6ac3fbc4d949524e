"""What a process tells of its machine, asked for when it is collected."""

import os
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
    process_metrics.follow_disks([tmp_path, tmp_path])
    told = disk.values()
    total = shutil.disk_usage(tmp_path).total
    (mount,) = {dict(key)["system.filesystem.mountpoint"] for key in told}
    assert tmp_path.is_relative_to(str(mount))
    assert [dict(key)["system.filesystem.state"] for key in told] == ["used", "free"]
    assert 0 < sum(told.values()) <= total


def test_a_folder_that_is_gone_keeps_nothing_else_from_being_told(disk: metrics.Gauge, tmp_path: Path) -> None:
    process_metrics.follow_disks([tmp_path / "gone"])
    disk.set(1)
    assert disk.values() == {(): 1}


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="there is no other file system that is sure to be there")
def test_a_disk_of_its_own_is_told_of_by_itself(disk: metrics.Gauge, tmp_path: Path) -> None:
    process_metrics.follow_disks([tmp_path, Path("/proc/self")])
    assert {dict(key)["system.filesystem.mountpoint"] for key in disk.values()} > {"/proc"}
