"""Two evaluations of the same rows are compared by hashes under one root, down to the row."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltyard import predictions
from tiltyard.predictions import Difference, RowRange
from tiltyard.transparency import root_hash


def run_of(rows: int, seed: int = 0, classes: int = 10) -> bytes:
    return np.random.default_rng(seed).integers(0, classes, rows).astype("<i4").tobytes()


def changed(run: bytes, **rows: int) -> bytes:
    values = np.frombuffer(run, "<i4").copy()
    for row, value in rows.items():
        values[int(row[1:])] = value
    return values.tobytes()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.integers(0, 5))
def test_the_nodes_of_every_level_have_the_root_of_the_leaves(leaves: int, level: int) -> None:
    hashes = [hashlib.sha256(bytes([index % 256, index // 256])).digest() for index in range(leaves)]
    run = 1 << level
    nodes = [root_hash(hashes[start : start + run]) for start in range(0, leaves, run)]
    assert predictions.prediction_root(nodes) == predictions.prediction_root(hashes) == root_hash(hashes)


@pytest.mark.parametrize(
    ("rows", "level", "rows_per_hash"),
    [(1, 0, 256), (256 * 65_536, 0, 256), (256 * 65_536 + 1, 1, 512), (10**9, 6, 256 * 64)],
)
def test_what_is_handed_in_has_65536_hashes_at_most(rows: int, level: int, rows_per_hash: int) -> None:
    blocks = predictions.block_count(rows)
    assert predictions.level_of(blocks) == level
    assert predictions.rows_per_hash(blocks) == rows_per_hash
    assert -(-rows // rows_per_hash) <= predictions.MAX_HASHES


def test_a_large_datasets_hashes_are_those_of_a_higher_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "MAX_HASHES", 4)
    left = run_of(256 * 9 + 5)
    right = changed(left, r2000=11)
    hashes = predictions.block_hashes(left)
    handed = predictions.handed_in(hashes)
    assert len(handed) == 3 * 32
    root = predictions.prediction_root(hashes)
    assert predictions.check_handed_in(handed, root=root, blocks=10) == ""
    other = predictions.handed_in(predictions.block_hashes(right))
    assert predictions.differing_rows(handed, other, rows=256 * 9 + 5) == [RowRange(1024, 2048)]


def test_hashes_that_are_not_those_of_the_root_are_told() -> None:
    hashes = predictions.block_hashes(run_of(1000))
    root = predictions.prediction_root(hashes)
    handed = predictions.handed_in(hashes)
    assert predictions.check_handed_in(handed, root=root, blocks=4) == ""
    assert "root" in predictions.check_handed_in(handed[32:] + handed[:32], root=root, blocks=4)
    assert "4 hashes" in predictions.check_handed_in(handed[32:], root=root, blocks=4)
    assert "5 hashes" in predictions.check_handed_in(handed, root=root, blocks=5)


def test_blocks_that_differ_are_named_by_their_rows() -> None:
    left = run_of(1000)
    right = changed(left, r0=99, r300=99, r999=99)
    handed = [predictions.handed_in(predictions.block_hashes(run)) for run in (left, right)]
    assert predictions.differing_rows(*handed, rows=1000) == [RowRange(0, 512), RowRange(768, 1000)]
    assert predictions.differing_rows(handed[0], handed[0], rows=1000) == []
    with pytest.raises(ValueError, match="not two evaluations"):
        predictions.differing_rows(handed[0], handed[1][32:], rows=1000)


def test_rows_that_differ_are_named_where_both_runs_are_at_hand() -> None:
    left = run_of(1000)
    right = changed(left, r3=99, r700=98)
    values = np.frombuffer(left, "<i4")
    expected = [Difference(3, int(values[3]), 99), Difference(700, int(values[700]), 98)]
    assert predictions.differing_predictions(left, right) == expected


@pytest.mark.parametrize("changes", [{"r7": 4}, {"r0": 1, "r39": 2}])
def test_a_block_at_hand_and_the_others_hash_are_enough_to_name_a_few_rows(changes: dict[str, int]) -> None:
    known = np.zeros(40, "<i4").tobytes()
    wanted = predictions.block_hash(changed(known, **changes))
    found = predictions.search_block(known, wanted, first_row=512, outputs=5, most=100_000)
    assert found == [Difference(512 + int(row[1:]), 0, value) for row, value in changes.items()]
    assert predictions.search_block(known, wanted, first_row=512, outputs=5, most=3) is None
