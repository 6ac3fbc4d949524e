"""What trainings leave behind goes when it is old enough, and nothing else does."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.runtime.errors import NotFound
from services.trainer.keeping import OldTrainings
from services.trainer.training import Training, TrainingState
from tests.unit.test_trainer_runs import training

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)


class WrittenDown:
    def __init__(self, *trainings: Training) -> None:
        self._trainings = {each.id: each for each in trainings}
        self.with_history = set(self._trainings)

    async def get(self, training: str) -> Training:
        if training not in self._trainings:
            raise NotFound("TRAINING_NOT_FOUND", training)
        return self._trainings[training]

    async def forget_histories(self, *, ended_by: datetime, most: int) -> int:
        found = [
            each.id
            for each in self._trainings.values()
            if each.id in self.with_history and each.ended_at is not None and each.ended_at <= ended_by
        ]
        self.with_history -= set(found[:1])
        return min(1, len(found))


def written_down() -> WrittenDown:
    return WrittenDown(
        training("old", state=TrainingState.SUCCEEDED, ended_at=NOW - 7 * DAY),
        training("failed", state=TrainingState.FAILED, ended_at=NOW - 8 * DAY),
        training("young", state=TrainingState.SUCCEEDED, ended_at=NOW - 7 * DAY + timedelta(seconds=1)),
        training("waiting", state=TrainingState.SUBMITTING),
    )


def old_trainings(
    folder: Path,
    forgotten: list[str],
    *,
    keep: timedelta,
    trainings: WrittenDown | None = None,
    now: datetime | None = NOW,
) -> OldTrainings:
    for name in ("old", "failed", "young", "waiting", "another"):
        (folder / name / "scratch").mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"weights")
    (folder / "file").touch()

    async def forget(name: str) -> None:
        assert (folder / name / "model.safetensors").exists()
        forgotten.append(name)

    return OldTrainings(folder, trainings or written_down(), keep=keep, forget=forget, clock=lambda: now)


async def test_what_ended_long_ago_goes_and_is_no_longer_served(tmp_path: Path) -> None:
    forgotten: list[str] = []
    trainings = written_down()
    old = old_trainings(tmp_path, forgotten, keep=7 * DAY, trainings=trainings)
    for _ in range(2):
        await old.remove()
        assert {each.name for each in tmp_path.iterdir()} == {"young", "waiting", "another", "file"}
        assert forgotten == ["failed", "old"]
        assert trainings.with_history == {"young", "waiting"}


async def test_what_cannot_be_removed_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    old = old_trainings(tmp_path, forgotten, keep=7 * DAY)
    real = shutil.rmtree

    def rmtree(folder: Path) -> None:
        if folder.name == "failed":
            raise PermissionError(13, "Permission denied", str(folder))
        real(folder)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", rmtree)
        await old.remove()
    assert {each.name for each in tmp_path.iterdir()} == {"failed", "young", "waiting", "another", "file"}
    await old.remove()
    assert not (tmp_path / "failed").exists()


async def test_without_a_limit_everything_stays(tmp_path: Path) -> None:
    forgotten: list[str] = []
    await old_trainings(tmp_path, forgotten, keep=timedelta()).run()
    assert len(list(tmp_path.iterdir())) == 6
    assert forgotten == []


async def test_while_nobody_knows_how_late_it_is_everything_stays(tmp_path: Path) -> None:
    forgotten: list[str] = []
    trainings = written_down()
    await old_trainings(tmp_path, forgotten, keep=7 * DAY, trainings=trainings, now=None).remove()
    assert len(list(tmp_path.iterdir())) == 6
    assert len(trainings.with_history) == 4
