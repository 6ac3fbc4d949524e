"""The first start of the database's container, with programs that write down what PostgreSQL's would be told."""

import subprocess
from pathlib import Path

import pytest

from deploy.arena import DATABASES, HERE

PROGRAMS = {
    "initdb": """#!/bin/bash
while [ "$1" != --pgdata ]; do shift; done
mkdir "$2"
""",
    "postgres": """#!/bin/bash
if [ "$1" = --single ]; then cat > "$3/told"; else echo started; fi
""",
}


class Container:
    """Its folders, in one of this machine."""

    def __init__(self, folder: Path) -> None:
        self.cluster, self.secrets = folder / "state" / "cluster", folder / "secrets"
        self._script = folder / "start"
        programs = folder / "postgresql" / "17" / "bin"
        for each in (self.cluster.parent, self.secrets, programs):
            each.mkdir(parents=True)
        for name, text in PROGRAMS.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        for name in DATABASES:
            (self.secrets / f"{name}_password").write_text(f"{name}0123")
        script = (HERE / "postgres/start").read_text()
        inside = (("/usr/lib/postgresql", programs.parents[1]), ("/var/lib/tiltyard", self.cluster.parent))
        for there, here in (*inside, ("/run/secrets", self.secrets)):
            script = script.replace(there, str(here))
        self._script.write_text(script)

    def start(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", self._script], capture_output=True, text=True, timeout=60)


def test_a_first_start_makes_a_role_with_its_password_for_each_database(tmp_path: Path) -> None:
    container = Container(tmp_path)
    for _ in range(2):
        started = container.start()
        assert (started.returncode, started.stdout) == (0, "started\n"), started.stderr
    told = (container.cluster / "told").read_text()
    for name in DATABASES:
        assert f"CREATE ROLE {name} LOGIN PASSWORD '{name}0123'\n" in told


@pytest.mark.parametrize("name", DATABASES)
@pytest.mark.parametrize("empty", [True, False])
def test_no_role_is_made_without_its_password(tmp_path: Path, name: str, empty: bool) -> None:
    container = Container(tmp_path)
    password = container.secrets / f"{name}_password"
    whole = password.read_text()
    password.unlink()
    if empty:
        password.touch()
    else:
        # As good as one that its reader has no right to, which root always has.
        password.symlink_to("nowhere")
    started = container.start()
    assert started.returncode != 0
    assert str(password) in started.stderr
    assert not container.cluster.exists()
    password.unlink()
    password.write_text(whole)
    assert container.start().returncode == 0
    assert f"PASSWORD '{whole}'" in (container.cluster / "told").read_text()
