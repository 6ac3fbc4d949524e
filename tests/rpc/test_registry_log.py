"""LogService over a real server: what an outsider can check."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from services.registry.record_log import RecordLog
from services.runtime.errors import FailedPrecondition
from tests.support.registry_fakes import SELECTOR_KEY, FakeSelection
from tests.support.registry_server import ORIGIN, RegistryServer, refused
from tiltyard.cli.commands import app
from tiltyard.client import Client
from tiltyard.identity import Key
from tiltyard.registry.v1.log_pb2 import (
    GetCheckpointRequest,
    GetConsistencyProofRequest,
    GetInclusionProofRequest,
    Leaf,
    ListEntriesRequest,
)
from tiltyard.telemetry import metrics
from tiltyard.transparency import (
    Checkpoint,
    leaf_hash,
    parse_checkpoint,
    root_hash,
    verify_consistency,
    verify_inclusion,
    verify_note,
)
from tiltyard.type.v1 import log_pb2 as type_log_pb2

OUT_OF_RANGE = grpc.StatusCode.OUT_OF_RANGE
INVALID = grpc.StatusCode.INVALID_ARGUMENT


async def all_leaves(client: Client, *, page_size: int) -> list[Leaf]:
    leaves: list[Leaf] = []
    while True:
        page = await client.log.ListEntries(ListEntriesRequest(start_index=len(leaves), page_size=page_size))
        leaves += page.leaves
        assert page.next_index == len(leaves)
        if not page.leaves:
            return leaves


async def test_the_first_leaf_says_who_runs_the_arena(arena: RegistryServer) -> None:
    client = await arena.client(Key.generate())
    first = (await all_leaves(client, page_size=10))[0]
    genesis = type_log_pb2.LogEntry.FromString(first.entry).genesis
    assert genesis.origin == ORIGIN
    assert genesis.log_key == arena.registry.log_key
    assert genesis.selector_key == SELECTOR_KEY
    assert list(genesis.operators) == [f"participants/{arena.operator.id}"]


@pytest.mark.parametrize(
    ("origin", "key", "why"),
    [(ORIGIN, Key.generate(), "LOG_OF_ANOTHER_KEY"), ("elsewhere.arena", None, "LOG_OF_ANOTHER_ORIGIN")],
)
async def test_a_registry_does_not_go_on_with_a_log_that_it_cannot_sign_for(
    arena: RegistryServer, origin: str, key: Key | None, why: str
) -> None:
    own = Key.load(arena.folder / "state" / "log.pem")
    size = await arena.registry.store.read(lambda tx: tx.log_size())
    again = RecordLog(arena.registry.store, FakeSelection(arena.clock), arena.clock, origin=origin, key=key or own)
    with pytest.raises(FailedPrecondition) as refusal:
        await again.begin(operators=())
    assert refusal.value.reason == why
    assert await arena.registry.store.read(lambda tx: tx.log_size()) == size
    await arena.restart()


async def test_a_leaf_that_is_no_entry_is_named_in_one_line(arena: RegistryServer, tmp_path: Path) -> None:
    with closing(sqlite3.connect(arena.folder / "state" / "registry.db")) as database, database:
        database.execute("UPDATE log_leaves SET entry = x'ff'")
    key = tmp_path / "me.pem"
    Key.generate().save(key)
    arguments = ["log", "entries", "--key", str(key), "--origin", ORIGIN, "--registry", arena.server.address]
    result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    assert (result.exit_code, result.stderr) == (1, "error: leaf 0 is not a LogEntry\n")


async def test_the_age_of_the_newest_checkpoint_is_told_where_nobody_has_asked_for_one(
    arena: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "collecting", True)
    (told,) = (each for each in metrics.declared() if each.name == "tiltyard.log.checkpoint.time")
    assert isinstance(told, metrics.Gauge)
    await arena.registry.log.begin(operators=())
    began = told.values()[()]
    assert began == arena.clock.now.timestamp()
    arena.clock.advance(seconds=3600)
    await (await arena.client(Key.generate())).log.GetCheckpoint(GetCheckpointRequest())
    assert told.values()[()] - began == 3600


async def test_the_root_follows_from_the_leaves_and_the_note_is_signed(arena: RegistryServer) -> None:
    for number in range(12):
        await arena.participant(f"number {number}")
    client = await arena.client(Key.generate())
    checkpoint = (await client.log.GetCheckpoint(GetCheckpointRequest())).checkpoint
    leaves = await all_leaves(client, page_size=5)
    assert [leaf.index for leaf in leaves] == list(range(13))
    assert checkpoint.size == 13
    assert checkpoint.root_hash == root_hash([leaf_hash(leaf.entry) for leaf in leaves])
    body = verify_note(checkpoint.note, name=ORIGIN, public_key=arena.registry.log_key)
    assert parse_checkpoint(body) == Checkpoint(ORIGIN, 13, checkpoint.root_hash)


async def test_proofs_verify_between_checkpoints(arena: RegistryServer) -> None:
    client = await arena.participant()
    old = (await client.log.GetCheckpoint(GetCheckpointRequest())).checkpoint
    for number in range(9):
        await arena.participant(f"number {number}")
    new = (await client.log.GetCheckpoint(GetCheckpointRequest())).checkpoint
    for index in range(new.size):
        proof = await client.log.GetInclusionProof(GetInclusionProofRequest(index=index))
        assert verify_inclusion(
            leaf=proof.leaf_hash, index=index, size=proof.tree_size, path=proof.path, root=new.root_hash
        )
    proof = await client.log.GetInclusionProof(GetInclusionProofRequest(index=1, tree_size=old.size))
    assert verify_inclusion(leaf=proof.leaf_hash, index=1, size=old.size, path=proof.path, root=old.root_hash)
    grown = await client.log.GetConsistencyProof(GetConsistencyProofRequest(old_size=old.size))
    assert verify_consistency(
        old_size=old.size,
        new_size=grown.new_size,
        path=grown.path,
        old_root=old.root_hash,
        new_root=new.root_hash,
    )


async def test_what_lies_beyond_the_log_is_out_of_range(arena: RegistryServer) -> None:
    client = await arena.client(Key.generate())
    assert not (await client.log.ListEntries(ListEntriesRequest(start_index=1))).leaves
    with refused(OUT_OF_RANGE):
        await client.log.ListEntries(ListEntriesRequest(start_index=2))
    with refused(OUT_OF_RANGE):
        await client.log.GetInclusionProof(GetInclusionProofRequest(index=1))
    with refused(OUT_OF_RANGE):
        await client.log.GetInclusionProof(GetInclusionProofRequest(index=0, tree_size=9))
    with refused(OUT_OF_RANGE):
        await client.log.GetConsistencyProof(GetConsistencyProofRequest(old_size=2, new_size=1))
    with refused(INVALID, field="start_index"):
        await client.log.ListEntries(ListEntriesRequest(start_index=-1))
    with refused(INVALID, field="tree_size"):
        await client.log.GetInclusionProof(GetInclusionProofRequest(tree_size=-1))


async def test_a_restart_goes_on_with_the_same_tree_and_key(arena: RegistryServer) -> None:
    key = (await arena.participant("before")).key
    before = (await (await arena.client(key)).log.GetCheckpoint(GetCheckpointRequest())).checkpoint
    await arena.restart()
    client = await arena.participant("after", key=key)
    assert arena.registry.log_key
    after = (await client.log.GetCheckpoint(GetCheckpointRequest())).checkpoint
    assert after.size == before.size + 1
    verify_note(after.note, name=ORIGIN, public_key=arena.registry.log_key)
    proof = await client.log.GetConsistencyProof(GetConsistencyProofRequest(old_size=before.size))
    assert verify_consistency(
        old_size=before.size,
        new_size=after.size,
        path=proof.path,
        old_root=before.root_hash,
        new_root=after.root_hash,
    )


async def test_the_selectors_events_become_leaves_once(arena: RegistryServer) -> None:
    for kind in range(1, 4):
        arena.selection.record(kind, task="t")
    await arena.registry.referee.turn()
    await arena.restart()
    await arena.registry.referee.turn()
    sequences = [e.ledger_event.sequence for e in await arena.entries() if e.WhichOneof("entry") == "ledger_event"]
    assert sequences == [1, 2, 3]
