"""One task by hand, with the commands that the README shows, against the services that `tiltyard up` runs."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.test_up import running
from tiltyard.identity import Key

STAKE = 1_000_000_000


class Shell:
    """The command line with an arena's addresses set."""

    def __init__(self, state: Path, addresses: dict[str, str], folder: Path) -> None:
        self.state = state
        self.folder = folder
        self.registry = addresses["registry"]
        self._environment = {f"TILTYARD_{name.upper()}": address for name, address in addresses.items()}

    def call(self, *arguments: object, key: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tiltyard.cli", *map(str, arguments)],
            env={**self._environment, "TILTYARD_KEY": str(key or self.folder / "me.pem"), "HOME": str(self.folder)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def document(self, *arguments: object, key: Path | None = None) -> Any:
        done = self.call(*arguments, "--json", key=key)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def fund(self, key: Path) -> None:
        participant = Key.load(key).id
        done = self.call(
            *("stake", "deposit", participant, STAKE, "--reference", f"for {participant}"),
            *("--funding-account", f"of {participant}"),
            key=self.state / "operator.pem",
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("commands")
    Key.generate().save(folder / "me.pem")
    with running(folder / "state", "--port-base", "0") as (_, addresses):
        yield Shell(folder / "state", addresses, folder)


@pytest.mark.timeout(900)  # many commands, one after the other
def test_a_task_by_hand(shell: Shell) -> None:
    folder, trainer, validator = shell.folder, shell.state / "trainer/key.pem", shell.state / "validator/key.pem"
    random = np.random.default_rng(0)
    y = random.integers(0, 3, size=400)
    x = random.normal(size=(400, 5)).astype(np.float32) + 2 * y[:, None]
    np.savez(folder / "hidden.npz", x=x[:100], y=y[:100])
    np.savez(folder / "local.npz", x=x[100:], y=y[100:])
    shell.document("dataset", "pack", folder / "hidden.npz", folder / "hidden.safetensors")
    shell.document("dataset", "pack", folder / "local.npz", shell.state / "trainer/data/shard.safetensors")

    for name, key in (("Ada", folder / "me.pem"), ("A node", trainer), ("A validator", validator)):
        assert shell.document("participant", "register", name, key=key)["display_name"] == name
        shell.fund(key)
    assert int(shell.document("stake", "show")["available_micros"]) == STAKE
    assert len(shell.document("stake", "list")["stakes"]) == 3

    config = {
        "display_name": "Three clouds",
        "validators_per_submission": 1,
        "models": [{"input_shape": [5], "outputs": 3, "mlp": {"hidden": [16]}}],
    }
    (folder / "task.json").write_text(json.dumps(config))
    task = shell.document(
        "task", "create", folder / "task.json", "--dataset", folder / "hidden.safetensors", "--task-id", "clouds"
    )
    assert (task["name"], task["state"], task["evaluation_rows"]) == ("tasks/clouds", "TASK_STATE_OPEN", "100")
    assert [each["name"] for each in shell.document("task", "list")["tasks"]] == ["tasks/clouds"]

    amended = shell.document("task", "amend", "clouds", "--description", "Clouds of points", "--display-name", "Clouds")
    assert amended["config"]["description"] == "Clouds of points"
    amended = shell.document("task", "amend", "clouds", "--description", "")
    assert ("description" in amended["config"], amended["config"]["display_name"]) == (False, "Clouds")

    assert shell.document("validate", "join", "clouds", key=validator)["role"] == "ROLE_VALIDATOR"
    assert shell.document("task", "join", "clouds", key=trainer)["role"] == "ROLE_TRAINING_NODE"
    second = shell.call("validate", "join", "clouds", key=trainer)
    assert second.returncode == 1
    assert "ROLE_TAKEN" in second.stderr
    assert len(shell.document("task", "members", "clouds")["members"]) == 3
    assert all(each["eligible"] for each in shell.document("task", "verdicts", "clouds")["verdicts"])
    # As many are drawn as the task says, which is one; two there are not.
    assert shell.document("odds", "clouds", key=validator)["probability"] == 1.0
    assert shell.document("odds", "clouds", "--validators", "2", key=validator).get("probability", 0.0) == 0.0

    undrawn = shell.call("odds", "--draw", "tasks/clouds/submissions/1", key=validator)
    assert (undrawn.returncode, "validators have not been drawn for tasks/clouds" in undrawn.stderr) == (1, True)

    training = shell.document(
        *("train", "shard.safetensors", "--task", "clouds", "--epochs", 60, "--batch-size", 16),
        *("--schedule", "constant", "--max-gradient-norm", 5, "--class-weights", "1,1,2", "--holdout-share", 0.2),
        *("--curve", folder / "curve.png", "--tensorboard", folder / "logs"),
        key=trainer,
    )
    assert training["state"] == "TRAINING_STATE_SUCCEEDED"
    assert training["config"]["schedule"] == "SCHEDULE_KIND_CONSTANT"
    assert training["config"]["class_weights"] == [1.0, 1.0, 2.0]
    assert training["progress"]["holdout_total"] == "60"
    check_training_commands(shell, training, trainer)
    (trained,) = shell.state.glob("trainer/**/model.safetensors")
    submission = shell.document("submit", trained, "--task", "clouds", "--watch", key=trainer)
    assert submission["state"] == "SUBMISSION_STATE_SCORED"
    assert int(submission["score"]["correct"]) > 80
    again = shell.document("submit", trained, "--task", "clouds", key=trainer)
    assert again["name"] == submission["name"]

    (draw,) = submission["draws"]
    assert shell.document("draw", "show", draw)["picks"][0]["participant"] == submission["validators"][0]
    (run,) = shell.document("validate", "runs", key=validator)["runs"]
    assert run["counts"]["correct"] == submission["score"]["correct"]
    (entry,) = shell.document("leaderboard", "clouds")["entries"]
    assert (entry["display_name"], entry["submission"]) == ("A node", submission["name"])

    early = shell.call("task", "results", "clouds", folder / "early")
    assert (early.returncode, "can be had once it is closed: at 20" in early.stderr) == (1, True)
    assert not (folder / "early").exists()
    assert shell.document("task", "close", "clouds")["name"] == "tasks/clouds"
    watched = shell.call("task", "watch", "clouds", "--json")
    assert json.loads(watched.stdout.splitlines()[-1])["state"] == "TASK_STATE_FINAL"
    taken = shell.document("task", "results", "clouds", folder / "results")
    assert taken["models"] == [str(folder / "results/submission-1.safetensors")]
    results = json.loads((folder / "results/results.json").read_text())
    assert results["submissions"][0]["name"] == submission["name"]
    fetched, sent = load_file(folder / "results/submission-1.safetensors"), load_file(trained)
    assert all(np.array_equal(fetched[name], sent[name]) for name in sent)
    refused = shell.call("task", "results", "clouds", folder / "stolen", key=validator)
    assert refused.returncode == 1
    assert "are for its creator" in refused.stderr
    assert not (folder / "stolen").exists()

    checkpoint = shell.document("log", "checkpoint")
    entries = shell.document("log", "entries", "--limit", 0)["entries"]
    assert len(entries) >= int(checkpoint["size"])
    assert "genesis" in entries[0]["entry"]
    check_log_commands(shell, int(checkpoint["size"]))
    assert shell.document("validate", "drain", key=validator) == {}


def check_training_commands(shell: Shell, training: Any, key: Path) -> None:
    assert (shell.folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    steps = steps_of(shell.folder / "curve.csv")
    assert steps == sorted(set(steps))
    assert steps[-1] == int(training["progress"]["step"])
    (log,) = (shell.folder / "logs").iterdir()
    assert log.read_bytes().count(b"learning_rate") == len(steps)
    name = training["name"].removeprefix("trainings/")
    assert [each["name"] for each in shell.document("training", "list", key=key)["trainings"]] == [training["name"]]
    for command in ("show", "watch", "cancel"):  # what has ended stays as it is
        assert shell.document("training", command, name, key=key) == training
    # Who comes late sees what the others have seen.
    shell.document("training", "watch", name, "--curve", shell.folder / "late.png", key=key)
    assert set(steps) <= set(steps_of(shell.folder / "late.csv"))
    table = shell.call("training", "list", key=key)
    assert "shard.safetensors" in table.stdout
    assert "succeeded" in table.stdout


def steps_of(curve: Path) -> list[int]:
    with curve.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def check_log_commands(shell: Shell, size: int) -> None:
    proof = shell.document("log", "inclusion", 1)
    assert proof["proved"] or proof["tree_size"] > size
    assert shell.document("log", "consistency", 1, size)["path"]
    address = shell.registry
    witness = shell.folder / "witness"
    assert shell.document("log", "watch", witness, "--once")["size"] >= size
    found = shell.document("log", "verify", address, "--witness", witness)
    assert (found["verified"], found["witness"]["size"] >= size) == (True, True)
    assert shell.document("task", "export", "clouds", shell.folder / "exported")["withheld"] == []
    copied = shell.document("log", "verify", shell.folder / "exported")
    assert (copied["verified"], copied["witness"]) == (True, None)
    assert [each["task"] for each in copied["leaderboards"]] == ["tasks/clouds"]
    model, *others = (shell.folder / "exported" / "artifacts").iterdir()
    model.write_bytes(model.read_bytes() + b"x")
    refused = shell.call("log", "verify", shell.folder / "exported")
    assert (refused.returncode, "has the digest" in refused.stderr) == (1, True)
    # The same export once more brings what is not right, and nothing else.
    before = [each.stat().st_ino for each in others]
    shell.document("task", "export", "clouds", shell.folder / "exported")
    assert shell.document("log", "verify", shell.folder / "exported")["verified"]
    assert before
    assert [each.stat().st_ino for each in others] == before


def test_people_read_tables(shell: Shell) -> None:
    listed = shell.call("participant", "list")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.split()[:2] == ["participant", "name"]


def test_a_refused_creator_is_told_why(shell: Shell) -> None:
    poor = shell.folder / "poor.pem"
    if not poor.exists():
        Key.generate().save(poor)
    shell.document("participant", "register", "Poor", key=poor)
    (shell.folder / "t.json").write_text(
        json.dumps({"display_name": "x", "models": [{"input_shape": [5], "outputs": 3, "linear": {}}]})
    )
    np.savez(shell.folder / "tiny.npz", x=np.zeros((4, 5)), y=[0, 1, 2, 0])
    shell.document("dataset", "pack", shell.folder / "tiny.npz", shell.folder / "tiny.safetensors")
    done = shell.call(
        "task", "create", shell.folder / "t.json", "--dataset", shell.folder / "tiny.safetensors", key=poor
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: FAILED_PRECONDITION (NOT_ELIGIBLE)")
