"""A real OSS Vizier as a process, and the request that has it record one trial."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _peers

CREATE_TRIAL = "/vizier.VizierService/CreateTrial"


@dataclass(frozen=True)
class Vizier:
    """Where it serves, and the bytes of a `CreateTrialRequest` for its one study."""

    address: str
    request: bytes


@contextmanager
def serving_vizier(folder: Path) -> Iterator[Vizier]:
    """Vizier on a SQLite file in `folder`. Raises _peers.PeerUnavailable."""
    python = _peers.python_of(_peers.VIZIER)
    script = Path(__file__).with_name("_vizier_server.py")
    with (folder / "vizier.log").open("w") as log:
        process = subprocess.Popen(
            [str(python), str(script), str(folder / "vizier.db")], stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        if not said:
            last = (folder / "vizier.log").read_text().strip().splitlines()[-1:]
            raise _peers.PeerUnavailable("".join(last) or "it ended without a word")
        told = json.loads(said)
        yield Vizier(told["address"], bytes.fromhex(told["request"]))
    finally:
        process.kill()
        process.communicate()
