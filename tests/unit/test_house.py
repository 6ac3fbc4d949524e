"""docs/house.md names the folders that there are, and no others."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/house.md").read_text()


def folders(place: Path) -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=place, capture_output=True, text=True, check=True).stdout
    return {path.split("/")[0] for path in listed.split("\0") if "/" in path and not path.startswith(".")}


def named(section: str) -> set[str]:
    """The folders in the first column of a section's table."""
    text = PAGE.partition(f"\n## {section}")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return {folder for row in rows for folder in re.findall(r"`(\w+)/`", row)}


def test_every_folder_has_its_line() -> None:
    assert named("`tiltyard/`") == folders(ROOT / "tiltyard")
    assert named("`services/`") == folders(ROOT / "services")
    assert named("Beside them") | {"tiltyard", "services"} == folders(ROOT)


def test_modules_that_it_names_are_there() -> None:
    (modules,) = [line for line in PAGE.splitlines() if line.startswith("| modules of the top floor")]
    for module in re.findall(r"`(\w+)`", modules):
        assert (ROOT / "tiltyard" / f"{module}.py").is_file(), module
