"""Real peers (MLServer, Triton's client, Lightning, Vizier) in environments of their own below .venv-peers/, made once.

They need other packages than ours (another protobuf, say), so they share no process with us.
"""

import fcntl
import subprocess
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).parents[1] / ".venv-peers"
INSTALL_TIMEOUT_S = 600

MLSERVER = ("mlserver", ("mlserver>=1.7,<2",))
LIGHTNING = ("lightning", ("lightning>=2.5,<3",))
TRITON = ("triton", ("tritonclient[grpc]>=2.50",))
# It imports jax wherever it serves from, and what it has pinned equinox at needs an older one.
VIZIER = ("vizier", ("google-vizier[jax]==0.1.24", "jax<0.5", "jaxlib<0.5"))


class PeerUnavailable(Exception):
    """The peer could not be installed; the text says why."""


def python_of(peer: tuple[str, tuple[str, ...]], *, ours_too: bool = False, ours_first: bool = False) -> Path:
    """The interpreter of a peer's environment, made at its first use. Raises PeerUnavailable.

    With `ours_too` it finds the packages of this environment after its own: torch need not be installed twice. With
    `ours_first` it is installed upon them, and brings only what is not here.
    """
    name, requirements = peer
    environment = FOLDER / name
    python = environment / "bin" / "python"
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = environment / "installed"
        wanted = "\n".join([sys.version, *requirements])
        if not done.exists() or done.read_text() != wanted:
            # Our own pip installs into it, and what is never imported need not be compiled: a fifth of the time.
            _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(environment)])
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
            if ours_first:
                _see_ours(environment)
            _run([*pip, "--disable-pip-version-check", *requirements])
            done.write_text(wanted)
        if ours_too:
            _see_ours(environment)
    return python


def _see_ours(environment: Path) -> None:
    path = Path(sysconfig.get_path("purelib", vars={"base": str(environment)})) / "ours.pth"
    path.write_text(sysconfig.get_path("purelib") + "\n")


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise PeerUnavailable((error.stderr.strip().splitlines() or ["no reason given"])[-1]) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailable(str(error)) from error
