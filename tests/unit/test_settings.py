"""Settings: defaults that are safe, and a start that stops with the variable's name."""

import os
from pathlib import Path
from typing import ClassVar

import pytest

from services.registry.settings import RegistrySettings
from services.runtime.settings import ServiceSettings
from services.trainer.settings import TrainerSettings
from services.validator.settings import ValidatorSettings
from tiltyard.authority import Authority
from tiltyard.calls.tls import ChannelTls

PARTICIPANT = "0123456789abcdef0123456789abcdef01234567"


class SampleSettings(ServiceSettings):
    service: ClassVar[str] = "sample"
    listen: str = "127.0.0.1:7401"
    device: str = "auto"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("TILTYARD_"):
            monkeypatch.delenv(name)


def test_defaults_lie_in_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILTYARD_STATE_DIR", "/srv/arena")
    settings = SampleSettings.load()
    assert settings.origin == "tiltyard.local"
    assert settings.listen == "127.0.0.1:7401"
    assert settings.database_url == "sqlite:////srv/arena/sample.db"
    assert settings.key_file == Path("/srv/arena/key.pem")
    assert settings.operators == settings.services == frozenset()
    assert not settings.plaintext_anywhere


def test_everything_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "ORIGIN": "arena.example.org",
        "LISTEN": "unix:/run/sample.sock",
        "DATABASE_URL": "postgresql+psycopg://db/arena",
        "KEY_FILE": "/keys/k.pem",
        "OPERATORS": f"{PARTICIPANT}, {'f' * 40},",
        "SERVICES": PARTICIPANT,
        "LOG_LEVEL": "debug",
        "LOG_FORMAT": "console",
        "DEVICE": "cuda",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"TILTYARD_{name}", value)
    settings = SampleSettings.load()
    assert settings.operators == {PARTICIPANT, "f" * 40}
    assert settings.services == {PARTICIPANT}
    assert (settings.origin, settings.listen, settings.device) == ("arena.example.org", "unix:/run/sample.sock", "cuda")
    assert settings.database_url == "postgresql+psycopg://db/arena"
    assert settings.key_file == Path("/keys/k.pem")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TILTYARD_OPERATOR", PARTICIPANT),
        ("TILTYARD_LISTENN", "127.0.0.1:1"),
        ("TILTYARD_OPERATORS", "me"),
        ("TILTYARD_SERVICES", f"{PARTICIPANT};{PARTICIPANT}"),
        ("TILTYARD_ORIGIN", "has space"),
        ("TILTYARD_ORIGIN", ""),
        ("TILTYARD_STATE_DIR", ""),
        ("TILTYARD_DATABASE_URL", "state/registry.db"),
        ("TILTYARD_DATABASE_URL", "postgresql://arena:hunter2@db/arena"),
        ("TILTYARD_KEY_PASSPHRASE_FILE", ""),
        ("TILTYARD_TLS_CLIENT_CA", ""),
        ("TILTYARD_LOG_LEVEL", "loud"),
        ("TILTYARD_LOG_FORMAT", "xml"),
        ("TILTYARD_PLAINTEXT_ANYWHERE", "perhaps"),
        ("TILTYARD_LISTEN", "127.0.0.1"),
        ("TILTYARD_LISTEN", "127.0.0.1:port"),
        ("TILTYARD_LISTEN", "127.0.0.1:70000"),
        ("TILTYARD_LISTEN", ":7401"),
        ("TILTYARD_LISTEN", "unix:"),
        ("TILTYARD_LISTEN", "0.0.0.0:7401"),
        ("TILTYARD_LISTEN", "[::]:7401"),
        ("TILTYARD_LISTEN", "arena.example.org:7401"),
        ("TILTYARD_TLS_CERTIFICATE", "/nowhere/cert.pem"),
        ("TILTYARD_TLS_KEY", "/nowhere/key.pem"),
        ("TILTYARD_TLS_CA", "/nowhere/ca.pem"),
    ],
)
def test_a_bad_or_unknown_variable_stops_the_start_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        SampleSettings.load()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{name}: ")
    assert err.count("\n") == 1


def test_a_secret_in_a_bad_value_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Numbered(SampleSettings):
        api_number: int = 0

    monkeypatch.setenv("TILTYARD_API_NUMBER", "hunter2")
    with pytest.raises(SystemExit):
        Numbered.load()
    assert "hunter2" not in capsys.readouterr().err


def test_a_shell_set_up_for_the_command_line_does_not_stop_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEY", "REGISTRY", "SELECTOR", "TRAINER", "VALIDATOR"):
        monkeypatch.setenv(f"TILTYARD_{name}", "anything")
    assert SampleSettings.load().service == "sample"


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.0.1:1", "localhost:1", "[::1]:65535"])
def test_loopback_needs_no_encryption(monkeypatch: pytest.MonkeyPatch, listen: str) -> None:
    monkeypatch.setenv("TILTYARD_LISTEN", listen)
    assert SampleSettings.load().listen == listen


def test_beyond_loopback_with_tls_or_by_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TILTYARD_LISTEN", "0.0.0.0:7401")
    monkeypatch.setenv("TILTYARD_PLAINTEXT_ANYWHERE", "true")
    assert SampleSettings.load().listen == "0.0.0.0:7401"
    monkeypatch.delenv("TILTYARD_PLAINTEXT_ANYWHERE")
    issued = Authority.open(tmp_path).issue("registry", ["arena.example.org"])
    monkeypatch.setenv("TILTYARD_TLS_CERTIFICATE", str(issued.certificate))
    monkeypatch.setenv("TILTYARD_TLS_KEY", str(issued.key))
    assert SampleSettings.load().tls_key == issued.key


def test_peers_are_called_by_tls_when_their_authority_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert SampleSettings.load().channel_tls is None
    authority = Authority.open(tmp_path)
    monkeypatch.setenv("TILTYARD_TLS_CA", str(authority.certificate))
    assert SampleSettings.load().channel_tls == ChannelTls(authority.certificate)
    issued = authority.issue("registry", ["registry"])
    monkeypatch.setenv("TILTYARD_TLS_CERTIFICATE", str(issued.certificate))
    monkeypatch.setenv("TILTYARD_TLS_KEY", str(issued.key))
    monkeypatch.setenv("TILTYARD_TLS_CA", "system")
    assert SampleSettings.load().channel_tls == ChannelTls(None, issued.certificate, issued.key)


def test_a_key_of_another_certificate_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    authority = Authority.open(tmp_path)
    monkeypatch.setenv("TILTYARD_TLS_CERTIFICATE", str(authority.issue("one", ["one"]).certificate))
    monkeypatch.setenv("TILTYARD_TLS_KEY", str(authority.issue("two", ["two"]).key))
    with pytest.raises(SystemExit):
        SampleSettings.load()
    assert "two.key is not the key of" in capsys.readouterr().err


def test_a_certificate_needs_its_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "certificate").touch()
    monkeypatch.setenv("TILTYARD_TLS_CERTIFICATE", str(tmp_path / "certificate"))
    with pytest.raises(SystemExit):
        SampleSettings.load()
    assert capsys.readouterr().err.startswith("TILTYARD_TLS_KEY: ")


def test_limits_of_connections_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"": 10, "_PER_ADDRESS": 20, "_PER_SECOND": 30.5, "_BURST": 40}
    values |= {"_PER_SECOND_PER_ADDRESS": 50.5, "_BURST_PER_ADDRESS": 60}
    for name, value in values.items():
        monkeypatch.setenv(f"TILTYARD_CONNECTIONS{name}", str(value))
    limits = SampleSettings.load().connection_limits
    assert (limits.total, limits.per_address) == (10, 20)
    assert (limits.per_second, limits.burst) == (30.5, 40)
    assert (limits.per_second_per_address, limits.burst_per_address) == (50.5, 60)


def test_as_many_as_may_be_connected_may_come_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a restart, and a second time before the first has been forgotten."""
    limits = SampleSettings.load().connection_limits
    assert limits.burst_per_address >= 2 * limits.per_address
    assert limits.per_second_per_address > 0
    assert limits.burst >= 10 * limits.per_address


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (RegistrySettings, "TILTYARD_SELECTOR"),
        (TrainerSettings, "TILTYARD_REGISTRY"),
        (ValidatorSettings, "TILTYARD_REGISTRY"),
    ],
)
def test_what_is_no_address_of_a_peer_stops_the_start(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: type[ServiceSettings],
    name: str,
) -> None:
    monkeypatch.setenv(name, "http://arena.example.org:7401")
    with pytest.raises(SystemExit) as stopped:
        settings.load()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"{name}: 'http://arena.example.org:7401' is no address")


def test_every_folder_that_grows_is_known_to_whoever_looks_at_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILTYARD_STATE_DIR", "/state")
    assert set(RegistrySettings.load().written_folders) == {Path("/state")}
    monkeypatch.setenv("TILTYARD_DATABASE_URL", "sqlite:////database/registry.db?timeout=5")
    monkeypatch.setenv("TILTYARD_ARTIFACTS", "/artifacts")
    assert set(RegistrySettings.load().written_folders) == {Path("/state"), Path("/database"), Path("/artifacts")}
    monkeypatch.setenv("TILTYARD_ARTIFACTS", "s3://bucket/prefix")
    monkeypatch.setenv("TILTYARD_DATABASE_URL", "postgresql+psycopg://registry@database/registry")
    assert RegistrySettings.load().written_folders == (Path("/state"),)
    for name in ("ARTIFACTS", "DATABASE_URL"):
        monkeypatch.delenv(f"TILTYARD_{name}")
    monkeypatch.setenv("TILTYARD_REGISTRY", "127.0.0.1:7401")
    monkeypatch.setenv("TILTYARD_MODEL_SHARE", "/share")
    assert set(ValidatorSettings.load().written_folders) == {Path("/state"), Path("/share")}
