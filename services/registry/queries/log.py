"""Questions about the record log and what else grows."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cache

from sqlalchemy import TextClause, select, text

from services.registry.convert.times import moment_of
from services.registry.entries import Genesis
from services.registry.leaves import genesis_of
from services.registry.queries.asking import Asking
from services.registry.rows import COUNTERS, COUNTERS_ID, LEAVES, Counters
from services.registry.staging import frontier_of
from services.registry.transaction import Leaf
from tiltyard.transparency import Frontier, Node

_L = LEAVES.c


@cache
def _node_hashes(count: int) -> TextClause:
    """The question for so many nodes: SQLite looks up each, where for a list of pairs it would read the whole table."""
    any_of = " OR ".join(f'(level = :l{place} AND "index" = :i{place})' for place in range(count))
    return text(f'SELECT level, "index", hash FROM log_nodes WHERE {any_of}')  # noqa: S608 - placeholders alone


class LogQuestions(Asking):
    """The part of `transaction.Reading` that is about the record log."""

    def assignment_sequence(self) -> int:
        return self._counters().assignment_sequence

    def ledger_position(self) -> int:
        return self._counters().ledger_position

    def ledger_digest(self) -> bytes | None:
        return self._counters().ledger_digest

    def alive_time(self) -> datetime | None:
        alive = self._counters().alive_time
        return None if alive is None else moment_of(alive)

    def log_size(self) -> int:
        return self._frontier().size

    def genesis(self) -> Genesis | None:
        first = self.leaves(start=0, limit=1)
        return genesis_of(first[0].entry) if first else None

    def log_root(self) -> tuple[int, bytes]:
        frontier = self._frontier()
        return frontier.size, frontier.root()

    def leaves(self, *, start: int, limit: int) -> Sequence[Leaf]:
        return self._records(LEAVES, LEAVES.query().where(_L.index >= start).order_by(_L.index).limit(limit))

    def log_nodes(self, nodes: Collection[Node]) -> Mapping[Node, bytes]:
        leaves = [index for level, index in nodes if level == 0]
        above = [node for node in nodes if node[0]]
        found: dict[Node, bytes] = {}
        if leaves:
            for index, value in self._ask(select(_L.index, _L.hash).where(_L.index.in_(leaves))):
                found[0, index] = value
        if above:
            wanted = {
                f"{name}{place}": n for place, node in enumerate(above) for name, n in zip("li", node, strict=True)
            }
            for level, index, value in self._ask(_node_hashes(len(above)).bindparams(**wanted)):
                found[level, index] = value
        for level, index in nodes:
            if (level, index) not in found:
                raise LookupError(f"the log has no complete subtree {index} at level {level}")
        return found

    def _counters(self) -> Counters:
        return self._load(COUNTERS, COUNTERS_ID) or Counters()

    def _frontier(self) -> Frontier:
        return frontier_of(self._counters())
