"""A service as a process of its own, on one socket and state, which can be killed and started again."""

import os
import signal
import subprocess
import sys
from pathlib import Path


class ServiceProcess:
    """`python -m services.{service}` with these settings."""

    def __init__(self, folder: Path, service: str, **settings: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._service = service
        self.address = f"unix:{folder}/s.sock"
        self._settings = {
            "TILTYARD_LISTEN": self.address,
            "TILTYARD_STATE_DIR": str(folder / "state"),
            **{f"TILTYARD_{name.upper()}": value for name, value in settings.items()},
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"services.{self._service}"],
                env=environment | self._settings,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
