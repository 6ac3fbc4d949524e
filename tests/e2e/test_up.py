"""`tiltyard up`: one of each service, started again when it dies, gone when told to go."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tiltyard.cli.supervisor import free_ports, is_free
from tiltyard.identity import Key

SERVICES = ("registry", "selector", "trainer", "validator")


def up(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`tiltyard up` that does not get ready, and how it ended."""
    return subprocess.run(
        [sys.executable, "-m", "tiltyard.cli", "up", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=cwd,
        env={**os.environ, **environment},
    )


@contextmanager
def running(state: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """`tiltyard up` and its services' addresses, from the ready line on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tiltyard.cli", "up", "--state", str(state), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    # Somebody has to read it, or the process stops when the pipe is full.
    errors = process.stderr
    reader = threading.Thread(target=lambda: [None for _ in errors], daemon=True)
    try:
        line = process.stdout.readline()
        if not line:
            pytest.fail(f"it never got ready: {process.stderr.read()}")
        reader.start()
        word, *pairs = line.split()
        assert word == "ready"
        addresses = dict(pair.split("=") for pair in pairs)
        assert tuple(addresses) == SERVICES
        yield process, addresses
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        process.wait(timeout=60)
        psutil.wait_procs(children, timeout=10)
        process.stdout.close()
        if reader.ident is not None:
            reader.join(timeout=10)
        process.stderr.close()


def serving(address: str, timeout_s: float = 30) -> bool:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=timeout_s)
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def child_of(process: subprocess.Popen[str], service: str) -> psutil.Process:
    (found,) = [
        child for child in psutil.Process(process.pid).children() if child.cmdline()[-1] == f"services.{service}"
    ]
    return found


def test_up_restarts_what_dies_and_keeps_its_state(tmp_path: Path) -> None:
    key = tmp_path / "me.pem"
    Key.generate().save(key)
    # What a shell has set for the command line is not meant for the services.
    with running(tmp_path / "state", "--port-base", "0", TILTYARD_KEY=str(key), TILTYARD_NONSENSE="1") as (
        process,
        addresses,
    ):
        assert all(serving(address) for address in addresses.values())
        options = ["--key", str(key), "--registry", addresses["registry"]]

        def command(*arguments: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "tiltyard.cli", *arguments, *options],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        command("participant", "register", "Ada")
        registry = child_of(process, "registry")
        registry.kill()
        registry.wait(timeout=10)
        assert serving(addresses["registry"])
        assert "Ada" in command("participant", "list", "--json")
        for service in SERVICES:
            assert (tmp_path / "state" / service / "key.pem").exists()
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        _, alive = psutil.wait_procs(children, timeout=60)
        assert alive == []


def test_children_die_with_up(tmp_path: Path) -> None:
    with running(tmp_path / "state", "--port-base", "0") as (process, _):
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4
        process.kill()
        process.wait(timeout=10)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert [each.cmdline() for each in alive] == []


@dataclass(frozen=True)
class Arena:
    """A `tiltyard up` that several tests look at, and what it was told."""

    process: subprocess.Popen[str]
    addresses: dict[str, str]
    state: Path
    data: Path
    base: int


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("up")
    state, data = folder / "state", folder / "data"
    data.mkdir()
    base = next(port for port in free_ports(50) if all(is_free(port + n) for n in range(1, 4))) - 1
    environment = {"TILTYARD_LOG_LEVEL": "debug", "TILTYARD_UNBONDING_TIME_S": "7", "TILTYARD_DATA_DIR": str(data)}
    with running(state, "--port-base", str(base), **environment) as (process, addresses):
        yield Arena(process, addresses, state, data, base)


def test_ports_follow_the_base(arena: Arena, tmp_path: Path) -> None:
    assert list(arena.addresses.values()) == [f"127.0.0.1:{arena.base + n}" for n in range(1, 5)]
    second = up("--state", str(tmp_path / "two"), "--port-base", str(arena.base))
    assert second.returncode == 1
    assert f"port {arena.base + 1} is taken" in second.stderr


def test_two_of_one_state_are_refused_and_others_see_nothing_of_it(arena: Arena) -> None:
    folders = (arena.state, arena.state / "registry", arena.state / "validator")
    assert [oct(path.stat().st_mode & 0o077) for path in folders] == 3 * ["0o0"]
    second = up("--state", str(arena.state), "--port-base", "0")
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == f"error: {arena.state} is in use by another `tiltyard up`; choose another --state\n"


def test_settings_of_services_are_handed_on_to_them(arena: Arena) -> None:
    told = {service: child_of(arena.process, service).environ() for service in SERVICES}
    assert [each["TILTYARD_LOG_LEVEL"] for each in told.values()] == 4 * ["debug"]
    assert [service for service in SERVICES if "TILTYARD_UNBONDING_TIME_S" in told[service]] == ["selector"]
    assert told["trainer"]["TILTYARD_DATA_DIR"] == str(arena.data)


def test_who_asks_for_tls_gets_no_plaintext(tmp_path: Path) -> None:
    environment = {"TILTYARD_TLS_KEY": "registry.key", "TILTYARD_TLS_CERTIFICATE": "registry.pem"}
    refused = up("--state", str(tmp_path / "state"), "--port-base", "0", **environment)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: TILTYARD_TLS_CERTIFICATE is set, but `tiltyard up` serves plaintext")
    assert not (tmp_path / "state").exists()


def test_what_it_decides_itself_is_refused_where_it_is_set(tmp_path: Path) -> None:
    refused = up("--port-base", "0", cwd=tmp_path, TILTYARD_STATE_DIR=str(tmp_path / "state"))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: TILTYARD_STATE_DIR is set, but `tiltyard up` sees to that itself, --state")
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_a_service_refuses_is_told(tmp_path: Path) -> None:
    refused = up("--state", str(tmp_path / "state"), "--port-base", "0", TILTYARD_UNBONDING_TIME_S="a week")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "TILTYARD_UNBONDING_TIME_S: Input should be a valid integer" in refused.stderr
    assert refused.stderr.splitlines()[-1] == "error: selector ended with status 2"
