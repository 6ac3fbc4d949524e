"""`make up`: makes an arena's keys, passwords and settings once, builds its images, starts it and waits for its health.

Everything it makes lies in one folder: settings.env, environment/ (what else each service is told), secrets/ (owned by
the user of the images), ids/ (the participant id of each service and node), operator.pem, and with the overlay `tls` an
authority and its certificates. What is there already stays, so that a second run changes only what it is told: each
TILTYARD_ variable that a compose file names is taken from the environment and kept in settings.env, as overlays are.
"""

import argparse
import fcntl
import functools
import http.server
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from services.runtime.settings import is_loopback
from tiltyard.authority import Authority
from tiltyard.identity import Key

HERE = Path(__file__).resolve().parent
IMAGE_USER = "10001:10001"
DATABASES = ("registry", "selector")
# The selector calls nobody: it has no key to show, and keeps that of its draws in its volume.
KEYS = ("registry", "trainer", "validator-1", "validator-2", "validator-3")
SERVICES = ("selector", *KEYS)
WHEELS_PORT = 7490
HEALTHY_AFTER_S = 240.0
RENEW_BEFORE = timedelta(days=45)
PORTS = {"registry": 7401, "selector": 7402, "trainer": 7403}
NO_OVERLAY = "none"
DEFAULT_ORIGIN = "tiltyard.local"
OVERLAY_FILE = r"compose\.([\w-]+)\.yaml"
ENVIRONMENT = "# Settings of {name} beside those that compose.yaml gives it (docs/reference/settings.md), NAME=VALUE.\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Set up and start an arena of containers.")
    parser.add_argument("folder", type=Path, help="where its keys and settings lie")
    parser.add_argument(
        "--overlay",
        action="append",
        default=[],
        help="tls, gpu ...: compose.NAME.yaml too; left out, those of the last time; none: compose.yaml alone",
    )
    parser.add_argument(
        "--wheels", type=Path, help="take packages from this folder alone, for an engine without an index"
    )
    arguments = parser.parse_args()
    arena = Arena(arguments.folder.absolute(), arguments.overlay)
    try:
        with arena.owned():
            set_up(arena, arguments.wheels)
    except OSError as error:
        raise SystemExit(f"make up: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted: make up goes on from here") from None


def set_up(arena: "Arena", wheels: Path | None) -> None:
    """From the settings to an arena that is healthy."""
    arena.prepare()
    with served(wheels) as building:
        arena.compose("build", environment=building)
    # After all that takes long or fails: until they are given away, no service that starts anew could read new keys.
    arena.certify()
    arena.own_secrets()
    arena.compose("up", "--detach", "--no-build", "--remove-orphans")
    arena.until_healthy(HEALTHY_AFTER_S)
    bind = arena.settings.get("TILTYARD_BIND", "127.0.0.1")
    ports = ((name, arena.settings.get(f"TILTYARD_{name.upper()}_PORT", port)) for name, port in PORTS.items())
    say("ready", *(f"{name}={bind}:{port}" for name, port in ports))


class Arena:
    """One arena's folder, and docker compose with the settings in it."""

    def __init__(self, folder: Path, overlays: Sequence[str] = ()) -> None:
        """With the overlays of the last time where none are named; `none` is an arena without."""
        self._folder = folder
        kept = self._kept().get("COMPOSE_FILE", "")
        named = [each for each in overlays if each != NO_OVERLAY] if overlays else re.findall(OVERLAY_FILE, kept)
        self._files = [HERE / "compose.yaml", *(HERE / f"compose.{each}.yaml" for each in named)]
        for file in self._files:
            if not file.is_file():
                raise SystemExit(f"there is no {file}")
        self.settings: dict[str, str] = {}

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Holds the folder for this process: two at once would make two passwords, and keep a half of each."""
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"another make up is at work on {self._folder}") from None
            yield
        finally:
            os.close(descriptor)

    def prepare(self) -> None:
        """Makes what is not there yet. Interrupted at any point, the next run goes on."""
        self._refuse_plaintext_beyond_loopback()
        self._refuse_another_origin()
        ids = self._folder / "ids"
        ids.mkdir(parents=True, exist_ok=True)
        self._environments.mkdir(exist_ok=True)
        for name in SERVICES:
            if not (self._environments / f"{name}.env").exists():
                # Credentials of a bucket, say, are settings, too.
                write(self._environments / f"{name}.env", ENVIRONMENT.format(name=name), mode=0o600)
        self._secrets.mkdir(exist_ok=True)
        # A container's root without capabilities passes through, and nobody lists it.
        self._secrets.chmod(0o711)
        for name in KEYS:
            if not (ids / name).exists():
                write(ids / name, Key.load_or_create(self._secrets / f"{name}_key").id + "\n")
        operator = Key.load_or_create(self._folder / "operator.pem").id
        for name in DATABASES:
            # The file that libpq reads, and the password in it for the database's first start.
            if not (self._secrets / f"{name}_pgpass").exists():
                password = secrets.token_hex(24)
                write(self._secrets / f"{name}_password", password, mode=0o600)
                write(self._secrets / f"{name}_pgpass", f"database:5432:{name}:{name}:{password}\n", mode=0o600)
        self._show_configuration()
        self.settings = self._settings(ids, operator)
        write(self._folder / "settings.env", "".join(f"{name}={value}\n" for name, value in self.settings.items()))
        # Until then it names the one of the last time, who is in those settings.
        write(ids / "operator", operator + "\n")

    def certify(self) -> None:
        """With the overlay `tls`: each service a certificate, and another before it ends, which services follow.

        What another authority has issued is the operator's, and so are further authorities in `ca.pem`: both stay.
        """
        if HERE / "compose.tls.yaml" not in self._files:
            return
        authority = Authority.open(self._folder / "authority")
        for name in SERVICES:
            folder = self._certificates / name
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)  # the user of the images reads it, whatever the umask here
            file = folder / "certificate.pem"
            if file.exists():
                certificate = x509.load_pem_x509_certificate(file.read_bytes())
                ends = certificate.not_valid_after_utc
                if ends - datetime.now(UTC) > RENEW_BEFORE:
                    continue
                if not authority.has_issued(certificate):
                    say(f"{file} ends on {ends:%Y-%m-%d} and is not of {authority.certificate}: it stays")
                    continue
            issued = authority.issue(name, [name, "localhost", "127.0.0.1"])
            trusted, own = folder / "ca.pem", authority.certificate.read_text()
            if not trusted.exists() or own not in trusted.read_text():
                write(trusted, own)
            write(folder / "key.pem", issued.key.read_text(), mode=0o600)
            write(file, issued.certificate.read_text())
            issued.key.unlink()

    def compose(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """Runs docker compose; ends this process when it fails."""
        self._run([str(HERE / "arena"), *arguments], environment or {})

    def own_secrets(self) -> None:
        """Gives the secrets to the user of the images, who alone may then read them."""
        image = f"tiltyard/registry:{self.settings.get('TILTYARD_VERSION', '0.1.0')}"
        secret = [*self._secrets.iterdir(), *self._certificates.glob("*/key.pem")]
        names = sorted(f"/arena/{path.relative_to(self._folder)}" for path in secret if not path.name.startswith("."))
        confined = ["--network", "none", "--read-only", "--user", "0:0", "--cap-drop", "ALL", "--cap-add", "CHOWN"]
        mount = ["--volume", f"{self._folder}:/arena"]
        self._run(["docker", "run", "--rm", *confined, *mount, image, "chown", IMAGE_USER, *names], {})

    def until_healthy(self, timeout_s: float) -> None:
        """Waits until every container says that it is healthy; ends this process with the states otherwise."""
        until = time.monotonic() + timeout_s
        while True:
            states = self._states()
            if states and all(state in ("healthy", "running") for state in states.values()):
                return
            if time.monotonic() > until:
                raise SystemExit(f"not healthy after {timeout_s:g} s (deploy/arena logs tells why): {states}")
            time.sleep(1)

    @property
    def _secrets(self) -> Path:
        return self._folder / "secrets"

    @property
    def _certificates(self) -> Path:
        return self._folder / "certificates"

    @property
    def _environments(self) -> Path:
        return self._folder / "environment"

    def _refuse_plaintext_beyond_loopback(self) -> None:
        """Services in containers listen on all addresses of theirs, so that they cannot refuse it: here it is known."""
        told = self._kept() | os.environ
        bind = told.get("TILTYARD_BIND") or "127.0.0.1"
        encrypted = HERE / "compose.tls.yaml" in self._files or told.get("TILTYARD_PLAINTEXT_ANYWHERE") == "true"
        if not encrypted and not is_loopback(bind):
            raise SystemExit(f"TILTYARD_BIND={bind} needs OVERLAYS=tls, or TILTYARD_PLAINTEXT_ANYWHERE=true")

    def _refuse_another_origin(self) -> None:
        """A shell may have that of an arena elsewhere, for `tiltyard`: with it nothing signed so far would hold."""
        kept, asked = self._kept(), os.environ.get("TILTYARD_ORIGIN")
        own = kept.get("TILTYARD_ORIGIN", DEFAULT_ORIGIN)
        if kept and asked and asked != own:
            file = self._folder / "settings.env"
            raise SystemExit(
                f"TILTYARD_ORIGIN={asked}: this arena is {own}; if it has signed nothing yet, change {file}"
            )

    def _show_configuration(self) -> None:
        """Has the users of other images read what is mounted into them: a checkout under a strict umask hides it."""
        if HERE / "compose.observability.yaml" not in self._files:
            return
        shown = HERE / "observability"
        for path in (shown, *shown.rglob("*")):
            mode = path.stat().st_mode
            readable = mode | (0o055 if path.is_dir() else 0o044)
            if mode != readable:
                path.chmod(readable)

    def _kept(self) -> dict[str, str]:
        file = self._folder / "settings.env"
        lines = file.read_text().splitlines() if file.exists() else []
        return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))

    def _operators(self, own: str, replaced: str) -> str:
        """The arena's own, and beside it those named now or the last time, without one whose key there is no more."""
        named = os.environ.get("TILTYARD_OPERATORS", self._kept().get("TILTYARD_OPERATORS", ""))
        others = [each for each in map(str.strip, named.split(",")) if each and each not in (own, replaced)]
        for each in others:
            if not re.fullmatch("[0-9a-f]{40}", each):
                raise SystemExit(f"TILTYARD_OPERATORS: {each!r} is not a participant id (40 hex digits)")
        return ",".join(dict.fromkeys((own, *others)))

    def _settings(self, ids: Path, operator: str) -> dict[str, str]:
        kept = self._kept()
        last = ids / "operator"
        replaced = last.read_text().strip() if last.exists() else operator
        named = {name for path in self._files for name in re.findall(r"\$\{(TILTYARD_[A-Z_]+)", path.read_text())}
        named.add("TILTYARD_PLAINTEXT_ANYWHERE")
        # Where packages came from is a matter of one build.
        given = {name: os.environ[name] for name in named if name in os.environ and "_PIP_" not in name}
        given["TILTYARD_OPERATORS"] = self._operators(operator, replaced)
        made = {
            "COMPOSE_FILE": os.pathsep.join(map(str, self._files)),
            "TILTYARD_SECRETS": str(self._secrets),
            "TILTYARD_ENVIRONMENTS": str(self._environments),
            "TILTYARD_CERTIFICATES": str(self._certificates),
            "TILTYARD_REGISTRY_ID": (ids / "registry").read_text().strip(),
        }
        # Not the shell's COMPOSE_PROJECT_NAME: an arena among the containers of another project would remove these.
        project = os.environ.get("TILTYARD_PROJECT") or kept.get("COMPOSE_PROJECT_NAME", "tiltyard")
        return kept | {"COMPOSE_PROJECT_NAME": project} | given | made

    def _states(self) -> dict[str, str]:
        listed = subprocess.run(
            [str(HERE / "arena"), "ps", "--all", "--quiet"], env=self._environment({}), capture_output=True, text=True
        )
        containers = listed.stdout.split()
        if listed.returncode or not containers:
            raise SystemExit(f"docker compose lists no container: {listed.stderr.strip()}")
        shown = subprocess.run(["docker", "inspect", *containers], capture_output=True, check=True, text=True)
        return {each["Name"].lstrip("/"): _state(each["State"]) for each in json.loads(shown.stdout)}

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        return {**os.environ, "ARENA": str(self._folder), **more}

    def _run(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        ended = subprocess.run(command, env=self._environment(environment), check=False)
        if ended.returncode:
            raise SystemExit(ended.returncode)


def _state(state: Mapping[str, object]) -> str:
    health = state.get("Health")
    return str(health["Status"] if isinstance(health, dict) else state["Status"])


@contextmanager
def served(wheels: Path | None) -> Iterator[dict[str, str]]:
    """Serves the wheels in a folder on loopback while images are built; yields the settings that have pip use them."""
    if wheels is None:
        yield {}
        return

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Says nothing: pip does."""

    # The port is fixed, since a layer is known by the arguments that it was built with.
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", WHEELS_PORT), functools.partial(Quiet, directory=str(wheels))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "TILTYARD_BUILD_NETWORK": "host",
            "TILTYARD_PIP_FIND_LINKS": f"http://127.0.0.1:{WHEELS_PORT}/",
            "TILTYARD_PIP_NO_INDEX": "1",
            "TILTYARD_PIP_EXTRA_INDEX_URL": "",
        }
        server.shutdown()


def write(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Writes a file whole or not at all, with this mode whatever the umask."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def say(*words: str) -> None:
    """Prints one line."""
    sys.stdout.write(" ".join(words) + "\n")


if __name__ == "__main__":
    main()
