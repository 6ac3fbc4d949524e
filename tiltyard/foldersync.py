"""A file that was given a name is found under it after a loss of power, once its folder is on the disk."""

import os
from pathlib import Path


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
