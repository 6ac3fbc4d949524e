"""The real composition on a Docker engine: a task by README's commands, killed containers, an upgrade, a backup."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ("database", "selector", "registry", "trainer", "validator-1", "validator-2", "validator-3")
VALIDATORS = SERVICES[-3:]
VICTIMS = ("validator-1", "selector", "database", "registry")
VERSION = "compose-test"
NEXT = "compose-test-next"
COMMAND_TIMEOUT_S = 240
BUILD_TIMEOUT_S = 900

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]


def missing_engine() -> str:
    """Why there is nothing to run containers on; empty where there is."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    said = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=60)
    if said.returncode:
        return f"no Docker engine answers: {said.stderr.strip().splitlines()[-1]}"
    compose = [["docker", "compose", "version"], ["docker-compose", "version"]]
    if not any(shutil.which(each[0]) and subprocess.run(each, capture_output=True).returncode == 0 for each in compose):
        return "there is no docker compose"
    return ""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Composition:
    """An arena of containers, and a shell beside it as its host has one."""

    folder: Path
    environment: dict[str, str]

    def shell(self, script: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Runs a script as README has it typed in the root of a checkout; returns what it printed."""
        for typed, here in (("make ", f"make -C {ROOT} "), ("deploy/state", str(self.folder / "arena"))):
            script = script.replace(typed, here)
        script = re.sub(r"(?<!/)deploy/(arena|backup) ", rf"{ROOT}/deploy/\1 ", script)
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert ended.returncode == 0, f"{script}\n{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}"
        return ended.stdout

    def inspect(self, service: str) -> Any:
        """What the engine knows of a service's container."""
        container = self.shell(f"deploy/arena ps -q {service}").strip()
        return json.loads(self.shell(f"docker inspect {container}"))[0]

    def inside(self, service: str, command: str) -> str:
        """Runs a command in a service's container."""
        return self.shell(f"deploy/arena exec -T {service} {command}")

    def document(self, command: str) -> Any:
        """What a command prints as JSON."""
        return json.loads(self.shell(f"{command} --json"))

    def kill(self, service: str) -> None:
        """Kills all that runs in a service's container at once, as a crash does; waits for its health to be good."""
        before = self.inspect(service)
        # Whoever kills all others is not killed with them, but its container ends under it.
        subprocess.run(
            [f"{ROOT}/deploy/arena", "exec", "-T", service, "sh", "-c", "kill -9 -1"],
            env=self.environment,
            capture_output=True,
            timeout=60,
        )

        def again() -> bool:
            now = self.inspect(service)
            return bool(now["RestartCount"] > before["RestartCount"] and now["State"]["Health"]["Status"] == "healthy")

        wait_for(again, f"{service} to come back")


def wait_for(condition: Callable[[], bool], what: str, *, timeout_s: float = 120) -> None:
    """Asks twice a second until it holds."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.5)


def blocks(page: str) -> list[str]:
    """The shell commands of a page, block by block."""
    return re.findall(r"^```sh\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def readme_block() -> str:
    """README's commands for an arena of containers, from `make up` to the leaderboard."""
    (block,) = (each for each in blocks("README.md") if each.startswith("make up\n"))
    return block


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composition]:
    """What README makes; taken down with its volumes in the end."""
    if why := missing_engine():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("compose")
    ports = {name: free_port() for name in ("REGISTRY", "SELECTOR", "TRAINER")}
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ARENA": str(folder / "arena"),
        "TILTYARD_PROJECT": f"tiltyard-test-{os.getpid()}",
        "TILTYARD_VERSION": VERSION,
        "TILTYARD_KEY": str(folder / "creator.pem"),
        **{f"TILTYARD_{name}_PORT": str(port) for name, port in ports.items()},
        **{f"TILTYARD_{name}": f"127.0.0.1:{port}" for name, port in ports.items()},
    }
    composition = Composition(folder, environment)
    try:
        composition.shell(readme_block(), timeout_s=BUILD_TIMEOUT_S)
        yield composition
    finally:
        if (folder / "arena" / "settings.env").exists():
            composition.shell("deploy/arena down --volumes --timeout 30")


def test_readme_leads_from_nothing_to_a_scored_task(arena: Composition) -> None:
    (entry,) = arena.document("tiltyard leaderboard digits")["entries"]
    assert entry["display_name"] == "trainer"
    assert entry["rank"] == 1
    assert int(entry["total"]) == 539
    assert int(entry["correct"]) / int(entry["total"]) > 0.95
    roles = sorted(each["role"] for each in arena.document("tiltyard task members digits")["members"])
    assert roles == ["ROLE_TASK_CREATOR", "ROLE_TRAINING_NODE", *["ROLE_VALIDATOR"] * 3]
    arena.shell(f"tiltyard log verify {arena.environment['TILTYARD_REGISTRY']}")


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_has_no_rights(arena: Composition, service: str) -> None:
    host = arena.inspect(service)["HostConfig"]
    assert (host["Privileged"], host["ReadonlyRootfs"]) == (False, True)
    assert host["Memory"] > 0
    assert host["NanoCpus"] > 0
    status = dict(line.split(":", 1) for line in arena.inside(service, "cat /proc/1/status").splitlines())
    assert set(status["Uid"].split()) == {"10001"}
    assert {status[name].strip("\t0") for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")
    arena.inside(service, "sh -c '! touch /opt/file 2>/dev/null && touch /tmp/file /var/lib/tiltyard/file'")


def test_models_are_confined_inside_of_the_container(arena: Composition) -> None:
    said = [json.loads(arena.inside(each, "tiltyard validate status --json"))["isolation"] for each in VALIDATORS]
    assert all("without network (system-call filter)" in each for each in said), said


def test_torch_is_only_where_models_run(arena: Composition) -> None:
    for service in ("registry", "selector"):
        arena.inside(service, "sh -c '! python -c \"import torch\" 2>/dev/null'")
    for service in ("trainer", "validator-1"):
        arena.inside(service, 'python -c "import torch"')


def test_a_task_survives_killed_containers_and_an_upgrade(arena: Composition) -> None:
    join = "deploy/arena exec -T $node tiltyard validate join storm"
    arena.shell(
        "tiltyard task create digits/task.json --dataset digits/evaluation.safetensors --task-id storm\n"
        "deploy/arena exec -T trainer tiltyard task join storm --role training-node\n"
        f"for node in {' '.join(VALIDATORS)}; do {join}; done"
    )
    trainings: list[subprocess.Popen[str]] = []
    try:
        for blow in [*(lambda each=each: arena.kill(each) for each in VICTIMS), lambda: upgrade(arena)]:
            trainings.append(start_training(arena, len(trainings)))
            # One is evaluated, or about to be, and another trained when each blow falls.
            wait_for(lambda: submitted(arena, "storm") >= len(trainings) - 1, "the submission before")
            blow()
        for training in trainings:
            said, _ = training.communicate(timeout=COMMAND_TIMEOUT_S)
            assert training.returncode == 0, said[-2000:]
    finally:
        for training in trainings:
            training.kill()
            training.wait()
    arena.shell("tiltyard task close storm && tiltyard task watch storm")
    assert [each["state"] for each in submissions(arena, "storm")] == ["SUBMISSION_STATE_SCORED"] * len(trainings)
    arena.shell(f"tiltyard log verify {arena.environment['TILTYARD_REGISTRY']}")


def start_training(arena: Composition, number: int) -> "subprocess.Popen[str]":
    """A training and its submission, another each time, followed from inside the training node."""
    train = f"tiltyard train shard.safetensors --task storm --submit --seed {number} --model-index {number % 3}"
    return subprocess.Popen(
        [f"{ROOT}/deploy/arena", "exec", "-T", "trainer", *train.split()],
        env=arena.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def upgrade(arena: Composition) -> None:
    """Puts a registry of another image in the place of the one that runs."""
    arena.shell(
        f"printf 'FROM tiltyard/registry:{VERSION}\\nLABEL org.opencontainers.image.version={NEXT}\\n' "
        f"| docker build --quiet --tag tiltyard/registry:{NEXT} -\n"
        f"TILTYARD_VERSION={NEXT} deploy/arena up --detach --no-build --no-deps registry"
    )
    wait_for(lambda: bool(arena.inspect("registry")["State"]["Health"]["Status"] == "healthy"), "the new registry")
    assert arena.inspect("registry")["Config"]["Labels"]["org.opencontainers.image.version"] == NEXT


def test_a_backup_brings_back_an_arena_of_which_nothing_is_left(arena: Composition) -> None:
    before = [arena.document(f"tiltyard leaderboard {task}") for task in ("digits", "storm")]
    back_up, restore = blocks("docs/howto/host-the-arena.md")
    arena.shell(back_up)
    arena.shell("deploy/arena down --volumes")
    arena.shell(restore, timeout_s=BUILD_TIMEOUT_S)
    assert [arena.document(f"tiltyard leaderboard {task}") for task in ("digits", "storm")] == before
    arena.shell(f"tiltyard log verify {arena.environment['TILTYARD_REGISTRY']}")


def test_services_end_when_told_to_and_have_kept_everything_when_they_come_back_with_tls(arena: Composition) -> None:
    before = [arena.document(f"tiltyard leaderboard {task}") for task in ("digits", "storm")]
    arena.shell("deploy/arena stop")
    codes = {service: stopped(arena, service)["ExitCode"] for service in SERVICES}
    assert codes == dict.fromkeys(SERVICES, 0)
    arena.shell("make up OVERLAYS=tls", timeout_s=BUILD_TIMEOUT_S)
    # `make up` has brought the registry back to the version of the settings, over the same database.
    assert arena.inspect("registry")["Config"]["Labels"]["org.opencontainers.image.version"] == VERSION
    arena.shell("! timeout 30 tiltyard leaderboard digits")
    arena.environment["TILTYARD_TLS_CA"] = str(arena.folder / "arena" / "authority" / "ca.pem")
    assert [arena.document(f"tiltyard leaderboard {task}") for task in ("digits", "storm")] == before
    # The registry calls the selector for both of these, and a node the registry for the second.
    arena.shell("tiltyard task create digits/task.json --dataset digits/evaluation.safetensors --task-id sealed")
    arena.inside("validator-1", "tiltyard validate join sealed")
    arena.shell("make down")
    project = f"--filter label=com.docker.compose.project={arena.environment['TILTYARD_PROJECT']}"
    assert arena.shell(f"docker ps --all --quiet {project}") == ""
    kept = arena.shell(f"docker volume ls {project} --format '{{{{.Name}}}}'").split()
    assert len(kept) == len(SERVICES)


def stopped(arena: Composition, service: str) -> Any:
    """The state of a container that may run or not."""
    container = arena.shell(
        f"docker ps --all --quiet --filter label=com.docker.compose.project={arena.environment['TILTYARD_PROJECT']}"
        f" --filter label=com.docker.compose.service={service}"
    ).strip()
    return json.loads(arena.shell(f"docker inspect {container}"))[0]["State"]


def submissions(arena: Composition, task: str) -> list[Any]:
    """The task's submissions, as its creator sees them."""
    listed: list[Any] = arena.document(f"tiltyard submission list {task}")["submissions"]
    return listed


def submitted(arena: Composition, task: str) -> int:
    """How many submissions there are; none while the registry does not answer."""
    return int(arena.shell(f"tiltyard submission list {task} --json 2>&1 | grep -c commitment || true"))
