"""An arena of real processes under mutual TLS: commands get through, strangers do not, certificates change."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tiltyard.identity import Key


class Process:
    """A service under mutual TLS with certificates out of one folder."""

    def __init__(self, name: str, folder: Path, certificates: Path, **settings: str) -> None:
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")} | {
            "TILTYARD_LISTEN": "0.0.0.0:0",
            "TILTYARD_STATE_DIR": str(folder / name),
            "TILTYARD_LOG_FORMAT": "json",
            "TILTYARD_TLS_CERTIFICATE": str(certificates / f"{name}.pem"),
            "TILTYARD_TLS_KEY": str(certificates / f"{name}.key"),
            "TILTYARD_TLS_CLIENT_CA": str(certificates / "ca.pem"),
            "TILTYARD_TLS_CA": str(certificates / "ca.pem"),
            **{f"TILTYARD_{setting.upper()}": value for setting, value in settings.items()},
        }
        command = [sys.executable, "-m", f"services.{name}"]
        self.process = subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True)
        self.log: list[dict[str, Any]] = []
        self.port = 0
        self.address = ""

    def serves(self) -> None:
        """Waits until it does, and knows its address then."""
        self.port = int(self.until("serving")["address"].rpartition(":")[2])
        self.address = f"localhost:{self.port}"

    def until(self, event: str) -> dict[str, Any]:
        """The next line of the log that tells of `event`."""
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if line.startswith("{"):
                self.log.append(json.loads(line))
                if self.log[-1]["event"] == event:
                    return self.log[-1]
        raise AssertionError(f"ended without {event!r}: {''.join(said)}")

    def healthy(self) -> subprocess.CompletedProcess[str]:
        """What the health check of a container says."""
        return subprocess.run(
            [sys.executable, "-m", "services.runtime.healthcheck"],
            env=self.environment | {"TILTYARD_LISTEN": f"0.0.0.0:{self.port}"},
            capture_output=True,
            text=True,
        )

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def starter(name: str, **settings: str) -> Process:
        started.append(Process(name, tmp_path, tmp_path / "certs", **settings))
        started[-1].serves()
        return started[-1]

    yield starter
    for each in reversed(started):
        each.stop()


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")}
    return subprocess.run(
        [sys.executable, "-m", "tiltyard.cli", *map(str, arguments)],
        env=known | environment,
        capture_output=True,
        text=True,
    )


def make_certificates(folder: Path) -> None:
    done = command("certs", "dev", folder)
    assert done.returncode == 0, done.stderr


def test_an_arena_under_mutual_tls(tmp_path: Path, start: Callable[..., Process]) -> None:
    certificates = tmp_path / "certs"
    make_certificates(certificates)
    operator, registry_key = Key.generate(), Key.generate()
    operator.save(tmp_path / "operator.pem")
    registry_key.save(tmp_path / "registry" / "key.pem")
    selector = start("selector", operators=operator.id, services=registry_key.id)
    # Its first start asks the selector for its key: by TLS, showing its own certificate.
    registry = start("registry", operators=operator.id, selector=selector.address)
    trust = {"TILTYARD_TLS_CA": str(certificates / "ca.pem")}
    own = {
        "TILTYARD_TLS_CERTIFICATE": str(certificates / "client.pem"),
        "TILTYARD_TLS_KEY": str(certificates / "client.key"),
    }
    arena = {
        "TILTYARD_KEY": str(tmp_path / "operator.pem"),
        "TILTYARD_REGISTRY": registry.address,
        "TILTYARD_SELECTOR": selector.address,
    }
    assert (registry.healthy().stdout, registry.healthy().returncode) == ("SERVING\n", 0)
    done = command("participant", "register", "Ada", **arena, **trust, **own)
    assert done.returncode == 0, done.stderr

    # No certificate, and plaintext: each in one line.
    for wrong in (trust, {}):
        done = command("participant", "list", **arena, **wrong)
        assert done.returncode == 1, done.stdout
        assert done.stderr.startswith("error: the service cannot be reached"), done.stderr

    # New certificates while all run: who connects from then on sees the new one, and nothing is interrupted.
    old = (certificates / "registry.pem").read_bytes()
    make_certificates(certificates)
    assert (certificates / "registry.pem").read_bytes() != old
    done = command("participant", "list", "--json", **arena, **trust, **own)
    assert done.returncode == 0, done.stderr
    assert "Ada" in done.stdout
    registry.until("certificates have been replaced")
    assert registry.healthy().stdout == "SERVING\n"


def test_beyond_loopback_nothing_listens_in_plaintext_unless_told(tmp_path: Path) -> None:
    settings = {"TILTYARD_LISTEN": "0.0.0.0:0", "TILTYARD_STATE_DIR": str(tmp_path)}
    known = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")}
    done = subprocess.run(
        [sys.executable, "-m", "services.selector"], env=known | settings, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("TILTYARD_LISTEN: beyond loopback needs TILTYARD_TLS_CERTIFICATE")


def test_certificates_are_made_once_and_renewed(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    first = command("certs", "dev", folder, "--san", "arena.example.org", "--san", "selector=10.0.0.7", "--json")
    assert first.returncode == 0, first.stderr
    made = {each["name"]: each for each in json.loads(first.stdout)["certificates"]}
    assert set(made) == {"registry", "selector", "trainer", "validator", "client"}
    assert "arena.example.org" in made["registry"]["hosts"]
    assert "10.0.0.7" in made["selector"]["hosts"]
    assert "10.0.0.7" not in made["registry"]["hosts"]
    assert {oct(path.stat().st_mode & 0o777) for path in folder.glob("*.key")} == {"0o600"}
    authority, leaf = (folder / "ca.pem").read_bytes(), (folder / "client.pem").read_bytes()
    assert command("certs", "dev", folder, "--name", "gateway").returncode == 0
    assert (folder / "ca.pem").read_bytes() == authority
    assert (folder / "client.pem").read_bytes() != leaf
    assert (folder / "gateway.pem").exists()
    for each in folder.glob("*.pem"):
        checked = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-CAfile", folder / "ca.pem", each], capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
    assert (folder / "gateway.key").exists()
    refused = command("certs", "dev", folder, "--san", "no host")
    assert (refused.returncode, refused.stderr) == (1, "error: 'no host' is neither a host name nor an address\n")
