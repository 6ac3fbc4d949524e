"""Debugging as users do: grpcurl with a token and no .proto file."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_up import running
from tiltyard.identity import Key

REGISTRY = (
    "Artifact", "Assignment", "Evaluation", "Leaderboard", "Log", "Membership", "Participant", "Submission", "Task",
)  # fmt: skip


class Arena:
    """A running arena, grpcurl and the command line pointed at it."""

    def __init__(self, addresses: dict[str, str], key: Path) -> None:
        self.addresses = addresses
        self.key = key

    def tiltyard(self, *arguments: str, stdin: str | None = None) -> str:
        command = [sys.executable, "-m", "tiltyard.cli", *arguments, "--key", str(self.key)]
        return subprocess.run(command, capture_output=True, text=True, check=True, input=stdin).stdout

    def grpcurl(self, service: str, *arguments: str, data: str | None = None) -> subprocess.CompletedProcess[str]:
        token = self.tiltyard("token", "--audience", service).strip()
        command = ["-plaintext", "-H", f"authorization: Bearer {token}"]
        if data is not None:
            command += ["-d", data]
        program = Path(sys.executable).with_name("grpcurl")
        return subprocess.run(
            [program, *command, self.addresses[service], *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("grpcurl")
    Key.generate().save(folder / "me.pem")
    with running(folder / "state", "--port-base", "0") as (_, addresses):
        yield Arena(addresses, folder / "me.pem")


def test_services_are_listed(arena: Arena) -> None:
    listed = arena.grpcurl("registry", "list").stdout.split()
    assert {f"tiltyard.registry.v1.{name}Service" for name in REGISTRY} <= set(listed)
    assert {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= set(listed)


def test_methods_and_messages_are_described(arena: Arena) -> None:
    assert "rpc JoinTask" in arena.grpcurl("registry", "describe", "tiltyard.registry.v1.MembershipService").stdout
    assert "bytes commitment" in arena.grpcurl("registry", "describe", ".tiltyard.type.v1.CommitStatement").stdout
    assert "rpc Deposit" in arena.grpcurl("selector", "describe", "tiltyard.selector.v1.StakeService").stdout


def test_a_call_answers_as_json(arena: Arena) -> None:
    done = arena.grpcurl(
        "registry", "tiltyard.registry.v1.ParticipantService/RegisterParticipant", data='{"display_name": "Grace"}'
    )
    assert done.returncode == 0, done.stderr
    assert "Grace" in json.loads(done.stdout)["participant"].values()


def test_a_signed_statement_goes_through_grpcurl(arena: Arena) -> None:
    me = f"participants/{Key.load(arena.key).id}"
    arena.tiltyard("participant", "register", "Grace", "--registry", arena.addresses["registry"])
    statement = {"origin": "tiltyard.local", "endorser": me, "subject": f"participants/{'ab' * 20}", "field": "vision"}
    envelope = arena.tiltyard("sign", "endorsement", stdin=json.dumps(statement))
    done = arena.grpcurl(
        "registry",
        "tiltyard.registry.v1.ParticipantService/EndorseParticipant",
        data=json.dumps({"statement": json.loads(envelope)}),
    )
    # The envelope was understood and its signature held: what is missing is the subject.
    assert "NotFound" in done.stderr


def test_errors_name_the_field(arena: Arena) -> None:
    done = arena.grpcurl(
        "registry", "tiltyard.registry.v1.ParticipantService/RegisterParticipant", data='{"display_name": ""}'
    )
    assert done.returncode != 0
    assert "InvalidArgument" in done.stderr
    assert "display_name" in done.stderr


def test_without_a_token_nothing_is_answered_but_health_and_reflection(arena: Arena) -> None:
    program = str(Path(sys.executable).with_name("grpcurl"))
    address = arena.addresses["registry"]

    def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, "-plaintext", address, *arguments], capture_output=True, text=True, check=False, timeout=60
        )

    assert json.loads(bare("grpc.health.v1.Health/Check").stdout) == {"status": "SERVING"}
    assert bare("list").returncode == 0
    refused = bare("tiltyard.registry.v1.TaskService/ListTasks")
    assert refused.returncode != 0
    assert "Unauthenticated" in refused.stderr


def test_a_token_for_one_service_is_none_for_another(arena: Arena) -> None:
    token = arena.tiltyard("token", "--audience", "selector").strip()
    program = str(Path(sys.executable).with_name("grpcurl"))
    command = [program, "-plaintext", "-H", f"authorization: Bearer {token}", arena.addresses["registry"]]
    done = subprocess.run(
        [*command, "tiltyard.registry.v1.TaskService/ListTasks"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "Unauthenticated" in done.stderr
