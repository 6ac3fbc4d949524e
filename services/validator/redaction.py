"""What a machine says in public holds none of its folders."""

import re
from pathlib import Path

_PATH = re.compile(r"(?<![\w./])/([\w.+-]+)(?:/[\w.+@-]+)+")


def without_folders(text: str) -> str:
    """`text` with the last name only of each path below a folder of this machine; other slashes stay.

    Names in a model's graph often look like paths.
    """
    return _PATH.sub(lambda found: found[0].rpartition("/")[2] if Path("/", found[1]).exists() else found[0], text)
