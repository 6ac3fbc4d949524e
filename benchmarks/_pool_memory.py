"""`python -m benchmarks._pool_memory LEAVES`: builds a pool as the selector does, prints the process's peak in MB."""

import resource
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import services.selector.bootstrap  # noqa: F401 - all that a selector has loaded counts
from services.selector.pool_trees import PoolTrees, at_version
from services.selector.records import LeafChange, Policy, Pool
from tiltyard.sortition import SQUARE_ROOT


class _Leaves:
    """A transaction that knows the changes of one pool: a group with a stake of its own each."""

    def leaf_changes(self, task: str, *, after: int, upto: int) -> Iterator[LeafChange]:
        for index in range(after, upto):
            yield LeafChange(index, index + 1, f"{index * 2654435761:040x}", 1, 2**32 + index * 4096)


def main(leaves: int) -> None:
    """Builds the tree with its hashes, and checks that it is the one remembered."""
    transaction: Any = _Leaves()
    policy = Policy(SQUARE_ROOT, 1, 1, timedelta(days=1), 100, 10)
    root = at_version(transaction, "t", leaves).root()
    base = Pool("t", policy, datetime(2030, 1, 1, tzinfo=UTC), "c", version=leaves, leaf_count=leaves, root=root)
    assert len(PoolTrees().current(cast(Any, transaction), base)) == leaves
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main(int(sys.argv[1]))
