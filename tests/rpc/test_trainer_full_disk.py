"""A training node whose disk is full: a real file system of a few megabytes that a test fills and empties again."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.rpc.test_trainer import LONG, RunningTrainer, children, refused, write_digits
from tiltyard.client import Node, persist
from tiltyard.identity import Key
from tiltyard.trainer.v1 import trainer_pb2 as pb

_SIZE = "12m"
_IN_A_SMALL_DISK = 'mount -t tmpfs -o size=$1 tmpfs "$2" && shift 2 && exec "$@"'


def in_a_small_disk(folder: Path, *command: str) -> list[str]:
    """The command in a mount namespace of its own, where `folder` is a small file system."""
    # Who is not root is root of a user namespace.
    rights = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *rights, "--mount", "sh", "-c", _IN_A_SMALL_DISK, "sh", _SIZE, str(folder), *command]


def skip_without_small_disks(folder: Path) -> None:
    possible = shutil.which("unshare") and subprocess.run(
        in_a_small_disk(folder, "true"), check=False, capture_output=True
    )
    if not possible or possible.returncode:
        pytest.skip("a file system of its own needs unshare and mount")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Key]]:
    """A node whose state is on a small disk, its address, and its key."""
    skip_without_small_disks(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "data").mkdir()
    write_digits(tmp_path / "data")
    key = Key.load_or_create(tmp_path / "key.pem")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")}
    with tempfile.TemporaryDirectory(prefix="tiltyard") as short:
        environment |= {
            "TILTYARD_STATE_DIR": str(tmp_path / "state"),
            "TILTYARD_DATA_DIR": str(tmp_path / "data"),
            "TILTYARD_KEY_FILE": str(tmp_path / "key.pem"),
            "TILTYARD_LISTEN": f"unix:{short}/node",
            "TILTYARD_DEVICE": "cpu",
            "TILTYARD_TRAINING_THREADS": "1",
            "TILTYARD_LOG_LEVEL": "error",
        }
        command = in_a_small_disk(tmp_path / "state", sys.executable, "-m", "services.trainer")
        process = subprocess.Popen(command, env=environment)
        try:
            yield process, f"unix:{short}/node", key
        finally:
            process.kill()
            process.wait()


def fill(disk: Path, *, name: str = "filler") -> Path:
    """A file that takes all room there is."""
    filler = disk / name
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with pytest.raises(OSError, match="No space left"):  # noqa: PT012 -- until there is no more
                while True:
                    file.write(bytes(size))
    return filler


async def test_a_training_pauses_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    tmp_path: Path, service: tuple[subprocess.Popen[bytes], str, Key]
) -> None:
    process, address, key = service
    async with Node(key, address=address, node_id=key.id) as node:
        trainer = RunningTrainer(node, address, tmp_path / "state")
        disk = Path(f"/proc/{process.pid}/root{trainer.state}")
        await persist(lambda: node.trainings.ListTrainings(pb.ListTrainingsRequest()))
        await cancelled_while_it_is_full(trainer, disk)
        config = pb.TrainingConfig(epochs=40, checkpoint_interval_steps=20)
        name = (await persist(lambda: trainer.start(config=config, request_id="one"))).name
        filler, paused_at = None, 0
        async for training in trainer.watch(name):
            if filler is None and training.progress.step:
                filler = fill(disk)
            elif filler is not None and training.warnings and not paused_at:
                paused_at = training.progress.step
                assert training.state == pb.TRAINING_STATE_RUNNING
                assert re.match("paused: the disk is full .* the run goes on when there is room", training.warnings[0])
                (child,) = children(trainer.state)
                filler.unlink()
        assert 0 < paused_at < training.progress.total_steps == training.progress.step
        assert training.state == pb.TRAINING_STATE_SUCCEEDED
        assert training.warnings[1] == "the disk has room again: the run goes on"
        assert not child.is_running()
        kept = trainer_folder(disk, name)
        assert sorted(path.name for path in kept.iterdir()) == ["model.safetensors", "spec.json"]
        assert len((await node.trainings.ListTrainings(pb.ListTrainingsRequest())).trainings) == 2


async def cancelled_while_it_is_full(trainer: RunningTrainer, disk: Path) -> None:
    """A paused run ends though nothing can be written, and takes with it what it had."""
    config = pb.TrainingConfig(epochs=LONG, checkpoint_interval_steps=20)
    name = (await trainer.start(config=config)).name
    filler = None
    async for training in trainer.watch(name):
        if filler is None and (trainer_folder(disk, name) / "checkpoint.safetensors").exists():
            filler = fill(disk)
        elif filler is not None and training.warnings:
            break
    assert filler is not None
    # What was half written when the first one came may have made room again by being given up.
    fillers = [filler, fill(disk, name="more")]
    # What cannot be written down is not begun, and it is said what is full.
    error = await refused(trainer.start(epochs=LONG, request_id="not now"))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
    assert (error.retry_after_s, error.metadata["resource"]) == (10.0, "database")
    assert "nothing was changed" in error.message
    await trainer.cancel(name)
    ended = await trainer.until(name)
    assert ended.state == pb.TRAINING_STATE_CANCELLED
    assert not children(trainer.state)
    assert not trainer_folder(disk, name).exists()
    for each in fillers:
        each.unlink()


def trainer_folder(disk: Path, name: str) -> Path:
    return disk / "trainings" / name.removeprefix("trainings/")


def test_the_folder_of_temporary_files_is_waited_for_in_its_place(tmp_path: Path) -> None:
    skip_without_small_disks(tmp_path)
    command = in_a_small_disk(tmp_path, sys.executable, "-c", _WAITS_FOR_ITS_SCRATCH, str(tmp_path))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("paused: the disk is full")
    assert said[1:] == ["waits", "the disk has room again: the run goes on", "[]"]


_WAITS_FOR_ITS_SCRATCH = """
import sys
from pathlib import Path
from services.trainer import runfolder
from services.trainer.fulldisk import make_folder_with_room, write_when_there_is_room
from tests.rpc.test_trainer_full_disk import fill

disk = Path(sys.argv[1])
filler = fill(disk)
scratch = runfolder.scratch(Path("run"))
assert scratch.parent == disk

def wait(_seconds):
    print("waits")
    filler.unlink()
    return False

write_when_there_is_room(lambda: make_folder_with_room(scratch, 1 << 20), warn=print, wait=wait)
print([each.name for each in scratch.iterdir()])
"""
