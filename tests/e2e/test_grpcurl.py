"""Debugging as users do: grpcurl with a token and no .proto file."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_up import running
from tests.unit.test_status import contract_services
from tiltyard.identity import Key, issue_token, verify_token

REGISTRY = (
    "Artifact", "Assignment", "Evaluation", "Leaderboard", "Log", "Membership", "Participant", "Submission", "Task",
)  # fmt: skip


class Arena:
    """A running arena, grpcurl and the command line pointed at it."""

    def __init__(self, addresses: dict[str, str], key: Path, state: Path) -> None:
        self.addresses = addresses
        self.key = key
        self.state = state

    def tiltyard(self, *arguments: str, stdin: str | None = None) -> str:
        command = [sys.executable, "-m", "tiltyard.cli", *arguments, "--key", str(self.key)]
        return subprocess.run(command, capture_output=True, text=True, check=True, input=stdin).stdout

    def token(self, service: str) -> str:
        """A token for registry or selector, or one of a node's own for that node."""
        if service not in ("trainer", "validator"):
            return issue_token(Key.load(self.key), audience=f"tiltyard.local/{service}")
        key = Key.load(self.state / service / "key.pem")
        return issue_token(key, audience=key.id)

    def grpcurl(self, service: str, *arguments: str, data: str | None = None) -> subprocess.CompletedProcess[str]:
        token = self.token(service)
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
        yield Arena(addresses, folder / "me.pem", folder / "state")


def test_the_command_lines_token_is_one(arena: Arena) -> None:
    token = arena.tiltyard("token", "--audience", "registry").strip()
    verify_token(token, audience="tiltyard.local/registry", now=time.time())


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


UNARY = [
    (
        "trainer" if service.full_name.startswith("inference") else service.full_name.split(".")[1],
        service.full_name,
        m.name,
    )
    for service in contract_services()
    for m in service.methods
    # Drain would end the process that the others ask.
    if not (m.client_streaming or m.server_streaming) and m.name != "Drain"
]
# What an empty request may get: an answer, or a refusal that says what it lacks.
ANSWERS = ("InvalidArgument", "NotFound", "PermissionDenied", "FailedPrecondition")


@pytest.mark.parametrize(("server", "service", "method"), UNARY, ids=[f"{s}/{m}" for _, s, m in UNARY])
def test_every_unary_method_answers_grpcurl(arena: Arena, server: str, service: str, method: str) -> None:
    done = arena.grpcurl(server, f"{service}/{method}", data="{}")

    code = next((line.partition(":")[2].strip() for line in done.stderr.splitlines() if "Code:" in line), "")
    assert (done.returncode == 0 and done.stdout.strip()) or code in ANSWERS, done.stderr
