"""What a machine says in public is a text that the registry takes, and holds none of its folders."""

import os
import re
import unicodedata

from services.runtime.fields import UNSEEN_CATEGORIES

_PATH = re.compile(r"(?<![\w./])/([\w.+-]+)(?:/[\w.+@-]+)+")


def published(text: str, *, max_chars: int) -> str:
    """`text` as it may be said in public: one line without folders of this machine, cut where it is too long."""
    return without_folders(one_line(text))[:max_chars]


def one_line(text: str) -> str:
    """`text` with a space for all white space and what is not seen: a stranger's model or server may have chosen it."""
    return " ".join("".join(" " if unicodedata.category(char) in UNSEEN_CATEGORIES else char for char in text).split())


def without_folders(text: str) -> str:
    """`text` with the last name only of each path below a folder of this machine; other slashes stay.

    Names in a model's graph often look like paths.
    """
    return _PATH.sub(lambda found: found[0].rpartition("/")[2] if _is_here(found[1]) else found[0], text)


def _is_here(name: str) -> bool:
    # A stranger's name may be longer than any folder's can be: then a Path would raise OSError.
    return os.path.exists(f"/{name}")
