"""The command line without a service: keys, tokens, signatures, datasets, and how it refuses."""

import base64
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from tests.support.told_log import ToldLog
from tiltyard.audit import write_record
from tiltyard.cli.commands import app
from tiltyard.cli.connection import with_hint
from tiltyard.cli.supervisor import free_ports
from tiltyard.identity import Key, verify_token
from tiltyard.statements import open_statement
from tiltyard.type.v1 import envelope_pb2, log_pb2, participation_pb2, task_pb2
from tiltyard.witness import Witness


def tiltyard(*arguments: object, stdin: str | None = None, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], input=stdin, env=environment)


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_new_key_is_shown_by_its_id(tmp_path: Path) -> None:
    file = tmp_path / "me.pem"
    made = document(tiltyard("key", "new", file, "--json"))
    key = Key.load(file)
    assert (made["id"], made["public_key"]) == (key.id, key.public_bytes.hex())
    assert document(tiltyard("key", "show", file, "--json")) == made


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "me.pem"
    tiltyard("key", "new", file)
    before = file.read_bytes()
    result = tiltyard("key", "new", file)
    assert (result.exit_code, result.stderr) == (1, f"error: {file} is there already\n")
    assert file.read_bytes() == before


def test_what_is_no_key_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "not.pem"
    file.write_text("hello")
    result = tiltyard("key", "show", file)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [f"error: {file} holds no unencrypted PEM key"]


@pytest.mark.parametrize(
    ("audience", "expected"),
    [("registry", "arena.test/registry"), ("selector", "arena.test/selector"), ("ab" * 20, "ab" * 20)],
)
def test_a_token_is_for_its_audience(tmp_path: Path, audience: str, expected: str) -> None:
    import time

    key = Key.generate()
    key.save(tmp_path / "me.pem")
    result = tiltyard(
        "token", "--audience", audience, TILTYARD_KEY=str(tmp_path / "me.pem"), TILTYARD_ORIGIN="arena.test"
    )
    assert result.exit_code == 0
    assert verify_token(result.stdout.strip(), audience=expected, now=time.time()).id == key.id


def test_a_statement_is_signed_for_grpcurl(tmp_path: Path) -> None:
    key = Key.generate()
    key.save(tmp_path / "me.pem")
    statement = {"origin": "arena.test", "task": "tasks/t", "participant": f"participants/{key.id}", "role": 2}
    made = document(tiltyard("sign", "join", "--key", tmp_path / "me.pem", stdin=json.dumps(statement)))
    envelope = envelope_pb2.Envelope(
        payload_type=made["payload_type"],
        **{name: base64.b64decode(made[name]) for name in ("payload", "signature", "public_key")},
    )
    opened, signer = open_statement(envelope, envelope_pb2.JoinStatement)
    assert signer == key.id
    assert (opened.task, opened.role) == ("tasks/t", participation_pb2.ROLE_TRAINING_NODE)


def test_a_statement_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    Key.generate().save(tmp_path / "me.pem")
    result = tiltyard("sign", "join", "--key", tmp_path / "me.pem", stdin='{"rank": 1}')
    assert result.exit_code == 1
    assert "rank" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_unknown_kind_of_statement_is_a_usage_error(tmp_path: Path) -> None:
    Key.generate().save(tmp_path / "me.pem")
    assert tiltyard("sign", "nonsense", "--key", tmp_path / "me.pem").exit_code == 2


def test_a_missing_key_says_how_to_make_one(tmp_path: Path) -> None:
    result = tiltyard("task", "list", "--key", tmp_path / "none.pem")
    assert result.exit_code == 1
    assert f"tiltyard key new {tmp_path / 'none.pem'}" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("participant", "list"),
        ("stake", "show"),
        ("odds", "digits"),
        ("validate", "status"),
    ],
)
def test_a_service_that_is_away_is_named_in_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    Key.generate().save(tmp_path / "me.pem")
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    result = tiltyard(
        *command,
        TILTYARD_KEY=str(tmp_path / "me.pem"),
        TILTYARD_REGISTRY=nobody,
        TILTYARD_SELECTOR=nobody,
        TILTYARD_VALIDATOR=nobody,
    )
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the service cannot be reached")


@pytest.mark.parametrize("damaged", ["witness.pub", "checkpoints/000000000003"])
def test_a_damaged_witness_is_told_in_one_line(tmp_path: Path, damaged: str) -> None:
    write_record(ToldLog().tell().record(), tmp_path / "log")
    Witness(tmp_path / "w")
    (tmp_path / "w" / damaged).write_bytes(b"\xff")
    result = tiltyard("log", "verify", tmp_path, "--witness", tmp_path / "w")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'w'}: ")


@pytest.mark.parametrize("kept_back", [False, True])
def test_a_verified_log_tells_since_when_ledger_events_are_awaited(tmp_path: Path, kept_back: bool) -> None:
    told = ToldLog(draw_time_s=10**6).tell()
    told.edit("draw", lambda entry: entry.time.FromJsonString("2026-05-04T03:02:01Z"))
    if kept_back:
        told.leaves = [leaf for leaf in told.leaves if not log_pb2.LogEntry.FromString(leaf).ledger_event.draw]
    write_record(told.record(), tmp_path / "log")
    said = json.loads(tiltyard("log", "verify", tmp_path, "--json").stdout)
    expected = (1, "2026-05-04T03:02:01Z") if kept_back else (0, None)
    assert (said["verified"], said["pending"], said["pending_since"]) == (True, *expected)
    assert ("not in the log yet, since 2026-05-04T03:02:01Z" in tiltyard("log", "verify", tmp_path).stdout) is kept_back


def name_no_digest(entry: log_pb2.LogEntry) -> None:
    entry.task_created.config.base_model = "artifacts/zz"


def break_signature(entry: log_pb2.LogEntry) -> None:
    entry.submission_revealed.statement.payload += b"x"


@pytest.mark.parametrize(
    ("kind", "change"), [("task_created", name_no_digest), ("submission_revealed", break_signature)]
)
def test_what_artifacts_a_forged_log_names_hides_nothing_else(
    tmp_path: Path, kind: str, change: Callable[[log_pb2.LogEntry], None]
) -> None:
    told = ToldLog().tell()
    index = told.edit(kind, change)
    write_record(told.record(), tmp_path / "log")
    (tmp_path / "artifacts").mkdir()
    unnamed = tmp_path / "artifacts" / hashlib.sha256(b"").hexdigest()
    unnamed.touch()
    result = tiltyard("log", "verify", tmp_path, "--json")
    assert result.exit_code == 1
    problems = json.loads(result.stdout)["problems"]
    assert problems[-1] == f"no leaf names {unnamed}"
    assert kind == "task_created" or f"leaf {index}" in problems[0]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("TLS_CA", "`tiltyard demo` serves plaintext, on loopback only"),
        ("DATA_DIR", "`tiltyard demo` sees to that itself, each trainer gets a shard of --data"),
    ],
)
def test_the_demo_refuses_what_it_would_pass_over(tmp_path: Path, name: str, why: str) -> None:
    result = tiltyard("demo", "--state", tmp_path / "state", **{f"TILTYARD_{name}": "there"})
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: TILTYARD_{name} is set, but {why}: ")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("command", [("nonsense",), ("task", "show"), ("key", "new"), ("demo", "--trainers", "0")])
def test_wrong_usage_exits_2(command: tuple[str, ...]) -> None:
    assert tiltyard(*command).exit_code == 2


def groups(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The command and all below it that have commands of their own."""
    if hasattr(command, "commands"):
        yield path
        for name, below in command.commands.items():
            yield from groups(below, (*path, name))


@pytest.mark.parametrize("group", list(groups(typer.main.get_command(app))), ids=" ".join)
def test_help_says_of_each_command_a_whole_sentence_on_a_narrow_terminal(group: tuple[str, ...]) -> None:
    usage, said = tiltyard(*group, "--help", COLUMNS="80").stdout.split("Commands:")
    assert "--help" in usage
    assert [line for line in said.splitlines() if line.endswith("...")] == []


def commands(command: Any, path: str = "tiltyard") -> Iterator[tuple[str, Any]]:
    """All that do something, with what one types for them."""
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{path} {name}")
    if not hasattr(command, "commands"):
        yield path, command


def test_where_a_command_writes_is_an_argument_everywhere() -> None:
    found = dict(commands(typer.main.get_command(app)))
    assert not [path for path, command in found.items() for each in command.params if {"--out", "-o"} & {*each.opts}]
    # What it needs comes before it.
    for path, command in found.items():
        arguments = [each.name for each in command.params if each.param_type_name == "argument"]
        assert "out" not in arguments[:-1], path


def test_the_version_is_that_of_the_package() -> None:
    assert tiltyard("--version").stdout == f"tiltyard {importlib.metadata.version('tiltyard')}\n"


@pytest.mark.parametrize("command", [("dataset", "show"), ("dataset", "pack"), ("draw", "verify", "--key", "key")])
def test_a_file_that_is_not_there_is_named_in_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    missing = tmp_path / "nothing"
    result = tiltyard(*command, missing, *([tmp_path / "out"] if "pack" in command else []))
    assert (result.exit_code, result.stderr) == (1, f"error: {missing}: No such file or directory\n")


def test_a_dataset_is_not_packed_over_what_it_is_made_of(tmp_path: Path) -> None:
    file, same = tmp_path / "d.npz", tmp_path / "same.npz"
    np.savez(file, x=np.arange(12.0).reshape(6, 2), y=np.array([7, 9, 7, 9, 7, 9]))
    same.symlink_to(file)
    before = file.read_bytes()
    result = tiltyard("dataset", "pack", file, same)
    assert (result.exit_code, "is what the dataset is made of" in result.stderr) == (1, True)
    assert (file.read_bytes(), same.is_symlink()) == (before, True)


def test_a_dataset_is_packed_and_shown(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.arange(12.0).reshape(6, 2), y=np.array([7, 9, 7, 9, 7, 9]))
    packed = document(tiltyard("dataset", "pack", tmp_path / "d.npz", tmp_path / "d.safetensors", "--json"))
    assert (packed["rows"], packed["sample_shape"], packed["classes"], packed["labels"]) == (6, [2], 2, [7, 9])
    assert document(tiltyard("dataset", "show", tmp_path / "d.safetensors", "--json")) == packed


@pytest.mark.parametrize("content", [b"", b"no dataset at all", (2**60).to_bytes(8, "little")])
def test_what_is_no_dataset_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.safetensors").write_bytes(content)
    result = tiltyard("dataset", "show", tmp_path / "d.safetensors")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1


def test_a_config_that_is_none_is_refused_before_anything_is_called(tmp_path: Path) -> None:
    Key.generate().save(tmp_path / "me.pem")
    (tmp_path / "task.json").write_text('{"display_nam": "typo"}')
    (tmp_path / "d.safetensors").write_bytes(b"x")
    result = tiltyard(
        "task", "create", tmp_path / "task.json", "--dataset", tmp_path / "d.safetensors", "--key", tmp_path / "me.pem"
    )
    assert result.exit_code == 1
    assert "display_nam" in result.stderr


def test_the_command_starts_without_torch_and_sklearn() -> None:
    code = "import sys, tiltyard.cli.commands\n"
    code += "print([m for m in ('torch', 'sklearn', 'grpc', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_command_that_only_calls_runs_without_numpy_and_the_audit() -> None:
    code = """
import sys
import tiltyard.client
from tiltyard.cli import commands, connection

async def work(): return "done"

print(connection.run(work()), [m for m in ("numpy", "tiltyard.audit", "rich") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "done []\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("stake", "deposit", "ab" * 20, 2**63, "--reference", "r", "--funding-account", "a"),
        ("stake", "deposit", "ab" * 20, 0, "--reference", "r", "--funding-account", "a"),
        ("stake", "request-withdrawal", 2**63),
        ("odds", "digits", "--validators", 100),
        ("odds", "digits", "--validators", 0),
        ("log", "entries", "--start", 2**63),
        ("log", "inclusion", 2**63),
        ("log", "consistency", 1, 2**63),
        ("train", "d", "--task", "t", "--epochs", 2**31),
        ("train", "d", "--task", "t", "--ray-workers", 2**31),
        ("train", "d", "--task", "t", "--seed", 2**63),
        ("train", "d", "--task", "t", "--model-index", 2**31),
        ("submit", "m.onnx", "--task", "t", "--model-index", -1),
    ],
)
def test_numbers_that_no_call_can_take_are_refused_as_usage(tmp_path: Path, arguments: tuple[object, ...]) -> None:
    tiltyard("key", "new", tmp_path / "me.pem")
    result = tiltyard(*arguments, "--key", tmp_path / "me.pem")
    assert result.exit_code == 2
    assert "Input should be" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("log", "verify", "record"), "'record' is neither a folder nor HOST:PORT"),
        (("log", "verify", "127.0.0.1:7401", "--log-key", "xyz"), "'xyz' is not in hex"),
        (("odds", "--draw", "x"), "'x' is neither draws/{draw} nor tasks/{task}/submissions/{n}"),
        (("draw", "show", "tasks/t"), "'tasks/t' is neither draws/{draw} nor tasks/{task}/submissions/{n}"),
        (("task", "amend", "t", "--close-time", ""), "--close-time"),
        (("token", "--audience", "regsitry"), "'regsitry' is neither registry, selector nor a participant id"),
    ],
)
def test_a_word_that_nothing_can_be_made_of_is_refused_as_usage(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    tiltyard("key", "new", tmp_path / "me.pem")
    result = tiltyard(*arguments, TILTYARD_KEY=str(tmp_path / "me.pem"))
    assert (result.exit_code, said in " ".join(result.stderr.split())) == (2, True)


def test_a_witness_of_a_bad_name_leaves_nothing(tmp_path: Path) -> None:
    result = tiltyard("log", "watch", tmp_path / "witness", "--once", "--name", "a+b")
    assert result.exit_code == 1
    assert "'a+b' is no name of a witness" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address", ["", "http://host:1", "host", "host:name", "host:0", "host:70000", ":7401", "a b:1"]
)
def test_what_is_no_address_is_refused_as_usage(tmp_path: Path, address: str) -> None:
    tiltyard("key", "new", tmp_path / "me.pem")
    result = tiltyard("task", "list", TILTYARD_KEY=str(tmp_path / "me.pem"), TILTYARD_REGISTRY=address or " ")
    assert result.exit_code == 2
    assert "TILTYARD_REGISTRY" in result.stderr
    result = tiltyard("validate", "status", "--validator", address, "--key", tmp_path / "me.pem")
    assert result.exit_code == 2
    assert f"{address!r} is no address: it must be HOST:PORT" in " ".join(result.stderr.split())


def test_a_state_folder_that_cannot_be_made_is_refused_as_usage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = tiltyard("up", "--state", tmp_path / "file" / "state", "--port-base", "0")
    assert result.exit_code == 2
    assert "--state" in result.stderr
    assert "can't be made: Not a directory" in result.stderr


@pytest.mark.parametrize("host", ["bad host", "registry=", "trainer=a/b"])
def test_certificates_for_no_host_leave_nothing(tmp_path: Path, host: str) -> None:
    result = tiltyard("certs", "dev", tmp_path / "certs", "--san", host)
    assert result.exit_code == 1
    assert "is neither a host name nor an address" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_that_is_none_costs_no_task_its_name(tmp_path: Path) -> None:
    Key.generate().save(tmp_path / "me.pem")
    (tmp_path / "task.json").write_text("{}")
    file = tmp_path / "d.csv"
    file.write_text("1,2\n" * 10)
    result = tiltyard("task", "create", tmp_path / "task.json", "--dataset", file, "--key", tmp_path / "me.pem")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {file}: ")


def test_the_reference_says_in_one_line_what_it_cannot_read(tmp_path: Path) -> None:
    config = task_pb2.TaskConfig(models=[{"input_shape": [2], "outputs": 2, "linear": {}}])
    command = [sys.executable, "-m", "tiltyard.models.reference", str(tmp_path / "d"), "m", "out", "0"]
    done = subprocess.run(command, input=config.SerializeToString(), capture_output=True)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"No such file" in done.stderr


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from tiltyard.cli.connection import run\nasync def work(): print('x' * 100_000, flush=True)\n"
    code += "import typer; app = typer.Typer(); app.command()(lambda: run(work())); app()"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_terminal_of_few_characters_gets_a_whole_document(tmp_path: Path) -> None:
    file = tmp_path / "größe☃.pem"
    command = [sys.executable, "-m", "tiltyard.cli", "key", "new", str(file), "--json"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["file"] == str(file)


def test_a_table_of_names_that_a_terminal_does_not_know_is_no_error() -> None:
    code = "from tiltyard.cli import output; output.open_output(); output.print_table(['name'], [['größe☃']])"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (done.returncode, "größe?" in done.stdout.decode("latin-1")) == (0, True)


def test_a_command_runs_where_its_output_is_closed() -> None:
    command = f"{sys.executable} -m tiltyard.cli evaluation capture >&-"
    done = subprocess.run(["/bin/sh", "-c", command], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("command", ["key id me.pem", "key show me.pem --json", "odds --help", "--version"])
def test_a_disk_that_takes_no_output_is_told_in_one_line(tmp_path: Path, command: str, buffered: str) -> None:
    Key.generate().save(tmp_path / "me.pem")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tiltyard.cli", *command.split()],
            env={**os.environ, "PYTHONUNBUFFERED": buffered},
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_who_has_gone_before_the_end_is_no_error(tmp_path: Path, buffered: str) -> None:
    Key.generate().save(tmp_path / "me.pem")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "tiltyard.cli", "key", "id", str(tmp_path / "me.pem")],
        env={**os.environ, "PYTHONUNBUFFERED": buffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


IMPATIENT = """
import sys

class Interrupted:
    def find_spec(self, name, *_):
        if name == wanted:
            raise KeyboardInterrupt

wanted = sys.argv.pop(1)
sys.meta_path.insert(0, Interrupted())
from tiltyard.cli import app
app()
"""


@pytest.mark.parametrize("imported", ["typer", "tiltyard.client", "tiltyard.audit.record"])
def test_an_interrupt_ends_a_command_that_is_still_being_loaded(imported: str) -> None:
    command = [sys.executable, "-c", IMPATIENT, imported, "task", "list", "--key", "me.pem"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


@pytest.mark.parametrize("command", [("task", "show"), ("participant", "get"), ("participant", "register")])
def test_an_argument_that_is_no_text_is_refused_as_usage(tmp_path: Path, command: tuple[str, ...]) -> None:
    tiltyard("key", "new", tmp_path / "me.pem")
    result = tiltyard(*command, "n\udcff", "--key", tmp_path / "me.pem")
    assert result.exit_code == 2
    assert "is not UTF-8" in result.stderr


def test_files_are_read_as_utf_8_wherever_they_are_read(tmp_path: Path) -> None:
    tiltyard("key", "new", tmp_path / "me.pem")
    (tmp_path / "join.json").write_bytes('{"origin": "\u65e5\u672c"}'.encode())
    command = [
        sys.executable,
        "-m",
        "tiltyard.cli",
        "sign",
        "join",
        tmp_path / "join.json",
        "--key",
        tmp_path / "me.pem",
    ]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert "\u65e5\u672c".encode() in base64.b64decode(json.loads(done.stdout)["payload"])


def test_a_token_for_another_node_tells_of_the_option() -> None:
    refused = f"UNAUTHENTICATED (TOKEN_INVALID): the token is for another audience, '{'a' * 40}', not '{'b' * 40}'"
    assert "--node" in with_hint(refused)


@pytest.mark.parametrize("refusal", ["the token has expired", "the token was issued in the future"])
def test_a_token_that_is_new_and_of_another_time_tells_of_the_clock(refusal: str) -> None:
    line = f"UNAUTHENTICATED (TOKEN_INVALID): the bearer token is not valid here: {refusal}"
    assert with_hint(line).startswith(f"{line} (this machine's clock says 20")


def test_a_connection_that_a_server_ends_without_a_word_may_be_for_want_of_tls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = "the service cannot be reached: last error: UNAVAILABLE: ipv4:127.0.0.1:7401: Socket closed"
    monkeypatch.delenv("TILTYARD_TLS_CA", raising=False)
    assert "TILTYARD_TLS_CA" in with_hint(ended)
    monkeypatch.setenv("TILTYARD_TLS_CA", "ca.pem")
    assert "TILTYARD_TLS_CERTIFICATE" in with_hint(ended)
    for other in ("the service cannot be reached: Connection refused", "NOT_FOUND: Socket closed"):
        assert with_hint(other) == other
