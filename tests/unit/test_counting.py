"""Counting gives the same integers as a plain loop, however the rows are cut into batches."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiltyard.counting import AMBIGUITY, BLOCK_ROWS, Counts, Metric, NanOutput, Tally
from tiltyard.predictions import block_hashes


def naive(logits, labels, top_k=1):
    correct = ambiguous = 0
    loss = 0.0
    predictions = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))
        predictions.append(order[0])
        correct += label in order[:top_k]
        if len(row) > 1:
            gap = row[order[top_k - 1]] - row[order[top_k]] if top_k < len(row) else math.inf
            ambiguous += gap <= AMBIGUITY * max(abs(value) for value in row)
        top = max(row)
        loss += math.log(sum(math.exp(value - top) for value in row)) + top - row[label]
    raw = np.array(predictions, dtype="<i4").tobytes()
    blocks = tuple(
        hashlib.sha256(b"\0" + raw[start : start + 4 * BLOCK_ROWS]).digest()
        for start in range(0, len(raw), 4 * BLOCK_ROWS)
    )
    return Counts(correct, len(labels), ambiguous, round(loss * 1e6)), blocks


def tallied(logits, labels, cuts=(), top_k=1):
    tally = Tally(Metric.TOP_K_ACCURACY if top_k > 1 else Metric.ACCURACY, top_k=top_k)
    edges = [0, *cuts, len(labels)]
    for start, end in itertools.pairwise(edges):
        tally.add(logits[start:end], labels[start:end])
    return tally.counts(), tally.prediction_blocks()


def random_rows(rows, outputs, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, outputs)).astype(np.float32), rng.integers(0, outputs, rows)


@pytest.mark.parametrize(("rows", "outputs"), [(1, 2), (255, 3), (256, 10), (1000, 10), (5, 1), (300, 1000)])
def test_counts_like_a_plain_loop(rows, outputs):
    logits, labels = random_rows(rows, outputs)
    counts, blocks = tallied(logits, labels)
    expected, expected_blocks = naive(logits, labels)
    assert blocks == expected_blocks
    assert (counts.correct, counts.total, counts.ambiguous) == (expected.correct, expected.total, expected.ambiguous)
    assert counts.loss_sum_micros == pytest.approx(expected.loss_sum_micros, abs=2)


# Few distinct values make ties, which is where counting can go wrong.
tied_logits = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 600), st.integers(1, 5)),
    elements=st.sampled_from([0.0, -0.0, 1.0, 0.99995, 0.9998, -1.0, 3e38, -3e38, 1e-40]),
)


@settings(max_examples=60, deadline=None)
@given(tied_logits, st.data())
def test_ties_and_cuts_change_nothing(logits, data):
    rows, outputs = logits.shape
    labels = np.array(data.draw(st.lists(st.integers(0, outputs - 1), min_size=rows, max_size=rows)), dtype=np.int64)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=4)))
    top_k = data.draw(st.integers(1, outputs))
    counts, blocks = tallied(logits, labels, cuts, top_k)
    expected, expected_blocks = naive(logits, labels, top_k)
    assert blocks == expected_blocks
    assert (counts.correct, counts.total, counts.ambiguous) == (expected.correct, expected.total, expected.ambiguous)


def test_the_lowest_index_wins_a_tie():
    counts, blocks = tallied(np.array([[1, 1, 0], [0, 1, 1]], dtype=np.float32), np.array([0, 2]))
    assert (counts.correct, counts.ambiguous) == (1, 2)
    assert blocks == (hashlib.sha256(b"\0" + np.array([0, 1], dtype="<i4").tobytes()).digest(),)


@pytest.mark.parametrize(
    ("row", "ambiguous"),
    [
        ([1.0, 0.99991], 1),
        ([1.0, 0.9998], 0),
        # The largest magnitude may be that of a negative output.
        ([1.0, 0.9998, -2.0], 1),
        ([0.0, 0.0], 1),
        ([5.0], 0),
    ],
)
def test_ambiguous_is_relative_to_the_largest_magnitude(row, ambiguous):
    counts, _ = tallied(np.array([row], dtype=np.float32), np.array([0]))
    assert counts.ambiguous == ambiguous


def test_blocks_run_on_across_batches():
    logits, labels = random_rows(3 * BLOCK_ROWS + 7, 4)
    whole = tallied(logits, labels)[1]
    assert len(whole) == 4
    assert tallied(logits, labels, cuts=(1, 300, 511, 512, 700))[1] == whole


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_row_is_named_and_nothing_of_its_batch_is_counted(bad):
    logits, labels = random_rows(20, 3)
    tally = Tally()
    tally.add(logits[:10], labels[:10])
    logits[15, 2] = logits[17, 0] = bad
    with pytest.raises(NanOutput) as caught:
        tally.add(logits[10:], labels[10:])
    assert caught.value.row == 15
    assert tally.counts().total == 10


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_output_is_refused(label):
    with pytest.raises(ValueError, match="outside 0 to 2"):
        Tally().add(np.zeros((1, 3), dtype=np.float32), np.array([label]))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Tally().add(np.zeros((2, 3), dtype=np.float32), np.array([0]))
    with pytest.raises(ValueError, match="top_k"):
        Tally(Metric.ACCURACY, top_k=2)


def test_an_empty_tally_has_no_blocks():
    tally = Tally()
    tally.add(np.zeros((0, 3), dtype=np.float32), np.zeros(0, dtype=np.int64))
    assert tally.counts() == Counts(0, 0, 0, 0)
    assert tally.prediction_blocks() == ()


def test_read_only_rows_are_counted_and_left_alone():
    raw = np.array([[1, 2], [3, 1]], dtype=np.float32).tobytes()
    logits = np.frombuffer(raw, dtype=np.float32).reshape(2, 2)
    assert tallied(logits, np.array([1, 0]))[0].correct == 2
    assert logits.tobytes() == raw


def naive_within(outputs, targets, bound):
    ambiguous = 0
    right = []
    for row, target in zip(outputs.tolist(), targets.reshape(outputs.shape).tolist(), strict=True):
        furthest = max(abs(value - wanted) for value, wanted in zip(row, target, strict=True))
        right.append(int(furthest <= bound))
        ambiguous += abs(furthest - bound) <= AMBIGUITY * max(abs(value) for value in row)
    return sum(right), ambiguous, np.array(right, dtype="<i4").tobytes()


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 600), st.integers(1, 3)),
        elements=st.sampled_from([0.0, 1.0, 1.5, 0.99999, 1.00001, -2.0, 3e38, 1e-40]),
    ),
    st.sampled_from([0.5, 1.0, 1e-9, 2.5]),
    st.integers(0, 600),
)
def test_regressions_are_counted_like_a_plain_loop(outputs, bound, cut):
    targets = np.roll(outputs, 1, axis=0)
    tally = Tally(Metric.WITHIN_BOUND, bound=bound)
    for start, stop in ((0, min(cut, len(outputs))), (min(cut, len(outputs)), len(outputs))):
        tally.add(outputs[start:stop], targets[start:stop])
    correct, ambiguous, raw = naive_within(outputs, targets, bound)
    counts = tally.counts()
    assert (counts.correct, counts.total, counts.ambiguous) == (correct, len(outputs), ambiguous)
    assert list(tally.prediction_blocks()) == block_hashes(raw)


def test_one_target_a_row_may_be_flat_and_the_bound_is_within():
    tally = Tally(Metric.WITHIN_BOUND, bound=0.5)
    tally.add(np.array([[1.0], [2.0], [4.0]], dtype=np.float32), np.array([1.5, 2.0, 4.75], dtype=np.float32))
    assert (tally.counts().correct, tally.counts().ambiguous) == (2, 1)
    assert tally.counts().loss_sum_micros == 250_000 + 562_500


def test_a_regressions_first_bad_row_is_named():
    outputs = np.zeros((6, 2), dtype=np.float32)
    outputs[4, 1] = math.nan
    with pytest.raises(NanOutput) as caught:
        Tally(Metric.WITHIN_BOUND, bound=1.0).add(outputs, np.zeros((6, 2), dtype=np.float32))
    assert caught.value.row == 4


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_is_a_number_above_0(bound):
    with pytest.raises(ValueError, match="bound"):
        Tally(Metric.WITHIN_BOUND, bound=bound)


def test_labels_of_the_other_kind_are_refused():
    rows = np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(ValueError, match="no classes"):
        Tally().add(rows, np.zeros(2, dtype=np.float32))
    with pytest.raises(ValueError, match="do not fit"):
        Tally(Metric.WITHIN_BOUND, bound=1.0).add(rows, np.zeros(2, dtype=np.float32))
    with pytest.raises(ValueError, match="do not fit"):
        Tally(Metric.WITHIN_BOUND, bound=1.0).add(rows, np.zeros((2, 3), dtype=np.int64))


def test_a_loss_beyond_all_bounds_still_fits_its_field():
    tally = Tally(Metric.WITHIN_BOUND, bound=1.0)
    tally.add(np.full((2, 1), 3e38, dtype=np.float32), np.zeros((2, 1), dtype=np.float32))
    assert tally.counts().loss_sum_micros == (1 << 63) - 1
