"""What `deploy/backup` writes and puts back: folders stand for the volumes, programs of this machine for containers."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from deploy.arena import HERE, Arena

# A dump is one line, which must be there.
DOCKER = """#!/bin/bash
[ "$1 $2" = "compose version" ] && exit
shift 5
[ "$1" = up ] && exit
shift
while [[ $1 == -* ]]; do shift; done
cd "$VOLUMES/$1"
shift
exec "$@"
"""
PROGRAMS = {
    "docker": DOCKER,
    "start-postgres": "#!/bin/sh\n",
    "pg_dump": "#!/bin/sh\necho dump of $7\n",
    "pg_restore": "#!/bin/sh\n"
    'read -r line || { echo "pg_restore: error: could not read" >&2; exit 1; }\n'
    '[ "$1" = --file ] || echo "$line" >> restored\n',
}
NAMES = ("registry", "selector")


class Machine:
    """An arena of which both services have files in their volumes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.volumes, self.backup = folder, folder / "volumes", folder / "backup"
        for name in NAMES:
            (self.volumes / name).mkdir(parents=True)
            for number in range(3):
                (self.volumes / name / f"{number}.pem").write_bytes(bytes(400 * number) + name.encode())
        (self.volumes / "database").mkdir()
        self.put(PROGRAMS)
        Arena(folder / "arena").prepare()

    def put(self, programs: Mapping[str, str]) -> None:
        """Programs that come before those of this machine."""
        (self.folder / "bin").mkdir(exist_ok=True)
        for name, text in programs.items():
            file = self.folder / "bin" / name
            file.write_text(text)
            file.chmod(0o755)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The script, with the backup's folder as its last argument."""
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "VOLUMES": str(self.volumes),
            "ARENA": str(self.folder / "arena"),
        }
        command = [HERE / "backup", *arguments, self.backup]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    def contents(self) -> Mapping[str, bytes]:
        """What the volumes hold."""
        files = [path for path in self.volumes.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.volumes)): path.read_bytes() for path in files}

    def lose(self) -> None:
        """Empties the volumes."""
        for path in self.contents():
            (self.volumes / path).unlink()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_backup_brings_back_the_volumes_and_is_nobody_elses_to_read(machine: Machine) -> None:
    before = machine.contents()
    mask = os.umask(0)
    try:
        done = machine.run()
    finally:
        os.umask(mask)
    assert done.returncode == 0, done.stderr
    assert {each.stat().st_mode & 0o077 for each in (machine.backup, *machine.backup.iterdir())} == {0}
    machine.lose()
    done = machine.run("--restore")
    assert done.returncode == 0, done.stderr
    restored = {**before, "database/restored": b"dump of registry\ndump of selector\n"}
    assert machine.contents() == restored
    # Another one does not take its place.
    again = machine.run()
    assert (again.returncode, again.stderr) == (
        1,
        f"there is {machine.backup} already: a backup goes into a new folder\n",
    )


@pytest.mark.parametrize("name", NAMES)
def test_of_a_backup_that_was_cut_off_nothing_is_put_back(machine: Machine, name: str) -> None:
    assert machine.run().returncode == 0
    machine.lose()
    tar, dump = machine.backup / f"{name}.tar", machine.backup / f"{name}.dump"
    whole = tar.read_bytes()
    # Headers and contents come in blocks of 512 bytes: some of these cuts are between two files.
    for end in range(0, len(whole.rstrip(b"\0")), 512):
        tar.write_bytes(whole[:end])
        done = machine.run("--restore")
        assert done.returncode == 1, end
        assert done.stderr.endswith(f"{tar} was cut off\n"), end
        assert machine.contents() == {}
    tar.write_bytes(whole)
    dump.write_bytes(b"")
    done = machine.run("--restore")
    assert (done.returncode, machine.contents()) == (1, {})
    assert "pg_restore: error" in done.stderr
    dump.unlink()
    done = machine.run("--restore")
    assert (done.returncode, done.stderr) == (1, f"there is no {dump}\n")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ('#!/bin/sh\n[ "$1" = -c ] && { /bin/tar "$@" | head -c 1024; exit 0; }\nexec /bin/tar "$@"\n', "was cut off"),
        ('#!/bin/sh\n[ "$1" = -c ] && { echo "tar: no room" >&2; exit 2; }\nexec /bin/tar "$@"\n', "tar: no room"),
    ],
)
def test_a_backup_that_breaks_off_leaves_nothing_that_looks_like_one(machine: Machine, program: str, said: str) -> None:
    machine.put({"tar": program})
    done = machine.run()
    assert done.returncode != 0
    assert said in done.stderr
    assert not list(machine.folder.glob("backup*"))


def test_an_upload_that_grows_meanwhile_spoils_no_backup(machine: Machine) -> None:
    machine.put({"tar": '#!/bin/sh\n/bin/tar "$@" || exit\n[ "$1" != -c ]\n'})
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert (machine.backup / "selector.tar").exists()


@pytest.mark.parametrize("arguments", [(), ("--restore",), ("--help",), ("one", "two")])
def test_a_wrong_command_is_told_the_right_one_and_does_nothing(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([HERE / "backup", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: deploy/backup [--restore] FOLDER\n"
