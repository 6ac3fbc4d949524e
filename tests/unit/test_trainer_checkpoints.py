"""Checkpoints: what is in the file, and how a run goes on while a thread writes it."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.trainer.descent import keeper as keeping
from services.trainer.descent.checkpoints import Checkpoint, CheckpointUnreadable, load_checkpoint, save_checkpoint
from services.trainer.descent.keeper import CheckpointKeeper
from tiltyard.tensorfile import read_header

STATE = {
    "scalar": torch.tensor(3.5),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "empty": torch.zeros(0, 3),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "whole": torch.tensor([1, -(2**40)]),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
}


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    assert load_checkpoint(path) is None
    save_checkpoint(path, Checkpoint(STATE, {"step": 3, "best": [1.0, -2.0]}))
    found = load_checkpoint(path)
    assert found is not None
    assert found.facts == {"step": 3, "best": [1.0, -2.0]}
    assert set(found.tensors) == set(STATE)
    for name, tensor in STATE.items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.tensors[name], tensor)
    raw = path.read_bytes()
    header = read_header(lambda offset, n: raw[offset : offset + n], len(raw))
    for entry in header.tensors.values():
        assert entry.start % {"U8": 1, "BOOL": 1, "BF16": 2, "F32": 4, "I64": 8}[entry.dtype] == 0
    assert [each.name for each in tmp_path.iterdir()] == ["c.safetensors"]
    path.write_bytes(raw[:-1])
    with pytest.raises(CheckpointUnreadable):
        load_checkpoint(path)


@pytest.mark.parametrize("damage", [(b'step\\": 3', b'step\\": 7'), (b"\x00\x00\x60\x40", b"\x00\x00\x61\x40")])
def test_a_checkpoint_that_the_disk_has_damaged_is_not_gone_on_from(
    tmp_path: Path, damage: tuple[bytes, bytes]
) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, Checkpoint(STATE, {"step": 3}))
    raw = path.read_bytes()
    assert raw.count(damage[0]) == 1
    path.write_bytes(raw.replace(*damage))
    with pytest.raises(CheckpointUnreadable, match="damaged"):
        load_checkpoint(path)
    # One of an earlier version has no digest.
    path.write_bytes(raw.replace(b'"sha256"', b'"sha999"'))
    assert load_checkpoint(path) is not None


class Disk:
    """In place of `save_checkpoint`: writes when it is let, and fails as it is told."""

    def __init__(self) -> None:
        self.may_write, self.troubles = threading.Event(), list[OSError]()
        self.threads: list[str] = []

    def save(self, path: Path, checkpoint: Checkpoint) -> None:
        assert self.may_write.wait(60)
        self.threads.append(threading.current_thread().name)
        if self.troubles:
            raise self.troubles.pop(0)
        save_checkpoint(path, checkpoint)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(keeping, "save_checkpoint", made.save)
    return made


def at_once(write: Callable[[], None]) -> bool:
    write()
    return True


def kept(path: Path) -> tuple[int, list[float]]:
    found = load_checkpoint(path)
    assert found is not None
    return found.facts["step"], found.tensors["w"].tolist()


def test_what_is_written_is_the_state_of_the_moment_though_the_run_goes_on(tmp_path: Path, disk: Disk) -> None:
    path, weights = tmp_path / "c", torch.zeros(3)
    with CheckpointKeeper(path, persist=at_once, warn=pytest.fail) as keeper:
        keeper.keep(Checkpoint({"w": weights}, {"step": 1}))
        weights += 1
        keeper.look()
        assert not path.exists()
        disk.may_write.set()
        keeper.settle()
        assert kept(path) == (1, [0.0] * 3)
        # The next one waits for the one before, and takes its place.
        keeper.keep(Checkpoint({"w": weights}, {"step": 2}))
        weights += 1
        keeper.keep(Checkpoint({"w": weights, "v": torch.ones(2)}, {"step": 3}))
    assert kept(path) == (3, [2.0] * 3)


def test_a_full_disk_stops_the_run_where_it_looks_and_is_waited_for_there(tmp_path: Path, disk: Disk) -> None:
    path, persisted = tmp_path / "c", list[str]()
    disk.troubles = [OSError(errno.ENOSPC, "No space left on device")]
    disk.may_write.set()

    def persist(write: Callable[[], None]) -> bool:
        persisted.append(threading.current_thread().name)
        write()
        return True

    with CheckpointKeeper(path, persist=persist, warn=pytest.fail) as keeper:
        keeper.keep(Checkpoint({"w": torch.ones(1)}, {"step": 1}))
        while not persisted:
            keeper.look()
    assert persisted == [threading.current_thread().name]
    assert disk.threads == ["checkpoint_0", threading.current_thread().name]
    assert kept(path) == (1, [1.0])


def test_other_trouble_is_said_with_its_step_and_the_run_goes_on(tmp_path: Path, disk: Disk) -> None:
    path, said = tmp_path / "c", list[str]()
    disk.troubles = [OSError(errno.EIO, "broken"), OSError(errno.EIO, "broken")]
    disk.may_write.set()
    with CheckpointKeeper(path, persist=at_once, warn=said.append) as keeper:
        keeper.keep(Checkpoint({"w": torch.ones(1)}, {"step": 7}))
        keeper.keep(Checkpoint({"w": torch.ones(1)}, {"step": 9}))
    assert len(said) == 1
    assert said[0].startswith("no checkpoint at step 7: ")
    assert "broken" in said[0]
    assert kept(path) == (9, [1.0])
