"""What the works of one commit have read and put off: rows are written a group at a time, or before a list is read."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from services.registry.rows import COUNTERS, COUNTERS_ID, LEAVES, NODES, Counters, LogNode, RowsOf
from services.registry.transaction import Leaf
from services.runtime.engines import found_rows, placeholder, run_many
from services.runtime.writer import Group
from tiltyard.transparency import HASH_BYTES, Frontier

R = TypeVar("R")
Key = tuple[Any, ...]

_TOUCH = "UPDATE rounds SET touched = {0} WHERE task = {0} AND number = {0} AND round = {0}"
_UNKNOWN = object()


@dataclass
class _Layer:
    """Either of one work, or of all that have ended well."""

    known: dict[tuple[RowsOf[Any], Key], Any] = field(default_factory=dict)
    """Records that were read or put; None for what is not there."""
    put: dict[RowsOf[Any], dict[Key, Sequence[Any] | None]] = field(default_factory=dict)
    """To be written, by key: the columns' values; None for a row to be deleted."""
    added: dict[RowsOf[Any], list[Sequence[Any]]] = field(default_factory=dict)
    touched: dict[Key, int] = field(default_factory=dict)
    frontier: Frontier | None = None

    @property
    def is_written(self) -> bool:
        return not (self.put or self.added or self.touched)

    def take(self, later: "_Layer") -> None:
        """All of a later layer."""
        self.known |= later.known
        for kind, rows in later.put.items():
            self.put.setdefault(kind, {}).update(rows)
        for kind, more in later.added.items():
            self.added.setdefault(kind, []).extend(more)
        self.touched |= later.touched
        self.frontier = later.frontier or self.frontier


class RowStaging:
    """A `runtime.writer.Staging` of the registry's rows.

    A work sees its own puts and those of the works before it; when it fails, its own are forgotten. Nothing but a
    list that is read makes rows be written before the group's end.
    """

    def __init__(self, group: Group) -> None:
        self.connection = group.connection
        self._group = group
        self._mark = placeholder(group.connection)
        self._kept = _Layer()
        self._own = _Layer()

    def load(self, kind: RowsOf[R], key: Key) -> R | None:
        """The record with this key, as the work sees it."""
        for layer in (self._own, self._kept):
            found = layer.known.get((kind, key), _UNKNOWN)
            if found is not _UNKNOWN:
                return found  # type: ignore[no-any-return]
        rows = found_rows(self.connection, kind.reading(self._mark), key)
        record = kind.record(rows[0]) if rows else None
        self._kept.known[kind, key] = record
        return record

    def put(self, kind: RowsOf[R], record: R, *beside: Any) -> None:
        """Insert or replace by key."""
        key = kind.key_of(record)
        self._own.known[kind, key] = record
        self._own.put.setdefault(kind, {})[key] = kind.values(record, *beside)

    def delete(self, kind: RowsOf[R], key: Key) -> None:
        """Delete by key."""
        self._own.known[kind, key] = None
        self._own.put.setdefault(kind, {})[key] = None

    def add(self, kind: RowsOf[R], record: R, *beside: Any) -> None:
        """Insert behind all others."""
        self._own.added.setdefault(kind, []).append(kind.values(record, *beside))

    def touch(self, round_: Key, sequence: int) -> None:
        """The last change of a round: its task, number and round."""
        self._own.touched[round_] = sequence

    def counters(self) -> Counters:
        """What grows, but for the log, whose frontier is `frontier`."""
        return self.load(COUNTERS, (COUNTERS_ID,)) or Counters()

    def frontier(self) -> Frontier:
        """The log's frontier, the work's own to append to."""
        if self._own.frontier is None:
            kept = self._kept.frontier
            self._own.frontier = frontier_of(self.counters()) if kept is None else Frontier(kept.size, kept.hashes)
        return self._own.frontier

    def append(self, leaf: Leaf) -> None:
        """The next leaf of the log, with the nodes that it completes."""
        self.add(LEAVES, leaf)
        for (level, index), value in self.frontier().append(leaf.hash)[1:]:
            self.add(NODES, LogNode(level, index, value))

    def settle(self) -> None:
        """Write all that was put off, the running work's own rows inside its savepoint."""
        if not self._kept.is_written:
            self._write(self._kept)
        if not self._own.is_written:
            self._group.session.connection()
            self._write(self._own)

    def keep(self) -> None:
        """The work has ended well."""
        self._kept.take(self._own)
        self._own = _Layer()

    def drop(self) -> None:
        """The work has failed."""
        self._own = _Layer()

    def write(self) -> None:
        """At the group's end."""
        frontier = self._kept.frontier
        if frontier is not None:
            grown = replace(self.counters(), log_size=frontier.size, log_frontier=b"".join(frontier.hashes))
            self._kept.put.setdefault(COUNTERS, {})[COUNTERS_ID,] = COUNTERS.values(grown)
        self._write(self._kept)

    def _write(self, layer: _Layer) -> None:
        execute, mark = partial(run_many, self.connection), self._mark
        for kind, rows in layer.put.items():
            written = [row for row in rows.values() if row is not None]
            if written:
                execute(kind.writing(mark), written)
            deleted = [key for key, row in rows.items() if row is None]
            if deleted:
                execute(kind.deleting(mark), deleted)
        for kind, more in layer.added.items():
            execute(kind.writing(mark), more)
        if layer.touched:
            # After the rows of new rounds.
            execute(_TOUCH.format(mark), [(sequence, *round_) for round_, sequence in layer.touched.items()])
        layer.put, layer.added, layer.touched = {}, {}, {}


def frontier_of(counters: Counters) -> Frontier:
    """The log's frontier as it is kept."""
    kept = counters.log_frontier
    return Frontier(counters.log_size, [kept[at : at + HASH_BYTES] for at in range(0, len(kept), HASH_BYTES)])
