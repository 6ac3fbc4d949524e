"""`python -m services.registry.backup DIR` while the registry runs, and `... --restore DIR` into an empty registry.

A backup holds the database as it was at one moment (as SQLite, whatever the registry runs on), the keys of the state
folder, and every artifact on record. The database is copied first: an artifact's file is whole before a row names it,
and files are never changed, so what is copied later fits.
"""

import argparse
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from sqlalchemy import make_url, text
from sqlalchemy.exc import SQLAlchemyError

from services.registry.artifacts.files import ArtifactFiles
from services.registry.artifacts.storage import open_artifacts
from services.registry.settings import RegistrySettings
from services.runtime.copying import CopyRefused, copy_database, holds_rows
from services.runtime.engines import migrate, reading_engine
from tiltyard.growingfile import GrowingFile
from tiltyard.keyfiles import write_secret

_DATABASE = "registry.db"
# Called so until all else is there.
_UNFINISHED = ".registry.db.unfinished"
_FOLDER = "artifacts"
# Keys and page tokens' secret: without them the log could not be gone on with.
_KEYS = "*.pem", "*.key"
_MIGRATIONS = "services.registry.migrations"
_READ_BYTES = 8 << 20
_RESTORING = "restore"


class BackupRefused(Exception):
    """What a backup or a restore will not do."""


def back_up(settings: RegistrySettings, folder: Path) -> int:
    """Copies the state of a registry, which may be at work, into a new folder; the number of artifacts."""
    if folder.exists() and any(folder.iterdir()):
        raise BackupRefused(f"{folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = folder / _UNFINISHED
    _copy_out(settings.database_url, unfinished)
    for pattern in _KEYS:
        for file in settings.state_dir.glob(pattern):
            shutil.copy2(file, folder / file.name)
    files = open_artifacts(settings.artifacts, state_dir=settings.state_dir)
    copied = 0
    with closing(sqlite3.connect(unfinished)) as copy:
        for sha256 in _digests(copy):
            try:
                _copy_artifact(files, sha256, folder / _FOLDER / sha256[:2] / sha256)
                copied += 1
            except FileNotFoundError:
                if _is_on_record(settings.database_url, sha256):
                    raise BackupRefused(f"the bytes of artifacts/{sha256} are gone") from None
                # Nothing needed it, and the registry has removed it meanwhile.
                with copy:
                    copy.execute("DELETE FROM artifacts WHERE sha256 = ?", (sha256,))
                    copy.execute("DELETE FROM artifact_uses WHERE sha256 = ?", (sha256,))
    unfinished.replace(folder / _DATABASE)
    return copied


def restore(settings: RegistrySettings, folder: Path) -> int:
    """Puts a backup into the state folder and the database, which must hold no registry; the number of artifacts."""
    backup = folder / _DATABASE
    if not backup.exists():
        raise BackupRefused(f"{folder} holds no backup, or one that was not finished")
    if _holds_registry(settings.database_url):
        raise BackupRefused("there is a registry in the database already")
    with closing(sqlite3.connect(f"{backup.absolute().as_uri()}?mode=ro", uri=True)) as database:
        digests = list(_digests(database))
    for sha256 in digests:
        if not (folder / _FOLDER / sha256[:2] / sha256).exists():
            raise BackupRefused(f"{folder} lacks artifacts/{sha256}")
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    for pattern in _KEYS:
        for file in folder.glob(pattern):
            _put_key(file, settings.state_dir / file.name)
    files = open_artifacts(settings.artifacts, state_dir=settings.state_dir)
    for sha256 in digests:
        _put_artifact(files, sha256, folder / _FOLDER / sha256[:2] / sha256)
    # Last, so that a restore that broke off can be done again.
    _copy_in(backup, settings)
    return len(digests)


def _copy_out(url: str, copy: Path) -> None:
    database = _sqlite_file(url)
    if database is None:
        copy_database(url, f"sqlite:///{copy}", _MIGRATIONS)
        copy.with_name(f"{copy.name}.lock").unlink(missing_ok=True)
        with closing(sqlite3.connect(copy)) as opened:
            # One file, with nothing beside it.
            opened.execute("PRAGMA journal_mode=DELETE")
        return
    if not database.exists():
        raise BackupRefused(f"there is no {database}")
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy)) as target:
        # All pages in one go: one snapshot, beside which the registry goes on writing.
        source.backup(target)
        target.execute("PRAGMA journal_mode=DELETE")


def _copy_in(backup: Path, settings: RegistrySettings) -> None:
    database = _sqlite_file(settings.database_url)
    beside = settings.state_dir / f".{_DATABASE}.restoring" if database is None else _beside(database)
    shutil.copy2(backup, beside)
    if database is not None:
        beside.replace(database)
        return
    try:
        # A backup of an earlier version is a step behind the tables that it goes into.
        migrate(f"sqlite:///{beside}", _MIGRATIONS)
        copy_database(f"sqlite:///{beside}", settings.database_url, _MIGRATIONS)
    finally:
        for left_over in settings.state_dir.glob(f"{beside.name}*"):
            left_over.unlink()


def _beside(database: Path) -> Path:
    database.parent.mkdir(parents=True, exist_ok=True)
    return database.with_name(f".{database.name}.restoring")


def _sqlite_file(url: str) -> Path | None:
    """The file of a SQLite database, None for PostgreSQL."""
    parsed = make_url(url)
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def _holds_registry(url: str) -> bool:
    database = _sqlite_file(url)
    return database.exists() if database is not None else holds_rows(url)


def _digests(database: sqlite3.Connection) -> Iterator[str]:
    for (sha256,) in database.execute("SELECT sha256 FROM artifacts").fetchall():
        yield sha256


def _is_on_record(url: str, sha256: str) -> bool:
    engine = reading_engine(url, readers=1)
    try:
        with engine.connect() as connection:
            asked = text("SELECT 1 FROM artifacts WHERE sha256 = :sha256")
            return connection.execute(asked, {"sha256": sha256}).first() is not None
    finally:
        engine.dispose()


def _copy_artifact(files: ArtifactFiles, sha256: str, destination: Path) -> None:
    with closing(files.open(sha256)) as source:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with closing(GrowingFile(destination)) as copy:
            while block := source.read(copy.size, _READ_BYTES):
                copy.append([block])
            copy.sync()
            if copy.digest().hex() != sha256:
                raise BackupRefused(f"the bytes of artifacts/{sha256} are not those of its name")


def _put_key(source: Path, destination: Path) -> None:
    content = source.read_bytes()
    try:
        write_secret(destination, content)
    except FileExistsError:
        # Of a restore that broke off, or of a registry whose database is elsewhere, to whom nobody could give it back.
        if destination.read_bytes() != content:
            raise BackupRefused(f"{destination} is another registry's: move it away, if it is needed no more") from None


def _put_artifact(files: ArtifactFiles, sha256: str, source: Path) -> None:
    with closing(files.open_partial(_RESTORING, sha256, anew=True)) as partial:
        with source.open("rb") as opened:
            while block := opened.read(_READ_BYTES):
                partial.append([block])
        if not partial.finish():
            raise BackupRefused(f"the bytes of {source} are not those of its name")
        partial.settle()


def main() -> int:
    """Backs up, or restores. 1 where it refuses, 130 where it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m services.registry.backup", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--restore", action="store_true", help="put the backup back instead of making one")
    options = parser.parse_args()
    settings = RegistrySettings.load()
    work, done = (restore, "restored") if options.restore else (back_up, "backed up")
    try:
        count = work(settings, options.folder)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: not all is there\n")
        return 130
    except (BackupRefused, CopyRefused, OSError, sqlite3.Error, SQLAlchemyError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{done}: the database and {count} artifacts\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
