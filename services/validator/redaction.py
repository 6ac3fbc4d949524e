"""What a machine says in public is a text that the registry takes, and holds none of its folders."""

import re
import unicodedata

from services.runtime.fields import UNSEEN_CATEGORIES

_PATH = re.compile(r"(?<![\w./])/([\w.+-]+)(?:/[\w.+@-]+)+")
# Where folders begin on Linux and macOS (Filesystem Hierarchy Standard 3.0, and what is common beside it).
_ROOTS = frozenset(
    {
        *("app", "bin", "boot", "data", "dev", "etc", "home", "lib", "lib32", "lib64", "libx32", "media", "mnt", "nix"),
        *("opt", "proc", "root", "run", "sbin", "scratch", "snap", "srv", "sys", "tmp", "usr", "var", "work"),
        *("workspace", "Applications", "Library", "System", "Users", "Volumes", "private"),
    }
)
# Wherever the state folder lies: of its cache, and of the model servers.
_OURS = re.compile(r"/(cache/[0-9a-f]{64}|children/)")


def published(text: str, *, max_chars: int) -> str:
    """`text` as it may be said in public: one line without folders of this machine, cut where it is too long."""
    return without_folders(one_line(text))[:max_chars]


def one_line(text: str) -> str:
    """`text` with a space for all white space and what is not seen: a stranger's model or server may have chosen it."""
    return " ".join("".join(" " if unicodedata.category(char) in UNSEEN_CATEGORIES else char for char in text).split())


def without_folders(text: str) -> str:
    """`text` with the last name only of each path that looks like one of a machine; other slashes stay.

    Names in a model's graph often look like paths. The disk is not asked: who chose the text would learn what is on it.
    """
    return _PATH.sub(lambda path: path[0].rpartition("/")[2] if _is_of_machine(path) else path[0], text)


def _is_of_machine(path: re.Match[str]) -> bool:
    return path[1] in _ROOTS or _OURS.search(path[0]) is not None
