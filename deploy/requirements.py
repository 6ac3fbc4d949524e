"""Prints what ./pyproject.toml asks for, with the extras named as arguments: what an image installs before the code."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def expanded(requirements: list[str]) -> Iterator[str]:
    """The requirements, with the project's own extras (`tiltyard[data]`) put in their place."""
    for requirement in requirements:
        own = re.fullmatch(rf"{project['name']}\[([a-z0-9,-]+)\]", requirement)
        for extra in own[1].split(",") if own else ():
            yield from expanded(project["optional-dependencies"][extra])
        if not own:
            yield requirement


for line in expanded([*project["dependencies"], f"{project['name']}[{','.join(sys.argv[1:])}]"]):
    sys.stdout.write(line + "\n")
