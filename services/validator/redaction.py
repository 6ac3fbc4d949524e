"""What a machine says in public holds none of its folders."""

import os
import re

_PATH = re.compile(r"(?<![\w./])/([\w.+-]+)(?:/[\w.+@-]+)+")


def without_folders(text: str) -> str:
    """`text` with the last name only of each path below a folder of this machine; other slashes stay.

    Names in a model's graph often look like paths.
    """
    return _PATH.sub(lambda found: found[0].rpartition("/")[2] if _is_here(found[1]) else found[0], text)


def _is_here(name: str) -> bool:
    # A stranger's name may be longer than any folder's can be: then a Path would raise OSError.
    return os.path.exists(f"/{name}")
