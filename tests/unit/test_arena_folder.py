"""What `make up` keeps from one time to the next, and what it refuses before anything is started."""

import errno
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from deploy.arena import HERE, SERVICES, Arena, main
from tiltyard.authority import Authority
from tiltyard.identity import Key


@pytest.fixture(autouse=True)
def _nothing_told_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each.startswith(("TILTYARD_", "COMPOSE_"))]:
        monkeypatch.delenv(name)


def files(folder: Path, *overlays: str) -> list[str]:
    """The compose files of an arena that is set up with these overlays."""
    arena = Arena(folder, overlays)
    arena.prepare()
    return [Path(each).name for each in arena.settings["COMPOSE_FILE"].split(os.pathsep)]


def certified(folder: Path) -> None:
    """An arena with TLS, as it is before it starts."""
    arena = Arena(folder, ["tls"])
    arena.prepare()
    arena.certify()


def test_an_arena_with_tls_stays_one_until_it_is_told_otherwise(tmp_path: Path) -> None:
    assert files(tmp_path) == ["compose.yaml"]
    assert files(tmp_path, "tls", "observability") == ["compose.yaml", "compose.tls.yaml", "compose.observability.yaml"]
    assert files(tmp_path) == ["compose.yaml", "compose.tls.yaml", "compose.observability.yaml"]
    assert files(tmp_path, "tls") == ["compose.yaml", "compose.tls.yaml"]
    assert files(tmp_path, "none") == ["compose.yaml"]
    assert files(tmp_path) == ["compose.yaml"]


def test_an_overlay_that_there_is_not_is_refused_by_its_file(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=str(HERE / r"compose.nonsense.yaml")):
        Arena(tmp_path, ["nonsense"])


@pytest.mark.parametrize("address", ["0.0.0.0", "10.0.0.7", "::", "arena.example.org"])
def test_ports_beyond_loopback_want_encryption_or_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("TILTYARD_BIND", address)
    with pytest.raises(SystemExit, match="TILTYARD_BIND"):
        Arena(tmp_path).prepare()
    assert not list(tmp_path.iterdir())
    Arena(tmp_path / "encrypted", ["tls"]).prepare()
    monkeypatch.setenv("TILTYARD_PLAINTEXT_ANYWHERE", "true")
    Arena(tmp_path / "told").prepare()
    # The word is kept, as the address is.
    monkeypatch.delenv("TILTYARD_PLAINTEXT_ANYWHERE")
    monkeypatch.delenv("TILTYARD_BIND")
    Arena(tmp_path / "told").prepare()
    with pytest.raises(SystemExit, match="TILTYARD_BIND"):
        Arena(tmp_path / "encrypted", ["none"]).prepare()


def test_certificates_of_the_operators_own_authority_stay_and_those_of_the_arena_are_renewed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certified(tmp_path)
    certificates = tmp_path / "certificates"
    own = Authority.open(tmp_path / "own")
    issued = own.issue("registry", ["arena.example.org"], days=20)
    (certificates / "registry/certificate.pem").write_bytes(issued.certificate.read_bytes())
    (certificates / "registry/key.pem").write_bytes(issued.key.read_bytes())
    # The selector trusts both, and has half of its certificate's life behind it.
    both = (certificates / "selector/ca.pem").read_text() + own.certificate.read_text()
    (certificates / "selector/ca.pem").write_text(both)
    old = Authority.open(tmp_path / "authority").issue("selector", ["selector"], days=20)
    (certificates / "selector/certificate.pem").write_bytes(old.certificate.read_bytes())
    trainers = (certificates / "trainer/certificate.pem").read_bytes()

    Arena(tmp_path).certify()
    assert (certificates / "registry/certificate.pem").read_bytes() == issued.certificate.read_bytes()
    assert (certificates / "registry/key.pem").read_bytes() == issued.key.read_bytes()
    assert f"{certificates / 'registry/certificate.pem'} ends on" in capsys.readouterr().out
    assert (certificates / "selector/ca.pem").read_text() == both
    renewed = x509.load_pem_x509_certificate((certificates / "selector/certificate.pem").read_bytes())
    assert renewed.not_valid_after_utc - datetime.now(UTC) > timedelta(days=89)
    assert (certificates / "trainer/certificate.pem").read_bytes() == trainers


def test_containers_read_their_certificates_and_nobody_else_reads_a_secret_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        certified(tmp_path / "strict")
        os.umask(0)
        certified(tmp_path / "lax")
    finally:
        os.umask(before)
    for folder in (tmp_path / "strict", tmp_path / "lax"):
        for name in SERVICES:
            shown = folder / "certificates" / name
            modes = [path.stat().st_mode & 0o777 for path in (shown, shown / "certificate.pem", shown / "ca.pem")]
            assert modes == [0o755, 0o644, 0o644]
        hidden = [*(folder / "secrets").iterdir(), *folder.glob("certificates/*/key.pem"), folder / "operator.pem"]
        assert {path.stat().st_mode & 0o777 for path in hidden} == {0o600}


def test_collector_prometheus_and_grafana_read_their_configuration_from_a_checkout_under_a_strict_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "deploy"
    shutil.copytree(HERE, checkout, ignore=shutil.ignore_patterns("state", "__pycache__"))
    shown = [checkout / "observability", *(checkout / "observability").rglob("*")]
    for path in shown:
        path.chmod(0o700 if path.is_dir() else 0o600)
    monkeypatch.setattr("deploy.arena.HERE", checkout)
    Arena(tmp_path / "state", ["observability"]).prepare()
    assert {path.stat().st_mode & 0o777 for path in shown if path.is_file()} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in shown if path.is_dir()} == {0o755}


def test_a_build_that_fails_has_touched_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certified(tmp_path)
    registry = tmp_path / "certificates/registry"
    old = Authority.open(tmp_path / "authority").issue("registry", ["registry"], days=20)
    (registry / "certificate.pem").write_bytes(old.certificate.read_bytes())
    key = (registry / "key.pem").read_bytes()

    def fails(_arena: Arena, *arguments: str, **_: object) -> None:
        assert arguments == ("build",)
        raise SystemExit(1)

    monkeypatch.setattr(Arena, "compose", fails)
    monkeypatch.setattr(sys, "argv", ["arena.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    # Until it is given to the user of the images a new one could be read by no service that starts anew.
    assert (registry / "key.pem").read_bytes() == key


def test_of_two_who_set_up_one_arena_at_once_the_second_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["arena.py", str(tmp_path)])
    with Arena(tmp_path).owned(), pytest.raises(SystemExit, match=f"another make up is at work on {tmp_path}"):
        main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (KeyboardInterrupt(), "interrupted: make up goes on from here"),
        (OSError(errno.ENOSPC, "No space left on device", "settings.env"), "make up: .*No space left.*settings.env"),
    ],
)
def test_a_make_up_that_is_interrupted_or_finds_no_room_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException, said: str
) -> None:
    def ends(_arena: Arena) -> None:
        raise end

    monkeypatch.setattr(Arena, "prepare", ends)
    monkeypatch.setattr(sys, "argv", ["arena.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=said):
        main()


def test_what_the_operator_writes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILTYARD_ORIGIN", "arena.example.org")
    Arena(tmp_path).prepare()
    assert {each.name for each in (tmp_path / "environment").iterdir()} == {f"{name}.env" for name in SERVICES}
    (tmp_path / "environment/selector.env").write_text("TILTYARD_UNBONDING_TIME_S=60\n")
    with (tmp_path / "settings.env").open("a") as settings:
        settings.write("\n# a remark\nTILTYARD_REGISTRY_PORT=9001\n")
    ids = {each.name: each.read_text() for each in (tmp_path / "ids").iterdir()}
    monkeypatch.delenv("TILTYARD_ORIGIN")
    again = Arena(tmp_path)
    again.prepare()
    kept = {"TILTYARD_ORIGIN": "arena.example.org", "TILTYARD_REGISTRY_PORT": "9001"}
    assert kept.items() <= again.settings.items()
    assert (tmp_path / "environment/selector.env").read_text() == "TILTYARD_UNBONDING_TIME_S=60\n"
    assert {each.name: each.read_text() for each in (tmp_path / "ids").iterdir()} == ids


def test_further_operators_stay_beside_the_arenas_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def operators() -> list[str]:
        arena = Arena(tmp_path)
        arena.prepare()
        return arena.settings["TILTYARD_OPERATORS"].split(",")

    (own,) = operators()
    second, third = "2" * 40, "3" * 40
    monkeypatch.setenv("TILTYARD_OPERATORS", f"{second}, {third}")
    assert operators() == [own, second, third]
    monkeypatch.delenv("TILTYARD_OPERATORS")
    assert operators() == [own, second, third]
    # A key that is lost or known to others is taken away, and none of its owner's power stays.
    (tmp_path / "operator.pem").unlink()
    replacing, *others = operators()
    assert (replacing, others) == (Key.load_or_create(tmp_path / "operator.pem").id, [second, third])
    assert replacing != own
    assert (tmp_path / "ids/operator").read_text() == replacing + "\n"
    monkeypatch.setenv("TILTYARD_OPERATORS", f"{replacing},{third}")
    assert operators() == [replacing, third]
    for nonsense in ("me", f"{second} {third}"):
        monkeypatch.setenv("TILTYARD_OPERATORS", nonsense)
        with pytest.raises(SystemExit, match=r"TILTYARD_OPERATORS: .* is not a participant id"):
            operators()
    monkeypatch.setenv("TILTYARD_OPERATORS", "")
    assert operators() == [replacing]


def test_a_machine_without_docker_is_told_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bash", "sed", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "/bin/false")
    Arena(tmp_path / "arena").prepare()
    environment = {"PATH": str(tmp_path / "bin"), "ARENA": str(tmp_path / "arena")}
    done = subprocess.run(
        [tmp_path / "bin/bash", HERE / "arena", "ps"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no docker compose" in done.stderr


def test_what_the_shell_has_for_other_compositions_is_not_taken_for_the_arenas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {"COMPOSE_FILE": "theirs.yaml", "COMPOSE_PROJECT_NAME": "theirs"}
    theirs |= {"COMPOSE_PROFILES": "theirs", "COMPOSE_PATH_SEPARATOR": ";"}
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text("#!/bin/sh\nenv | grep -E '^(COMPOSE_|TILTYARD_)'\n")
    docker.chmod(0o755)

    def told(folder: Path) -> dict[str, str]:
        environment = {**os.environ, "PATH": f"{docker.parent}:{os.environ['PATH']}", "ARENA": str(folder)}
        done = subprocess.run([HERE / "arena", "ps"], env=environment, capture_output=True, text=True, check=True)
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    Arena(tmp_path / "first").prepare()
    # Compose takes these from the arena's file where the environment has none.
    for name in ("OPERATORS", "SECRETS", "REGISTRY_ID", "BIND", "REGISTRY_PORT", "ORIGIN", "KEY"):
        monkeypatch.setenv(f"TILTYARD_{name}", "theirs")
    assert told(tmp_path / "first") == {
        "COMPOSE_FILE": str(HERE / "compose.yaml"),
        "COMPOSE_PROJECT_NAME": "tiltyard",
    }
    # How one service is upgraded, and where a build finds its packages.
    meant = {"TILTYARD_VERSION": "0.2.0", "TILTYARD_BUILD_NETWORK": "host", "TILTYARD_PIP_NO_INDEX": "1"}
    for name, value in meant.items():
        monkeypatch.setenv(name, value)
    assert meant.items() <= told(tmp_path / "first").items()
    for name in [each for each in os.environ if each.startswith("TILTYARD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TILTYARD_PROJECT", "second")
    Arena(tmp_path / "second").prepare()
    monkeypatch.delenv("TILTYARD_PROJECT")
    # It is kept.
    Arena(tmp_path / "second").prepare()
    assert told(tmp_path / "second")["COMPOSE_PROJECT_NAME"] == "second"


@pytest.mark.parametrize("own", ["", "arena.example.org"])
def test_the_name_of_another_arena_in_the_shell_does_not_rename_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    if own:
        monkeypatch.setenv("TILTYARD_ORIGIN", own)
    Arena(tmp_path).prepare()
    monkeypatch.setenv("TILTYARD_ORIGIN", "elsewhere.example.org")
    with pytest.raises(SystemExit, match=rf"this arena is {own or 'tiltyard.local'}; .*{tmp_path}/settings.env"):
        Arena(tmp_path).prepare()
    monkeypatch.setenv("TILTYARD_ORIGIN", own or "tiltyard.local")
    Arena(tmp_path).prepare()


def test_the_folders_and_the_registry_of_another_arena_in_the_shell_do_not_become_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Arena(tmp_path).prepare()
    own = (tmp_path / "settings.env").read_text()
    for name in ("SECRETS", "ENVIRONMENTS", "CERTIFICATES", "REGISTRY_ID"):
        monkeypatch.setenv(f"TILTYARD_{name}", "theirs")
    Arena(tmp_path).prepare()
    assert (tmp_path / "settings.env").read_text() == own
