"""A witness of a real registry's log: it cosigns what only grows, and is not fooled by rows that were rewritten."""

import asyncio
import json
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from services.runtime.server import ArenaServer
from tests.support.registry_server import ORIGIN, RegistryServer
from tiltyard.audit import Record, audit
from tiltyard.audit.download import fetch_record
from tiltyard.cli.supervisor import free_ports
from tiltyard.cli.witnesses import RegistrySource
from tiltyard.cosigning import WitnessKey, cosign, verify_cosignature
from tiltyard.identity import Key
from tiltyard.transparency import Frontier, InvalidNote, leaf_hash
from tiltyard.witness import Alarm, Witness, witnessed

NOW_S = 1_700_000_000


@pytest.fixture
async def source(arena: RegistryServer) -> RegistrySource:
    for number in range(6):
        await arena.participant(f"number {number}")
    return RegistrySource(await arena.client(Key.generate()))


def rewrite(arena: RegistryServer, *, tree_too: bool) -> None:
    """Changes leaf 3 in the database behind the registry's back; with a tree that fits, as a thorough forger would."""
    with closing(sqlite3.connect(arena.folder / "state" / "registry.db")) as database, database:
        entries = [row[0] for row in database.execute('SELECT entry FROM log_leaves ORDER BY "index"')]
        at = entries[3].index(b"number")
        entries[3] = entries[3][:at] + b"nimble" + entries[3][at + 6 :]
        database.execute('UPDATE log_leaves SET entry = ? WHERE "index" = 3', (entries[3],))
        if not tree_too:
            return
        frontier = Frontier()
        for index, entry in enumerate(entries):
            database.execute('UPDATE log_leaves SET hash = ? WHERE "index" = ?', (leaf_hash(entry), index))
            for (level, place), value in frontier.append(leaf_hash(entry))[1:]:
                database.execute('UPDATE log_nodes SET hash = ? WHERE level = ? AND "index" = ?', (value, level, place))
        database.execute("UPDATE counters SET log_frontier = ?", (b"".join(frontier.hashes),))


async def test_a_growing_log_is_cosigned_again_and_again(
    arena: RegistryServer, source: RegistrySource, tmp_path: Path
) -> None:
    witness = Witness(tmp_path / "w", name="neighbour")
    first = await witness.look(source, now_s=NOW_S)
    await arena.participant("one more")
    second = await Witness(tmp_path / "w").look(source, now_s=NOW_S + 60)
    assert second.size == first.size + 1
    record = await fetch_record(await arena.client(Key.generate()))
    said = witness_of(tmp_path / "w", record)
    assert said == ("neighbour", second.size, NOW_S + 60)
    assert len(list((tmp_path / "w" / "checkpoints").iterdir())) == 2
    # A log that is longer than what was witnessed is witnessed as far as that goes.
    await arena.participant("yet one more")
    assert witness_of(tmp_path / "w", await fetch_record(await arena.client(Key.generate()))) == said


async def test_what_a_witness_keeps_is_on_the_disk_under_its_name(
    source: RegistrySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness, waits, on_disk = Witness(tmp_path / "w"), os.fsync, dict[Path, set[str]]()

    def fsync(descriptor: int) -> None:
        waits(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            on_disk[path] = {each.name for each in path.iterdir()}

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint = await witness.look(source, now_s=NOW_S)
    assert on_disk[tmp_path / "w" / "checkpoints"] == {f"{checkpoint.size:012}"}
    assert "frontier.json" in on_disk[tmp_path / "w"]


def witness_of(folder: Path, record: Record) -> tuple[str, int, int] | None:
    genesis = record.genesis
    hashes = [leaf_hash(leaf) for leaf in record.leaves]
    said = witnessed(folder, leaf_hashes=hashes, log_key=genesis.log_key, origin=genesis.origin)
    return None if said is None else (said.name, said.size, said.time_s)


async def test_a_rewritten_row_is_found_by_reading_the_log(arena: RegistryServer, source: RegistrySource) -> None:
    rewrite(arena, tree_too=False)
    found = audit(await fetch_record(await arena.client(Key.generate())))
    assert "another root" in found.failures[0].reason


async def test_a_rewritten_history_is_found_by_its_witness_and_by_nobody_else(
    arena: RegistryServer, source: RegistrySource, tmp_path: Path
) -> None:
    witness = Witness(tmp_path / "w")
    before = await witness.look(source, now_s=NOW_S)
    rewrite(arena, tree_too=True)
    record = await fetch_record(await arena.client(Key.generate()))
    assert audit(record).passed  # it is a log like any other
    with pytest.raises(Alarm, match="does not begin with"):
        await witness.look(source, now_s=NOW_S + 1)
    with pytest.raises(Alarm, match=rf"a leaf from 0 to {before.size - 1} was changed"):
        witness_of(tmp_path / "w", record)
    evidence = next((tmp_path / "w" / "alarms").iterdir()).read_text()
    assert evidence.count(f"\u2014 {record.genesis.origin} ") == 2  # both histories, each signed by the log


async def test_a_log_that_has_become_shorter_raises_the_alarm(
    arena: RegistryServer, source: RegistrySource, tmp_path: Path
) -> None:
    witness = Witness(tmp_path / "w")
    await witness.look(source, now_s=NOW_S)
    kept = [leaf_hash(leaf) for leaf in await source.leaves(start=0, end=4)]
    frontier = Frontier()
    for each in kept:
        frontier.append(each)
    with closing(sqlite3.connect(arena.folder / "state" / "registry.db")) as database, database:
        database.execute("UPDATE counters SET log_size = 4, log_frontier = ?", (b"".join(frontier.hashes),))
    with pytest.raises(Alarm, match="leaves are gone"):
        await witness.look(source, now_s=NOW_S + 1)


async def test_a_log_that_withholds_a_leaf_raises_the_alarm(
    arena: RegistryServer, source: RegistrySource, tmp_path: Path
) -> None:
    witness = Witness(tmp_path / "w")
    with closing(sqlite3.connect(arena.folder / "state" / "registry.db")) as database, database:
        database.execute('DELETE FROM log_leaves WHERE "index" = 3')
    with pytest.raises(Alarm, match="does not show leaf"):
        await witness.look(source, now_s=NOW_S)
    assert "shown now" in next((tmp_path / "w" / "alarms").iterdir()).read_text(encoding="utf-8")


@pytest.mark.parametrize("leaf", [b"\xff", None], ids=["no entry", "not there"])
async def test_a_log_without_a_genesis_is_a_matter_for_alarm(
    arena: RegistryServer, leaf: bytes | None, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(arena.folder / "state" / "registry.db")) as database, database:
        if leaf is None:
            database.execute('DELETE FROM log_leaves WHERE "index" = 0')
        else:
            database.execute('UPDATE log_leaves SET entry = ? WHERE "index" = 0', (leaf,))
    status, said = await looked_once(tmp_path / "w", arena.server.address)
    assert (status, said.startswith("ALARM: "), said.count("\n")) == (3, True, 1)
    assert not list((tmp_path / "w" / "alarms").iterdir())


async def test_two_histories_that_are_shown_to_two_people_are_found(
    arena: RegistryServer, source: RegistrySource, tmp_path: Path
) -> None:
    theirs = await source.note()
    rewrite(arena, tree_too=True)
    witness = Witness(tmp_path / "w")
    await witness.look(source, now_s=NOW_S)
    await witness.compare(source, await source.note())
    with pytest.raises(Alarm, match="two histories"):
        await witness.compare(source, theirs)


async def test_a_checkpoint_that_is_newer_than_the_last_look_is_no_matter_for_alarm(
    arena: RegistryServer, source: RegistrySource, tmp_path: Path
) -> None:
    witness = Witness(tmp_path / "w")
    before = await witness.look(source, now_s=NOW_S)
    await arena.participant("one more")
    assert (await witness.compare(source, await source.note())).size == before.size + 1


async def test_a_checkpoint_of_another_key_is_no_matter_for_alarm(
    arena: RegistryServer, source: RegistrySource, tmp_path: Path
) -> None:
    witness = Witness(tmp_path / "w")
    await witness.look(source, now_s=NOW_S)
    note = await source.note()
    with pytest.raises(InvalidNote):
        await witness.compare(source, note.replace("\u2014 ", "\u2014 x"))
    assert not list((tmp_path / "w" / "alarms").iterdir())


async def test_a_witness_outlasts_a_registry_that_is_away(arena: RegistryServer, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    options = ("--every", "0.1", "--registry", address, "--origin", ORIGIN, "--json")
    watching = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tiltyard.cli", "log", "watch", tmp_path / "w", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert watching.stdout is not None
    assert watching.stderr is not None
    registry = arena.registry
    try:
        for _ in range(2):
            said = await watching.stderr.readline()
            assert (said[:29], b"looking again" in said) == (b"the service cannot be reached", True)
            async with ArenaServer(
                address,
                registry.mounts,
                authenticator=registry.authenticator,
                policy=registry.policy,
                remembered=registry.database,
            ):
                seen = json.loads(await watching.stdout.readline())
                assert seen["size"] == len(await arena.entries())
        assert watching.returncode is None
    finally:
        watching.kill()
        await watching.wait()


async def looked_once(folder: Path, address: str, *arguments: str) -> tuple[int | None, str]:
    """The exit status of one look by command, and what it says of trouble."""
    options = ("--once", "--registry", address, "--origin", ORIGIN, *arguments)
    looking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tiltyard.cli", "log", "watch", folder, *options),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await looking.communicate()
    return looking.returncode, said.decode()


async def test_whoever_looks_once_tells_a_log_that_lied_from_one_that_is_away(
    arena: RegistryServer, source: RegistrySource, tmp_path: Path
) -> None:
    folder, note = tmp_path / "w", tmp_path / "note"
    assert await looked_once(folder, arena.server.address) == (0, "")
    note.write_text((await source.note()).replace("\u2014 ", "\u2014 x"))
    status, said = await looked_once(folder, arena.server.address, "--against", str(note))
    assert (status, said.startswith(f"error: {note}: ")) == (1, True)
    status, said = await looked_once(folder, f"127.0.0.1:{free_ports(1)[0]}")
    assert (status, said.startswith("error: the service cannot be reached")) == (1, True)
    rewrite(arena, tree_too=True)
    await arena.participant("one more")
    status, said = await looked_once(folder, arena.server.address)
    assert (status, said.startswith("ALARM: ")) == (3, True)
    (folder / "frontier.json").write_text('{"size": 3')
    status, said = await looked_once(folder, arena.server.address)
    assert (status, said.startswith(f"error: {folder}/frontier.json is damaged: "), said.count("\n")) == (1, True, 1)


def test_cosignatures_hold_for_their_note_and_key_alone() -> None:
    key = Key.generate()
    named = WitnessKey("w", key.public_bytes)
    assert WitnessKey.parse(str(named)) == named
    cosigned = cosign("origin\n1\nroot\n\n\u2014 origin AAAA\n", key=key, name="w", time_s=NOW_S)
    assert verify_cosignature(cosigned, named) == NOW_S
    other = "A" if cosigned[-9] != "A" else "B"  # of 64 keys one signs with an A there
    for changed, who in (
        (cosigned.replace("root", "riot"), named),
        (cosigned, WitnessKey("w", Key.generate().public_bytes)),
        (cosigned, WitnessKey("v", key.public_bytes)),
        (cosigned[:-9] + other + cosigned[-8:], named),
    ):
        with pytest.raises(InvalidNote):
            verify_cosignature(changed, who)
    for text in ("", "w", "w+00000000+AAAA", str(named)[:-2], str(named).replace("w+", "v+")):
        with pytest.raises(ValueError, match="a witness is named"):
            WitnessKey.parse(text)
