"""The sum trees of open pools, kept in memory for speed; the database is the truth, a root shows which one fits."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from services.selector.records import LeafChange, Policy, Pool
from services.selector.transaction import Transaction
from tiltyard.sortition import SumTree, weight

REMEMBERED_POOLS = 256


class PoolTrees:
    """Trees by task. For use within writes alone, which run one after the other.

    A tree may be ahead of the database after a write that failed, or behind it. So whatever is remembered must come to
    the root that the pool's row names, else it is built again.
    """

    def __init__(self) -> None:
        self._trees: OrderedDict[str, tuple[int, SumTree]] = OrderedDict()

    def current(self, transaction: Transaction, pool: Pool) -> SumTree:
        """The tree of the pool as it is now."""
        known = self._trees.pop(pool.task, None)
        if known is not None and known[0] <= pool.version:
            version, tree = known
            if version < pool.version:
                _apply(tree, transaction.leaf_changes(pool.task, after=version, upto=pool.version))
            if tree.root() == pool.root:
                return self._remember(pool, tree)
        return self._remember(pool, at_version(transaction, pool.task, pool.version))

    def change_leaf(self, transaction: Transaction, pool: Pool, owner_group: str, stake_delta_micros: int) -> Pool:
        """Adds to the stake of a group, whose leaf is appended when it has none. Returns the pool's next version."""
        tree = self.current(transaction, pool) if pool.version else self._remember(pool, SumTree())
        leaf = transaction.leaf(pool.task, owner_group)
        stake = stake_delta_micros + (leaf.stake_micros if leaf else 0)
        leaf_weight = policy_weight(pool.policy, stake)
        index = leaf.index if leaf else pool.leaf_count
        version = pool.version + 1
        transaction.put_leaf(pool.task, LeafChange(index, version, owner_group, stake, leaf_weight))
        if leaf:
            tree.set_weight(index, leaf_weight)
        else:
            tree.append(owner_group, leaf_weight)
        changed = replace(pool, version=version, leaf_count=len(tree), root=tree.root())
        transaction.put_pool(changed)
        self._remember(changed, tree)
        return changed

    def forget(self, task: str) -> None:
        """Lets go of a tree that is not needed any more."""
        self._trees.pop(task, None)

    def _remember(self, pool: Pool, tree: SumTree) -> SumTree:
        self._trees[pool.task] = (pool.version, tree)
        self._trees.move_to_end(pool.task)
        if len(self._trees) > REMEMBERED_POOLS:
            self._trees.popitem(last=False)
        return tree


class PoolWeights:
    """The weights of pools without ids and hashes, for estimates. Not for use by two threads at once.

    What is read from the database is committed, so a version has one meaning here. A reader whose snapshot is older
    than the remembered tree gets the newer one.
    """

    def __init__(self) -> None:
        self._trees: OrderedDict[str, tuple[int, SumTree]] = OrderedDict()

    def current(self, transaction: Transaction, pool: Pool) -> SumTree:
        """The tree of the pool as it is now."""
        version, tree = self._trees.pop(pool.task, (0, SumTree()))
        if version < pool.version:
            changes = transaction.leaf_changes(pool.task, after=version, upto=pool.version)
            nameless = (replace(change, owner_group="") for change in changes)
            if version:
                _apply(tree, nameless)
            else:
                tree = _built(nameless)
            version = pool.version
        self._trees[pool.task] = (version, tree)
        if len(self._trees) > REMEMBERED_POOLS:
            self._trees.popitem(last=False)
        return tree


def at_version(transaction: Transaction, task: str, version: int) -> SumTree:
    """Builds the tree of a pool as it was at a version."""
    return _built(transaction.leaf_changes(task, after=0, upto=version))


def _built(changes: Iterable[LeafChange]) -> SumTree:
    """The tree that comes of all changes of a pool; built at once it takes a fraction of the time."""
    groups: list[str] = []
    weights: list[int] = []
    for change in changes:
        if change.index == len(groups):
            groups.append(change.owner_group)
            weights.append(change.weight)
        else:
            weights[change.index] = change.weight
    return SumTree(zip(groups, weights, strict=True))


def policy_weight(policy: Policy, stake_micros: int) -> int:
    """The weight of a stake under a policy."""
    return weight(stake_micros, minimum_micros=policy.validator_min_stake_micros, curve=policy.curve)


def _apply(tree: SumTree, changes: Iterable[LeafChange]) -> None:
    for change in changes:
        if change.index < len(tree):
            tree.set_weight(change.index, change.weight)
        else:
            tree.append(change.owner_group, change.weight)
