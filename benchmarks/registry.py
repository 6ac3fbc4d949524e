"""The registry: durable commits and reads over gRPC, and its record log at a thousand and at a million leaves."""

import asyncio
import random
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import _commits
from services.registry import migrations
from services.registry.changes import ChangeBoard
from services.registry.entries import ParticipantRegistered
from services.registry.record_log import read_nodes
from services.registry.records import Participant
from services.registry.rows import COUNTERS_ID
from services.registry.store import SqlStore
from services.registry.transaction import Reading, Writing
from services.runtime.auth import utc_now
from services.runtime.database import Database
from services.runtime.engines import migrate
from tiltyard.transparency import Frontier, inclusion_proof, leaf_hash

_SMALL, _LARGE = 1_000, 1_000_000
_PROOFS = 300
_WRITES = 400
_ENTRY_BYTES = 200


@dataclass(frozen=True)
class _Costs:
    start_s: float
    proof_s: float
    write_s: float


def run() -> list[dict[str, Any]]:
    """All lines."""
    with tempfile.TemporaryDirectory() as folder:
        small, large = asyncio.run(_measure(Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        calls = asyncio.run(_commits.measure(Path(folder)))
    return [
        *calls,
        _line("start-up with 1,000,000 leaves", large.start_s, "s", "its limit", 5.0, at_most=1.0),
        _line("inclusion proof from 1,000,000 leaves", large.proof_s * 1e3, "ms", "its limit", 2.0, at_most=1.0),
        _line(
            "durable write with a leaf, at 1,000,000 leaves",
            large.write_s * 1e3,
            "ms",
            "at 1,000 leaves",
            small.write_s * 1e3,
            at_most=1.3,
        ),
    ]


def _line(name: str, ours: float, unit: str, against: str, theirs: float, *, at_most: float) -> dict[str, Any]:
    """A line whose goal is a ratio of theirs over ours, as everywhere: higher is better."""
    return {
        "name": name,
        "ours": round(ours, 4),
        "unit": unit,
        "against": against,
        "theirs": round(theirs, 4),
        "ratio": round(theirs / ours, 3),
        "goal": round(1 / at_most, 3),
    }


async def _measure(folder: Path) -> tuple[_Costs, _Costs]:
    opened = [await _open(folder / f"{size}.db", size) for size in (_SMALL, _LARGE)]
    try:
        proofs = [await _proof_s(store, size) for (_, store, _), size in zip(opened, (_SMALL, _LARGE), strict=True)]
        # In turns: whatever else the disk does then falls on both.
        spans: tuple[list[float], list[float]] = ([], [])
        for number in range(_WRITES):
            for (_, store, _), mine in zip(opened, spans, strict=True):
                mine.append(await _write_s(store, number))
        small, large = (
            _Costs(start_s, proof_s, median(mine))
            for (_, _, start_s), proof_s, mine in zip(opened, proofs, spans, strict=True)
        )
        return small, large
    finally:
        for database, _, _ in opened:
            await database.close()


async def _open(path: Path, size: int) -> tuple[Database, SqlStore, float]:
    """A database with so many leaves, and the seconds that its start took."""
    url = f"sqlite:///{path}"
    migrate(url, migrations)
    _fill(path, size)
    begin = time.perf_counter()
    database = Database.open(url, migrations=migrations)
    store = SqlStore(database, ChangeBoard(), utc_now)
    found, _ = await store.read(lambda tx: tx.log_root())
    start_s = time.perf_counter() - begin
    if found != size:
        raise RuntimeError(f"the log has {found} leaves")
    return database, store, start_s


async def _proof_s(store: SqlStore, size: int) -> float:
    chosen = random.Random(0)

    def prove(tx: Reading) -> list[float]:
        spans = []
        for _ in range(_PROOFS):
            index = chosen.randrange(size)
            begin = time.perf_counter()
            read_nodes(tx, lambda node, index=index: inclusion_proof(index, size, node))  # type: ignore[misc]
            spans.append(time.perf_counter() - begin)
        return spans

    return median(await store.read(prove))


async def _write_s(store: SqlStore, number: int) -> float:
    begin = time.perf_counter()
    await store.write(lambda tx: _register(tx, number))
    return time.perf_counter() - begin


def _register(tx: Writing, number: int) -> None:
    name = f"{number:040x}"
    tx.put_participant(Participant(name, "somebody", bytes(32), None, tx.now))
    tx.append(ParticipantRegistered(name, bytes(32), "somebody"))


def _fill(path: Path, size: int) -> None:
    """Writes leaves and nodes as the registry would, all in one transaction."""
    frontier = Frontier()
    nodes: list[tuple[int, int, bytes]] = []

    def leaves() -> Iterator[tuple[int, bytes, bytes]]:
        for index in range(size):
            entry = index.to_bytes(8, "big") + bytes(_ENTRY_BYTES - 8)
            value = leaf_hash(entry)
            nodes.extend((level, place, node) for (level, place), node in frontier.append(value)[1:])
            yield index, value, entry

    with closing(sqlite3.connect(path)) as database, database:
        database.executemany('INSERT INTO log_leaves ("index", hash, entry) VALUES (?, ?, ?)', leaves())
        database.executemany('INSERT INTO log_nodes (level, "index", hash) VALUES (?, ?, ?)', nodes)
        database.execute(
            "INSERT INTO counters (id, log_size, log_frontier, ledger_position, assignment_sequence)"
            " VALUES (?, ?, ?, 0, 0)",
            (COUNTERS_ID, size, b"".join(frontier.hashes)),
        )
