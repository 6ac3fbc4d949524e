"""Every command block of README and tutorial is run as it stands, and every link of the docs leads somewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from google.protobuf import json_format

from services.registry.convert.drafts import draft_of
from services.registry.states import Metric
from tests.e2e.test_up import running
from tiltyard.cli.commands import app
from tiltyard.type.v1 import task_pb2

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("clients/*/README.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
_UP = "tiltyard up\n"
PORTS = {"registry": 7401, "selector": 7402, "trainer": 7403, "validator": 7404}


def blocks(page: Path, *languages: str) -> list[str]:
    """The page's fenced blocks in these languages, in order."""
    return [text for language, text in _FENCE.findall(page.read_text()) if language in languages]


def addressed(text: str, addresses: dict[str, str]) -> str:
    """The text with the arena's real addresses in the place of the default ones."""
    for service, port in PORTS.items():
        text = text.replace(f"127.0.0.1:{port}", addresses[service])
    return text


def shell(folder: Path, script: str, addresses: dict[str, str]) -> str:
    """Runs a script as a reader would type it; returns what it printed."""
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        **{f"TILTYARD_{service.upper()}": address for service, address in addresses.items()},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "no_proxy": "*",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", addressed(script, addresses)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What `tiltyard up` in the folder starts, on free ports."""
    with running(tmp_path / "tiltyard-state", "--port-base", "0") as (_, addresses):
        yield addresses


@pytest.mark.timeout(900)  # every command of the page, one after the other
def test_the_tutorial_runs_from_its_first_block_to_its_last(tmp_path: Path, arena: dict[str, str]) -> None:
    first, *rest = blocks(ROOT / "docs" / "tutorial.md", "sh")
    assert first == _UP
    said = shell(tmp_path, "".join(rest), arena)
    assert re.search(r"tasks/digits/submissions/1 +participants/\w+ +scored 4\d\d/500", said), said
    assert (tmp_path / "results" / "submission-1.safetensors").is_file()


def test_the_commands_of_the_readme_run(tmp_path: Path, arena: dict[str, str]) -> None:
    page = ROOT / "README.md"
    commands = blocks(page, "sh")
    made = [block for block in commands if block.startswith("make ")]
    assert commands.count(_UP) == 1
    shell(tmp_path, "".join(block for block in commands if block not in (_UP, *made)), arena)
    (program,) = blocks(page, "python")
    (tmp_path / "program.py").write_text(addressed(program, arena))
    assert "NOT_FOUND" in shell(tmp_path, "python3 program.py", arena)


def test_what_the_readme_makes_can_be_made() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    asked = {line.split()[1] for line in lines if line.startswith("make ")}
    assert {"demo", "test"} <= asked <= targets


def test_the_config_that_a_page_shows_is_one_that_a_registry_takes() -> None:
    (shown,) = blocks(ROOT / "docs" / "howto" / "post-a-task.md", "json")
    config = json_format.Parse(shown, task_pb2.TaskConfig())
    config.evaluation_dataset.CopyFrom(task_pb2.DatasetDigest(sha256=bytes(32), size_bytes=1000))
    draft = draft_of(config, now=datetime(2030, 1, 1, tzinfo=UTC), max_dataset_bytes=1000)
    assert (draft.metric, draft.top_k, draft.limits.daily_submissions) == (Metric.TOP_K_ACCURACY, 3, 5)


def unknown(text: str) -> list[str]:
    """What a text calls `tiltyard` with that there is not: commands, and options of them."""
    found = []
    for words, rest in re.findall(r"\btiltyard ((?:[a-z][a-z-]* ?)+)([^`\n|]*)", text):
        command, path = typer.main.get_command(app), words.split()
        while path and path[0] in getattr(command, "commands", {}):
            command = command.commands[path.pop(0)]  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            # Prose goes on after a group's name ("tiltyard up is ...") or has only the word itself.
            found += [f"tiltyard {words}"] if command.name != "tiltyard" and path else []
            continue
        known = {"--help", *(name for each in command.params for name in each.opts)}
        given = re.findall(r"(?<!\S)--[a-z-]+", rest)
        found += [f"tiltyard {words}{option}" for option in given if option not in known]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_calls_commands_and_options_that_there_are(page: Path) -> None:
    assert unknown(page.read_text()) == []


def test_a_command_that_there_is_not_would_be_found_out() -> None:
    assert unknown("`tiltyard task nonsense T`") == ["tiltyard task nonsense "]
    assert unknown("tiltyard task list --all --json") == ["tiltyard task list --all"]
    assert unknown("see `tiltyard task` and tiltyard train x --task digits") == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text())
    for target, anchor in _LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {target}#{anchor}"
