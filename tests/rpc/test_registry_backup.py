"""A backup made while writes go on, restored elsewhere: the same log goes on, and the artifacts are there."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.registry.backup import BackupRefused, back_up, restore
from services.registry.settings import RegistrySettings
from tests.registry_server import ORIGIN, RegistryServer, dataset_bytes
from tiltyard.audit import audit
from tiltyard.audit.download import fetch_record
from tiltyard.cli.audits import RegistrySource
from tiltyard.identity import Key
from tiltyard.registry.v1 import artifact_pb2
from tiltyard.witness import Alarm, Witness


def settings_of(folder: Path) -> RegistrySettings:
    return RegistrySettings(origin=ORIGIN, state_dir=folder / "state")


async def test_a_restored_registry_goes_on_with_the_same_log(arena: RegistryServer, tmp_path: Path) -> None:
    dataset = dataset_bytes(tmp_path)
    creator = await arena.participant("creator")
    task = await arena.open_task(creator, dataset)
    writing = asyncio.gather(*(arena.participant(f"number {number}") for number in range(40)))
    copied = await asyncio.to_thread(back_up, settings_of(arena.folder), tmp_path / "backup")
    await writing
    assert copied == 1
    witness = Witness(tmp_path / "witness")

    restored = RegistryServer(tmp_path / "elsewhere")
    restored.operator, restored.trusted = arena.operator, arena.trusted
    assert restore(settings_of(restored.folder), tmp_path / "backup") == 1
    await restored.start()
    try:
        assert restored.registry.log_key == arena.registry.log_key
        reader = await restored.client(Key.generate())
        source = RegistrySource(reader)
        before = await witness.look(source, now_s=1)
        await restored.participant("after the restore")
        assert (await witness.look(source, now_s=2)).size > before.size
        found = audit(await fetch_record(reader))
        # The selector in memory knows no ledger events, which the verdicts would follow from.
        assert not [failure for failure in found.failures if "leaves" in failure.reason]
        sha256 = task.config.evaluation_dataset.sha256.hex()
        chunks = [chunk async for chunk in downloaded(restored, creator.key, sha256)]
        assert b"".join(chunks) == dataset
        # What was written after the backup is gone: whoever saw it raises the alarm.
        other = Witness(tmp_path / "other")
        await other.look(RegistrySource(await arena.client(Key.generate())), now_s=3)
        with pytest.raises(Alarm):
            await other.look(source, now_s=4)
    finally:
        await restored.stop()


async def downloaded(arena: RegistryServer, key: Key, sha256: str) -> AsyncIterator[bytes]:
    client = await arena.client(key)
    request = artifact_pb2.DownloadArtifactRequest(name=f"artifacts/{sha256}")
    async for message in client.artifacts.DownloadArtifact(request):
        yield message.chunk


async def test_nothing_is_overwritten(arena: RegistryServer, tmp_path: Path) -> None:
    settings = settings_of(arena.folder)
    back_up(settings, tmp_path / "backup")
    with pytest.raises(BackupRefused, match="not empty"):
        back_up(settings, tmp_path / "backup")
    with pytest.raises(BackupRefused, match="there already"):
        restore(settings, tmp_path / "backup")
    with pytest.raises(BackupRefused, match="no backup"):
        restore(settings_of(tmp_path / "new"), tmp_path / "nothing")
    with pytest.raises(BackupRefused, match="pg_dump"):
        back_up(settings.model_copy(update={"database_url": "postgresql+psycopg:///x"}), tmp_path / "b")
