"""The main job: a whole task on real data over real processes, also when one of them is killed in the middle."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

ALLOWANCE_S = 200


def demo(*arguments: object, state: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tiltyard.cli", "demo", "--json", "--state", str(state), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def finished(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """The one JSON object on standard output, and standard error, of a demo that succeeded."""
    out, error = process.communicate(timeout=ALLOWANCE_S)
    assert process.returncode == 0, error
    return json.loads(out), error


def check(result: dict[str, Any], *, submissions: int, validators: int = 3) -> None:
    assert set(result) >= {"task", "seconds", "submissions", "leaderboard"}
    assert len(result["submissions"]) == submissions
    for each in result["submissions"]:
        assert each["state"] == "SCORED"
        assert each["accuracy"] == each["correct"] / each["total"]
        assert len(set(each["validators"])) >= validators
        assert each["participant"] not in each["validators"]
    assert len({each["participant"] for each in result["submissions"]}) == submissions
    best = max(result["submissions"], key=lambda each: each["correct"])
    assert result["leaderboard"][0]["correct"] == best["correct"]
    assert all(result["verified"].values())


@pytest.fixture
def leftovers() -> Iterator[None]:
    """Fails the test when a process that it started outlives it."""
    others = set(psutil.Process().children(recursive=True))
    yield
    mine = [each for each in psutil.Process().children(recursive=True) if each not in others]
    _, alive = psutil.wait_procs(mine, timeout=60)
    names = [each.cmdline() for each in alive]
    for each in alive:
        each.kill()
    assert names == []


@pytest.mark.usefixtures("leftovers")
def test_the_digits_from_creation_to_leaderboard(tmp_path: Path) -> None:
    process = demo("--export", tmp_path / "export", state=tmp_path / "state")
    result, told = finished(process)
    check(result, submissions=3)
    assert len({each["model"] for each in result["submissions"]}) == 3
    assert max(each["accuracy"] for each in result["submissions"]) > 0.95
    assert {each["total"] for each in result["submissions"]} == {539}
    assert "drawn for" in told
    assert str(tmp_path / "state") in told
    exported = {str(file.relative_to(tmp_path / "export")) for file in (tmp_path / "export").rglob("*")}
    assert {"log/checkpoint", "log/leaves", "models/results.json", "demo.json"} <= exported
    assert len([name for name in exported if name.endswith(".safetensors")]) == 3
    receipts = sorted((tmp_path / "export" / "receipts").glob("*.json"))
    assert len(receipts) == 3
    for receipt in receipts:
        verify = [sys.executable, "-m", "tiltyard.cli", "draw", "verify", str(receipt)]
        subprocess.run([*verify, "--key", str(tmp_path / "export" / "keys" / "selector.pub")], check=True)
    # Any byte of the log: what the first of each file stands for, tests/unit/test_audit.py does throughout.
    verify = [sys.executable, "-m", "tiltyard.cli", "log", "verify", str(tmp_path / "export")]
    assert "unwitnessed" in subprocess.run(verify, capture_output=True, text=True, check=True).stdout
    for name in ("log/checkpoint", "log/leaves"):
        file = tmp_path / "export" / name
        honest = file.read_bytes()
        file.write_bytes(bytes([honest[0] ^ 1]) + honest[1:])
        assert subprocess.run(verify, capture_output=True, check=False).returncode == 1
        file.write_bytes(honest)


@pytest.mark.usefixtures("leftovers")
def test_shuffled_labels_score_near_chance(tmp_path: Path) -> None:
    random_numbers = np.random.default_rng(1)
    np.savez(
        tmp_path / "d.npz",
        x=random_numbers.integers(0, 256, size=(900, 6, 6), dtype=np.uint8),
        y=random_numbers.integers(0, 10, size=900),
    )
    process = demo("--data", tmp_path / "d.npz", "--trainers", 2, "--validators", 1, state=tmp_path / "state")
    result, _ = finished(process)
    check(result, submissions=2, validators=1)
    # Four standard deviations of 270 guesses among ten classes.
    assert all(abs(each["accuracy"] - 0.1) < 0.075 for each in result["submissions"])


@pytest.mark.usefixtures("leftovers")
def test_two_classes_of_features_and_one_validator(tmp_path: Path) -> None:
    random_numbers = np.random.default_rng(2)
    y = random_numbers.integers(0, 2, size=600)
    # Columns of different units, labels far from 0 and 1.
    x = (random_numbers.normal(size=(600, 4)) + 3 * y[:, None]) * [1e-3, 1, 1e3, 1e6]
    np.savez(tmp_path / "d.npz", x=x, y=y * 1000 - 7)
    process = demo("--data", tmp_path / "d.npz", "--trainers", 1, "--validators", 1, state=tmp_path / "state")
    result, _ = finished(process)
    check(result, submissions=1, validators=1)
    assert result["submissions"][0]["accuracy"] > 0.95


@pytest.mark.parametrize(
    "moments",
    [
        # An evaluation may be over before anybody looks.
        {"services.trainer": "trains", "services.validator": "evaluates|sealed|opened"},
        # Kills of these two have tests of their own beside this one.
        pytest.param({"services.registry": "drawn for"}, marks=pytest.mark.soak),
        pytest.param({"services.selector": "submitted"}, marks=pytest.mark.soak),
    ],
    ids=" and ".join,
)
@pytest.mark.usefixtures("leftovers")
def test_processes_killed_in_the_middle_stop_nothing(tmp_path: Path, moments: dict[str, str]) -> None:
    chosen = random.Random(1)
    process = demo("--validators", 4, state=tmp_path / "state")
    killed: list[str] = []
    told: list[str] = []

    def follow() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            told.append(line)
            for service, moment in moments.items():
                if re.search(moment, line) and service not in killed:
                    running = psutil.Process(process.pid).children()
                    victim = chosen.choice([child for child in running if child.cmdline()[-1] == service])
                    os.kill(victim.pid, signal.SIGKILL)
                    killed.append(service)

    with process:
        follower = threading.Thread(target=follow)
        follower.start()
        assert process.stdout is not None
        out = process.stdout.read()
        assert process.wait(timeout=ALLOWANCE_S) == 0, "".join(told)
        follower.join()
    assert killed == list(moments)
    assert len([line for line in told if "died (SIGKILL)" in line]) == len(moments)
    check(json.loads(out), submissions=3)


@pytest.mark.usefixtures("leftovers")
def test_children_are_told_their_settings_and_die_with_a_demo_that_is_killed(tmp_path: Path) -> None:
    few = ("--trainers", 1, "--validators", 1)
    process = demo(*few, state=tmp_path / "state", TILTYARD_LOG_LEVEL="debug", TILTYARD_UNBONDING_TIME_S="7")
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            if "serving" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4
        told = [(each.cmdline()[-1], each.environ()) for each in psutil.Process(process.pid).children()]
        process.kill()
    assert {known.get("TILTYARD_LOG_LEVEL") for _, known in told} == {"debug"}
    assert [service for service, known in told if "TILTYARD_UNBONDING_TIME_S" in known] == ["services.selector"]
    _, alive = psutil.wait_procs(children, timeout=60)
    assert [each.cmdline() for each in alive] == []


def test_data_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 2)))
    process = demo("--data", tmp_path / "d.npz", state=tmp_path / "state")
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert error.splitlines()[-1] == f"error: {tmp_path / 'd.npz'} has no array y"
