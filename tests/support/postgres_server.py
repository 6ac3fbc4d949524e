"""A real PostgreSQL server of one's own, on a Unix socket in a folder in memory or on disk, without any installation.

Takes the programs of an installed PostgreSQL (`apt-get install postgresql`), on the PATH or where Debian puts them. The
server refuses to run as root, so root starts it as another user.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

_DEBIAN = Path("/usr/lib/postgresql")
_WHY_NOT = "no PostgreSQL server is installed here (apt-get install postgresql)"


def programs() -> Path | None:
    """The folder with initdb, pg_ctl and postgres; None where no server is installed."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    if _DEBIAN.is_dir():
        folders += sorted((each / "bin" for each in _DEBIAN.iterdir()), reverse=True)
    for folder in folders:
        if all((folder / name).exists() for name in ("initdb", "pg_ctl", "postgres")):
            # What is found by a link lies together with the rest where that leads.
            return (folder / "initdb").resolve().parent
    return None


class PostgresServer:
    """Runs from entering the context to leaving it; `database` makes an empty database and returns its URL."""

    def __init__(self) -> None:
        found = programs()
        if found is None:
            raise LookupError(_WHY_NOT)
        self._programs = found
        self._count = 0
        self._user = _other_user() if os.geteuid() == 0 else None
        # pytest's folders are closed to other users.
        self._folder = Path(tempfile.mkdtemp(prefix="pg-", dir=_roomy()))

    def __enter__(self) -> Self:
        if self._user is not None:
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        self._run("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (self._folder / "data" / "postmaster.pid").exists():
            self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(self._folder)

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    def start(self) -> None:
        """Starts it; after a kill it recovers first."""
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._folder}' -c max_connections=40"
        log = str(self._folder / "log")
        self._run("pg_ctl", "-D", self._data, "-w", "-t", "60", "-l", log, "-o", options, "start")

    def kill(self) -> None:
        """SIGKILL to the whole server, as a crash of the machine's memory would be."""
        leader = int((self._folder / "data" / "postmaster.pid").read_text().split("\n", 1)[0])
        children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
        for process in (leader, *map(int, children)):
            os.kill(process, signal.SIGKILL)
        while any(Path(f"/proc/{process}").exists() and _runs(process) for process in (leader, *map(int, children))):
            os.sched_yield()
        # A dead process that nobody has waited for still has its number, and the next server believes these.
        (self._folder / "data" / "postmaster.pid").unlink(missing_ok=True)
        for file in self._folder.glob(".s.PGSQL.*"):
            file.unlink()

    def database(self) -> str:
        """A new database's URL for SQLAlchemy."""
        import psycopg

        self._count += 1
        name = f"test{self._count}"
        with psycopg.connect(host=str(self._folder), user="postgres", dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type, unused-ignore]
        return f"postgresql+psycopg:///{name}?host={self._folder}&user=postgres"

    def _run(self, program: str, *arguments: str) -> None:
        as_whom: list[str] = []
        if self._user is not None:
            # Not subprocess' own `user`: that forks, which a process with threads of gRPC may not survive.
            as_whom = [
                "setpriv",
                f"--reuid={self._user.pw_uid}",
                f"--regid={self._user.pw_gid}",
                "--clear-groups",
                "--",
            ]
        done = subprocess.run(
            [*as_whom, str(self._programs / program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self._folder,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
        if done.returncode:
            log = self._folder / "log"
            told = log.read_text()[-1000:] if log.exists() else ""
            raise RuntimeError(f"{program} ended with {done.returncode}: {done.stderr}{told}")


def _runs(process: int) -> bool:
    """Whether it is more than an entry that nobody has waited for."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def _other_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise LookupError("root needs a user postgres or nobody to run PostgreSQL as")


def _roomy() -> str | None:
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 4_000_000_000 else None
