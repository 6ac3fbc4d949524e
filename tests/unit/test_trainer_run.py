"""One run in its folder: what it begins with, and that it goes on from where it was broken off to the bit."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from services.trainer import runfolder
from services.trainer.config import LossKind, TrainingConfig
from services.trainer.datareport import DataReport
from services.trainer.descent.acceleration import allow_tf32
from services.trainer.descent.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from services.trainer.descent.preparing import looked_through
from services.trainer.descent.run import train
from tiltyard.datasets import Dataset, write_dataset
from tiltyard.models import Network, build, save_weights
from tiltyard.modelspec import Mlp, ModelSpec

SPEC = ModelSpec((8, 8), 10, Mlp((32,)), 1 / 16)
CONFIG = TrainingConfig(epochs=60, batch_size=50, patience=50)


class Killed(BaseException):
    """What ends a run at a moment of the test's choice, as a signal would."""


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    """The weights of a model that no training begins with by itself, named by their digest."""
    save_weights(build(SPEC, seed=4321), tmp_path / "base")
    digest = hashlib.sha256((tmp_path / "base").read_bytes()).hexdigest()
    return (tmp_path / "base").rename(tmp_path / f"{digest}.safetensors")


def ordered(folder: Path, *, config: TrainingConfig = CONFIG, base_model: Path | None = None) -> Path:
    digits = load_digits()
    data = folder.parent / "digits.safetensors"
    if not data.exists():
        write_dataset(data, digits.images[:300].astype(np.uint8), digits.target[:300].astype(np.int64))
    order = runfolder.Order(data, SPEC, LossKind.CROSS_ENTROPY, config, "cpu", 1, base_model)
    runfolder.prepare(folder, order)
    return folder


def run(folder: Path, *, say: Callable[[dict[str, Any]], None] = lambda _: None) -> tuple[int, list[dict[str, Any]]]:
    """The exit status, and what was said."""
    events: list[dict[str, Any]] = []

    def keep(event: dict[str, Any]) -> None:
        events.append(event)
        say(event)

    return train(folder, say=keep, stopped=threading.Event()), events


def broken_off(folder: Path) -> None:
    """Trains until some point after the first checkpoint."""

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and runfolder.checkpoint(folder).exists():
            raise Killed

    with pytest.raises(Killed):
        run(folder, say=kill)


def test_a_fine_tuned_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, base_model: Path
) -> None:
    config = replace(CONFIG, checkpoint_interval_s=0)
    status, whole = run(ordered(tmp_path / "whole", config=config, base_model=base_model))
    assert status == 0
    folder = ordered(tmp_path / "broken", config=config, base_model=base_model)
    broken_off(folder)
    # What goes on has its weights from the checkpoint: the base model may be gone.
    base_model.unlink()
    status, resumed = run(folder)
    assert status == 0
    assert resumed[-1] == whole[-1]
    assert resumed[-1]["event"] == "trained"
    _, fresh = run(ordered(tmp_path / "fresh", config=config))
    assert fresh[-1]["model_digest"] != whole[-1]["model_digest"]


def test_a_model_whose_file_answers_otherwise_is_not_let_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaging(module: Network, path: Path) -> None:
        with torch.no_grad():
            module.get_parameter("head.bias")[0] += 1
            save_weights(module, path)
            module.get_parameter("head.bias")[0] -= 1

    monkeypatch.setattr("services.trainer.descent.run.save_weights", damaging)
    folder = ordered(tmp_path / "run")
    status, events = run(folder)
    assert status == 1
    assert events[-1]["event"] == "broken"
    assert "the model's file answers otherwise than the trained model" in events[-1]["error"]
    assert not (folder / runfolder.MODEL_FILE).exists()
    assert runfolder.read_result(folder) is None


def test_a_base_model_that_was_damaged_on_the_disk_is_not_trained_from(tmp_path: Path, base_model: Path) -> None:
    content = bytearray(base_model.read_bytes())
    content[-1] ^= 1
    base_model.write_bytes(content)
    status, events = run(ordered(tmp_path / "run", base_model=base_model))
    assert status == 1
    assert events[-1]["event"] == "broken"
    assert f"no longer artifacts/{base_model.stem}" in events[-1]["error"]


def test_a_base_model_of_another_architecture_is_refused_with_both_shapes(tmp_path: Path) -> None:
    save_weights(build(replace(SPEC, architecture=Mlp((16,))), seed=0), tmp_path / "base")
    digest = hashlib.sha256((tmp_path / "base").read_bytes()).hexdigest()
    other = (tmp_path / "base").rename(tmp_path / f"{digest}.safetensors")
    status, events = run(ordered(tmp_path / "run", base_model=other))
    assert status == 1
    assert "has shape (16, 64), not (32, 64)" in events[-1]["error"]


@pytest.mark.parametrize("tf32", [True, False])
def test_products_are_computed_in_tf32_by_choice(tmp_path: Path, tf32: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        allow_tf32(not tf32)
        status, _ = run(ordered(tmp_path / "run", config=replace(CONFIG, epochs=1, patience=0, tf32=tf32)))
        assert status == 0
        # What a CPU makes of it is nothing; that a device would be told is seen here.
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_checkpoint_that_cannot_be_read_is_said_and_begun_anew(tmp_path: Path, base_model: Path) -> None:
    _, whole = run(ordered(tmp_path / "whole", base_model=base_model))
    folder = ordered(tmp_path / "broken", base_model=base_model)
    runfolder.checkpoint(folder).write_bytes(b"no checkpoint")
    status, events = run(folder)
    assert status == 0
    assert "begins anew" in events[0]["text"]
    assert events[-1] == whole[-1]


def test_a_checkpoint_that_the_disk_does_not_give_back_is_said_and_begun_anew(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=2, checkpoint_interval_steps=6)
    _, whole = run(ordered(tmp_path / "whole", config=config))
    folder = ordered(tmp_path / "broken", config=config)
    # Its first page is nobody's: to read it is EIO.
    runfolder.checkpoint(folder).symlink_to("/proc/self/mem")
    status, events = run(folder)
    assert status == 0
    lost = os.strerror(errno.EIO)
    text = f"begins anew: checkpoint.safetensors is not given back by the disk ({lost})"
    assert events[0] == {"event": "warning", "text": text}
    assert events[-1] == whole[-1]
    # The next one has taken its place.
    assert not runfolder.checkpoint(folder).is_symlink()


def without(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(prefix)}
    return Checkpoint(kept, checkpoint.facts)


def with_tensor(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> Checkpoint:
    return Checkpoint({**checkpoint.tensors, name: tensor}, checkpoint.facts)


def with_facts(checkpoint: Checkpoint, **facts: Any) -> Checkpoint:
    return Checkpoint(checkpoint.tensors, {**checkpoint.facts, **facts})


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda found: without(found, "model.head."), "'model.head.bias'"),
        (lambda found: without(found, "optimizer."), "'optimizer.0.exp_avg'"),
        (lambda found: without(found, "best."), "'best.head.bias'"),
        (lambda found: without(found, "random.cpu"), "'random.cpu'"),
        (lambda found: with_tensor(found, "model.head.bias", torch.zeros(9)), "'model.head.bias'"),
        (lambda found: with_tensor(found, "optimizer.0.exp_avg", torch.zeros(2)), "'optimizer.0.exp_avg'"),
        (lambda found: with_tensor(found, "optimizer.99.exp_avg", torch.zeros(2)), "'optimizer.99.exp_avg'"),
        (lambda found: with_tensor(found, "average.head.bias", torch.zeros(10)), "'average.head.bias'"),
        (lambda found: Checkpoint(found.tensors, {"step": 3}), "the fact 'best_rank'"),
        (lambda found: with_facts(found, average=0.5), "the fact 'average'"),
        (lambda found: with_facts(found, step=10**9), "step 1000000000 of "),
        (lambda found: with_facts(found, holdout={"correct": 1}), "the fact 'holdout'"),
    ],
)
def test_a_checkpoint_of_another_form_is_said_and_begun_anew(
    tmp_path: Path, base_model: Path, other: Callable[[Checkpoint], Checkpoint], what: str
) -> None:
    config = replace(CONFIG, epochs=4, checkpoint_interval_steps=12)
    _, whole = run(ordered(tmp_path / "whole", config=config, base_model=base_model))
    folder = ordered(tmp_path / "broken", config=config, base_model=base_model)
    run(folder)
    (folder / "result.json").unlink()
    found = load_checkpoint(runfolder.checkpoint(folder))
    assert found is not None
    save_checkpoint(runfolder.checkpoint(folder), other(found))
    status, events = run(folder)
    assert status == 0
    assert events[0]["event"] == "warning"
    assert events[0]["text"].startswith("begins anew: the checkpoint is of another form")
    assert what in events[0]["text"]
    assert events[-1] == whole[-1]


@pytest.mark.parametrize(
    "left",
    [
        '{"rows": 300, "entropy": 1.5, "class_rows": []}',
        '{"rows": "300", "class_rows": []}',
        '{"rows": 300, "class_rows": [0.5]}',
        '{"rows": 300}',
        "[",
        "3",
    ],
)
def test_a_data_report_of_another_form_is_made_again(tmp_path: Path, left: str) -> None:
    folder = ordered(tmp_path / "run")
    order = runfolder.read_order(folder)
    looks: list[dict[str, Any]] = []

    def look() -> DataReport | None:
        return looked_through(folder, order, Dataset.open(order.dataset), looks.append, threading.Event())

    found = look()
    assert found is not None
    assert found.rows == 300
    assert looks
    looks.clear()
    assert look() == found
    assert not looks
    runfolder.data_report(folder).write_text(left)
    assert look() == found
    assert looks


class OneWorker:
    """services.trainer.descent.workers.Workers of which there is one."""

    rank, size = 0, 1

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """The sum over this one."""


class WithOneWhoCannotRead(OneWorker):
    """Of two workers the first; the other one has no checkpoint, and whatever is added up else is of this one alone."""

    size = 2

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """The sum of this one's and of nothing."""


def test_workers_go_on_from_a_checkpoint_if_all_can(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=4, checkpoint_interval_steps=6)
    said = []
    for workers in (OneWorker(), WithOneWhoCannotRead()):
        folder = ordered(tmp_path / f"{workers.size}", config=config)
        run(folder)
        (folder / "result.json").unlink()
        events: list[dict[str, Any]] = []
        assert train(folder, say=events.append, stopped=threading.Event(), workers=workers) == 0
        said.append([event["text"] for event in events if event["event"] == "warning"])
    assert said == [[], ["begins anew: another worker has no checkpoint that it can read"]]


class NeverWaiting(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        pytest.fail("the others would wait for this worker, and give up")


def test_workers_do_not_wait_for_a_disk_that_takes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, checkpoint: Checkpoint) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("services.trainer.descent.keeper.save_checkpoint", full)
    folder = ordered(tmp_path / "run", config=replace(CONFIG, epochs=2, checkpoint_interval_steps=6))
    events: list[dict[str, Any]] = []
    assert train(folder, say=events.append, stopped=NeverWaiting(), workers=OneWorker()) == 0
    warning = next(event["text"] for event in events if event["event"] == "warning")
    assert warning == "no checkpoint at step 6: [Errno 28] No space left on device"
    assert events[-1]["event"] == "trained"
