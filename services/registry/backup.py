"""`python -m services.registry.backup DIR` while the registry runs, and `... --restore DIR` into an empty state folder.

A backup holds the database as it was at one moment, the keys, and every artifact that it names. The database is copied
first: an artifact's file is whole before a row names it, and files are never changed, so what is copied later fits.
"""

import argparse
import asyncio
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from sqlalchemy import make_url

from services.registry.settings import RegistrySettings

_DATABASE = "registry.db"
_FOLDER = "artifacts"
# Keys and page tokens' secret: without them the log could not be gone on with.
_KEYS = "*.pem", "*.key"


class BackupRefused(Exception):
    """What a backup or a restore will not do."""


def back_up(settings: RegistrySettings, folder: Path) -> int:
    """Copies the state of a registry, which may be at work, into a new folder; the number of artifacts."""
    database = _database_file(settings)
    if folder.exists() and any(folder.iterdir()):
        raise BackupRefused(f"{folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(folder / _DATABASE)) as copy:
        # All pages in one go: one snapshot, beside which the registry goes on writing.
        source.backup(copy)
        digests = [row[0] for row in copy.execute("SELECT sha256 FROM artifacts")]
    for pattern in _KEYS:
        for file in settings.state_dir.glob(pattern):
            shutil.copy2(file, folder / file.name)
    for digest in digests:
        _copy(settings.state_dir / _FOLDER / digest[:2] / digest, folder / _FOLDER / digest[:2] / digest)
    return len(digests)


def restore(settings: RegistrySettings, folder: Path) -> int:
    """Puts a backup into the settings' state folder, which must hold no registry; the number of artifacts."""
    database = _database_file(settings)
    if database.exists():
        raise BackupRefused(f"{database} is there already")
    if not (folder / _DATABASE).exists():
        raise BackupRefused(f"{folder} holds no backup")
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    for pattern in _KEYS:
        for file in folder.glob(pattern):
            shutil.copy2(file, settings.state_dir / file.name)
    files = [file for file in (folder / _FOLDER).rglob("*") if file.is_file()]
    for file in files:
        _copy(file, settings.state_dir / _FOLDER / file.name[:2] / file.name)
    # Last, so that a restore that broke off can be done again.
    beside = database.with_name(f".{database.name}.restoring")
    shutil.copy2(folder / _DATABASE, beside)
    beside.replace(database)
    return len(files)


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, destination)


def _database_file(settings: RegistrySettings) -> Path:
    url = make_url(settings.database_url)
    if url.get_backend_name() != "sqlite" or not url.database:
        raise BackupRefused("a PostgreSQL database is backed up by pg_dump, beside a copy of the state folder")
    return Path(url.database)


async def main() -> int:
    """Backs up, or restores. 1 where it refuses."""
    parser = argparse.ArgumentParser(prog="python -m services.registry.backup", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--restore", action="store_true", help="put the backup back instead of making one")
    options = parser.parse_args()
    settings = RegistrySettings.load()
    work, done = (restore, "restored") if options.restore else (back_up, "backed up")
    try:
        count = await asyncio.to_thread(work, settings, options.folder)
    except (BackupRefused, OSError, sqlite3.Error) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{done}: the database and {count} artifacts\n")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
