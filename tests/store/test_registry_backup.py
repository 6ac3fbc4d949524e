"""A backup made while writes go on, restored elsewhere: the same log goes on, and the artifacts are there."""

import asyncio
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from services.registry import backup as backups
from services.registry.backup import BackupRefused, back_up, restore
from services.registry.settings import RegistrySettings
from services.runtime.copying import CopyRefused
from tests.support.postgres_server import PostgresServer
from tests.support.registry_server import ORIGIN, RegistryServer, artifact_name, dataset_bytes, uploading
from tests.support.s3_server import S3Server
from tiltyard.audit import audit
from tiltyard.audit.download import fetch_record
from tiltyard.cli.witnesses import RegistrySource
from tiltyard.client import Client
from tiltyard.identity import Key
from tiltyard.registry.v1 import artifact_pb2
from tiltyard.witness import Alarm, Witness

MODEL = b"a model that no task has named yet"


def settings_of(arena: RegistryServer) -> RegistrySettings:
    return RegistrySettings(origin=ORIGIN, state_dir=arena.folder / "state", **arena.settings)


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[RegistryServer]:
    """A registry on SQLite."""
    arena = RegistryServer(tmp_path / "first")
    await arena.start()
    yield arena
    await arena.stop()


@pytest.fixture
def elsewhere(arena: RegistryServer, tmp_path: Path) -> RegistryServer:
    """Where nothing is yet."""
    server = RegistryServer(tmp_path / "elsewhere")
    server.operator, server.trusted = arena.operator, arena.trusted
    return server


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with S3Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server.bucket()


async def read(client: Client, name: str) -> bytes:
    request = artifact_pb2.DownloadArtifactRequest(name=name)
    return b"".join([message.chunk async for message in client.artifacts.DownloadArtifact(request)])


async def hand_in(client: Client, content: bytes) -> str:
    header = artifact_pb2.UploadHeader(artifact=artifact_name(content), size_bytes=len(content), base_model=True)
    return (await client.artifacts.UploadArtifact(uploading(header, content))).artifact.name


@pytest.mark.parametrize(
    ("before", "after"), [("sqlite", "sqlite"), ("postgresql", "postgresql"), ("sqlite", "postgresql")]
)
async def test_a_restored_registry_goes_on_with_the_same_log(
    arena: RegistryServer,
    elsewhere: RegistryServer,
    tmp_path: Path,
    before: str,
    after: str,
    request: pytest.FixtureRequest,
) -> None:
    for server, kind in ((arena, before), (elsewhere, after)):
        if kind == "postgresql":
            postgres: PostgresServer = request.getfixturevalue("postgres")
            server.settings = {"database_url": postgres.database()}
    await arena.restart()
    dataset = dataset_bytes(tmp_path)
    creator = await arena.participant("creator")
    await arena.open_task(creator, dataset)
    await hand_in(creator, MODEL)
    writing = asyncio.gather(*(arena.participant(f"number {number}") for number in range(40)))
    assert await asyncio.to_thread(back_up, settings_of(arena), tmp_path / "backup") == 2
    await writing
    assert restore(settings_of(elsewhere), tmp_path / "backup") == 2
    assert sorted(file.name for file in (tmp_path / "backup").iterdir()) == [
        "artifacts",
        "log.pem",
        "pages.key",
        "registry.db",
    ]
    await elsewhere.start()
    try:
        await _check_that_it_goes_on(arena, elsewhere, tmp_path, creator.key, dataset)
    finally:
        await elsewhere.stop()


async def _check_that_it_goes_on(
    arena: RegistryServer, elsewhere: RegistryServer, folder: Path, creator: Key, dataset: bytes
) -> None:
    assert elsewhere.registry.log_key == arena.registry.log_key
    reader = await elsewhere.client(Key.generate())
    source, witness = RegistrySource(reader), Witness(folder / "witness")
    before = await witness.look(source, now_s=1)
    await elsewhere.participant("after the restore")
    assert (await witness.look(source, now_s=2)).size > before.size
    found = audit(await fetch_record(reader))
    # The selector in memory knows no ledger events, which the verdicts would follow from.
    assert not [failure for failure in found.failures if "leaves" in failure.reason]
    client = await elsewhere.client(creator)
    assert await read(client, artifact_name(dataset)) == dataset
    assert await read(client, artifact_name(MODEL)) == MODEL
    # What was written after the backup is gone: whoever saw it raises the alarm.
    other = Witness(folder / "other")
    await other.look(RegistrySource(await arena.client(Key.generate())), now_s=3)
    with pytest.raises(Alarm):
        await other.look(source, now_s=4)


async def test_a_restore_writes_over_no_key_of_a_registry_whose_database_is_elsewhere(
    arena: RegistryServer, elsewhere: RegistryServer, tmp_path: Path
) -> None:
    back_up(settings_of(arena), tmp_path / "backup")
    settings = settings_of(elsewhere)
    log_key = settings.state_dir / "log.pem"
    Key.generate().save(log_key)
    before = log_key.read_bytes()
    with pytest.raises(BackupRefused, match=f"{log_key} is another registry's"):
        restore(settings, tmp_path / "backup")
    assert log_key.read_bytes() == before
    log_key.unlink()
    restore(settings, tmp_path / "backup")
    # As where a restore broke off after the keys.
    Path(settings.database_url.removeprefix("sqlite:///")).unlink()
    restore(settings, tmp_path / "backup")
    assert log_key.read_bytes() == (tmp_path / "backup" / "log.pem").read_bytes()


async def test_a_registry_moves_from_a_directory_to_a_bucket_by_its_backup(
    arena: RegistryServer, elsewhere: RegistryServer, tmp_path: Path, bucket: str
) -> None:
    creator = await arena.participant("creator")
    name = await hand_in(creator, MODEL)
    back_up(settings_of(arena), tmp_path / "backup")
    elsewhere.settings = {"artifacts": bucket}
    restore(settings_of(elsewhere), tmp_path / "backup")
    await elsewhere.start()
    try:
        assert await read(await elsewhere.client(creator.key), name) == MODEL
        assert back_up(settings_of(elsewhere), tmp_path / "second") == 1
    finally:
        await elsewhere.stop()
    assert not any((elsewhere.folder / "state").rglob(name.removeprefix("artifacts/")))
    assert (tmp_path / "second" / name[: len("artifacts/") + 2] / name.removeprefix("artifacts/")).read_bytes() == MODEL


async def test_nothing_is_overwritten(arena: RegistryServer, elsewhere: RegistryServer, tmp_path: Path) -> None:
    settings = settings_of(arena)
    back_up(settings, tmp_path / "backup")
    with pytest.raises(BackupRefused, match="not empty"):
        back_up(settings, tmp_path / "backup")
    with pytest.raises(BackupRefused, match="already"):
        restore(settings, tmp_path / "backup")
    with pytest.raises(BackupRefused, match="no backup"):
        restore(settings_of(elsewhere), tmp_path / "nothing")


async def test_a_database_with_a_registry_is_not_restored_into(
    arena: RegistryServer, elsewhere: RegistryServer, tmp_path: Path, postgres: PostgresServer
) -> None:
    await arena.participant()
    back_up(settings_of(arena), tmp_path / "backup")
    elsewhere.settings = {"database_url": postgres.database()}
    settings = settings_of(elsewhere)
    restore(settings, tmp_path / "backup")
    with pytest.raises(BackupRefused, match="already"):
        restore(settings, tmp_path / "backup")


async def test_what_breaks_off_is_no_backup_and_a_restore_that_breaks_off_is_done_again(
    arena: RegistryServer,
    elsewhere: RegistryServer,
    tmp_path: Path,
    postgres: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = await hand_in(await arena.participant(), MODEL)
    copy_artifact, copy_database = backups._copy_artifact, backups.copy_database

    class Died(BaseException):
        """The process ends here."""

    def die(*_: object) -> None:
        raise Died

    monkeypatch.setattr(backups, "_copy_artifact", die)
    with pytest.raises(Died):
        back_up(settings_of(arena), tmp_path / "broken")
    with pytest.raises(BackupRefused, match="not finished"):
        restore(settings_of(elsewhere), tmp_path / "broken")
    monkeypatch.setattr(backups, "_copy_artifact", copy_artifact)
    back_up(settings_of(arena), tmp_path / "backup")
    elsewhere.settings = {"database_url": postgres.database()}
    monkeypatch.setattr(backups, "copy_database", die)
    with pytest.raises(Died):
        restore(settings_of(elsewhere), tmp_path / "backup")
    monkeypatch.setattr(backups, "copy_database", copy_database)
    restore(settings_of(elsewhere), tmp_path / "backup")
    assert not list((elsewhere.folder / "state").glob(".*"))
    await elsewhere.start()
    try:
        reader = await elsewhere.client(Key.generate())
        assert len((await fetch_record(reader)).leaves) >= 2
        assert elsewhere.registry.files.open(name.removeprefix("artifacts/")).size == len(MODEL)
    finally:
        await elsewhere.stop()


def test_an_interrupt_ends_a_backup_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    went_on = False

    def long(*_: object) -> int:
        nonlocal went_on
        signal.raise_signal(signal.SIGINT)
        went_on = True
        return 0

    monkeypatch.setattr(backups, "back_up", long)
    monkeypatch.setattr(sys, "argv", ["backup", str(tmp_path / "backup")])
    assert backups.main() == 130
    assert not went_on
    assert capsys.readouterr().err == "interrupted: not all is there\n"


async def test_artifacts_that_are_rotten_or_gone_are_told(
    arena: RegistryServer, elsewhere: RegistryServer, tmp_path: Path
) -> None:
    name = await hand_in(await arena.participant(), MODEL)
    sha256 = name.removeprefix("artifacts/")
    file = arena.folder / "state" / "artifacts" / sha256[:2] / sha256
    back_up(settings_of(arena), tmp_path / "backup")
    kept = tmp_path / "backup" / "artifacts" / sha256[:2] / sha256
    kept.write_bytes(MODEL[:-1] + b"?")
    with pytest.raises(BackupRefused, match="not those of its name"):
        restore(settings_of(elsewhere), tmp_path / "backup")
    kept.unlink()
    with pytest.raises(BackupRefused, match=f"lacks {name}"):
        restore(settings_of(elsewhere), tmp_path / "backup")
    file.write_bytes(MODEL[:-1] + b"?")
    with pytest.raises(BackupRefused, match="not those of its name"):
        back_up(settings_of(arena), tmp_path / "second")
    file.unlink()
    with pytest.raises(BackupRefused, match="are gone"):
        back_up(settings_of(arena), tmp_path / "third")


async def test_an_artifact_that_is_removed_under_the_backup_is_not_in_it(
    arena: RegistryServer, elsewhere: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await arena.participant()
    for content in (MODEL, b"another model"):
        await hand_in(client, content)
    arena.clock.advance(seconds=86400)
    await hand_in(client, b"another model")
    copy_out, loop = backups._copy_out, asyncio.get_running_loop()

    def then_remove(url: str, copy: Path) -> None:
        copy_out(url, copy)
        prefix = artifact_name(MODEL).removeprefix("artifacts/")[:2]
        assert asyncio.run_coroutine_threadsafe(arena.registry.garbage.remove_part(prefix), loop).result(20) == 1

    monkeypatch.setattr(backups, "_copy_out", then_remove)
    assert await asyncio.to_thread(back_up, settings_of(arena), tmp_path / "backup") == 1
    with closing(sqlite3.connect(tmp_path / "backup" / "registry.db")) as copy:
        kept = copy.execute("SELECT sha256 FROM artifacts").fetchall()
        assert kept == copy.execute("SELECT sha256 FROM artifact_uses").fetchall()
        assert kept == [(artifact_name(b"another model").removeprefix("artifacts/"),)]
    assert restore(settings_of(elsewhere), tmp_path / "backup") == 1


async def test_a_database_of_another_version_is_not_copied(
    arena: RegistryServer, tmp_path: Path, postgres: PostgresServer
) -> None:
    with closing(sqlite3.connect(arena.folder / "state" / "registry.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '0001'")
    with pytest.raises(CopyRefused, match=r"version 0001.*start the service once"):
        backups.copy_database(
            f"sqlite:///{arena.folder / 'state' / 'registry.db'}", postgres.database(), "services.registry.migrations"
        )
