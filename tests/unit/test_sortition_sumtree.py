"""The Merkle sum tree: it grows and changes like one built at once, and its roots and proofs hold."""

import hashlib
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltyard.sumtree import SUM_LIMIT, Remaining, SumTree, leaf_hash, node_hash, prove_place, root_hash

_WEIGHTS = st.lists(st.integers(0, 2**100), max_size=40)


def test_the_root_of_three_leaves_written_out() -> None:
    tree = SumTree([("a", 1), ("b", 2), ("c", 3)])
    left = node_hash(leaf_hash("a", 1), 1, leaf_hash("b", 2), 2)
    right = node_hash(leaf_hash("c", 3), 3, bytes(32), 0)
    top = node_hash(left, 3, right, 3)
    assert tree.root() == root_hash(3, top, 6)
    six = (6).to_bytes(16, "big")
    assert tree.root() == hashlib.sha256(b"\x02" + (3).to_bytes(8, "big") + top + six).digest()


@given(weights=_WEIGHTS, hashed_from=st.integers(0, 40))
def test_a_tree_that_grew_is_the_tree_built_at_once(weights: list[int], hashed_from: int) -> None:
    grown = SumTree()
    for index, weight in enumerate(weights):
        if index == hashed_from:
            grown.root()
        assert grown.append(str(index), 0) == index
        grown.set_weight(index, weight)
    built = SumTree((str(index), weight) for index, weight in enumerate(weights))
    assert (grown.root(), grown.total, len(grown)) == (built.root(), sum(weights), len(weights))


@given(weights=_WEIGHTS.filter(any), data=st.data())
def test_what_is_taken_out_agrees_with_running_sums(weights: list[int], data: st.DataObject) -> None:
    tree = SumTree((str(index), weight) for index, weight in enumerate(weights))
    remaining, left = Remaining(tree), dict(enumerate(weights))
    while remaining.total:
        value = data.draw(st.integers(0, remaining.total - 1))
        running = zip(left, accumulate(left.values()), strict=True)
        index = next(leaf for leaf, upto in running if value < upto)
        if data.draw(st.booleans()):
            assert remaining.pop(value) == index
        else:
            remaining.take(index)
        del left[index]
    assert tree.total == sum(weights)
    with pytest.raises(ValueError, match="not below"):
        remaining.pop(0)


@given(weights=_WEIGHTS.filter(bool))
def test_every_leaf_can_be_proved_at_its_place(weights: list[int]) -> None:
    tree = SumTree((str(index), weight) for index, weight in enumerate(weights))
    for index, weight in enumerate(weights):
        before = prove_place(
            str(index),
            weight,
            tree.path(index),
            index=index,
            root=tree.root(),
            leaf_count=len(tree),
            total=tree.total,
        )
        assert before == sum(weights[:index])


@pytest.mark.parametrize("scale", [1, 2**60])
def test_a_long_order_is_drawn_as_from_a_list(scale: int) -> None:
    """More places than are skipped one by one, with sums in machine words and beyond them."""
    weights = [scale * (1 + index % 7) for index in range(600)]
    remaining = Remaining(SumTree((str(index), weight) for index, weight in enumerate(weights)))
    left = dict(enumerate(weights))
    for turn in range(600):
        value = (turn * 7919 * scale) % remaining.total
        running = zip(left, accumulate(left.values()), strict=True)
        index = next(leaf for leaf, upto in running if value < upto)
        assert remaining.pop(value) == index
        del left[index]
        assert remaining.total == sum(left.values())


def test_different_trees_have_different_roots() -> None:
    trees = [
        SumTree(),
        SumTree([("a", 1)]),
        SumTree([("a", 1), ("b", 0)]),
        SumTree([("b", 0), ("a", 1)]),
        SumTree([("a", 0), ("b", 1)]),
        SumTree([("a", 1), ("b", 0), ("c", 0)]),
    ]
    assert len({tree.root() for tree in trees}) == len(trees)


def test_sums_are_checked() -> None:
    tree = SumTree([("a", SUM_LIMIT - 2)])
    root = tree.root()
    with pytest.raises(OverflowError):
        tree.append("b", 2)
    with pytest.raises(OverflowError):
        tree.set_weight(0, SUM_LIMIT)
    with pytest.raises(OverflowError):
        tree.set_weight(0, -1)
    with pytest.raises(OverflowError):
        SumTree([("a", SUM_LIMIT - 1), ("b", 1)])
    assert (tree.root(), len(tree)) == (root, 1)
    with pytest.raises(IndexError):
        tree.weight(1)
