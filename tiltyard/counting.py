"""Counts what a model got right: exact integers from its outputs, and digests by which two counts can be compared."""

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltyard.predictions import BLOCK_ROWS, PREDICTION_BYTES

__all__ = ["AMBIGUITY", "BLOCK_ROWS", "Counts", "Metric", "NanOutput", "Tally"]

AMBIGUITY = 1e-4
"""Numbers closer than this share of the row's largest output: honest machines may order them differently."""

_MICROS = 1_000_000
_MAX_INT64 = (1 << 63) - 1


class Metric(StrEnum):
    """What counts as right."""

    ACCURACY = "accuracy"
    TOP_K_ACCURACY = "top_k_accuracy"
    WITHIN_BOUND = "within_bound"


class NanOutput(Exception):
    """An output was NaN or infinite; `row` is the first row with one, counted from 0 over all batches."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} has an output that is NaN or infinite")
        self.row = row


@dataclass(frozen=True)
class Counts:
    """The integers of one evaluation, as tiltyard.type.v1.Counts defines them. The loss sum is in millionths."""

    correct: int
    total: int
    ambiguous: int
    loss_sum_micros: int


class Tally:
    """Adds up batches of outputs in row order.

    ACCURACY and TOP_K_ACCURACY: a row is right when its label is among the `top_k` largest outputs (accuracy: 1), the
    lower index going first among equal ones. WITHIN_BOUND: when no output is further than `bound` from its target. The
    result does not depend on how the rows were cut into batches, but for the informative loss.
    """

    def __init__(self, metric: Metric = Metric.ACCURACY, *, top_k: int = 1, bound: float = 0.0) -> None:
        if top_k < 1 or (metric is Metric.ACCURACY and top_k != 1):
            raise ValueError(f"top_k is {top_k}, {metric} needs {'1' if metric is Metric.ACCURACY else '1 or more'}")
        if metric is Metric.WITHIN_BOUND and not 0 < bound < math.inf:
            raise ValueError(f"bound is {bound}, {metric} needs a number above 0")
        self._metric = metric
        self._top_k = top_k
        self._bound = bound
        self._correct = 0
        self._total = 0
        self._ambiguous = 0
        self._loss_sum = 0.0
        self._blocks: list[bytes] = []
        self._open_block = _new_block()
        self._open_rows = 0

    @property
    def total(self) -> int:
        """Rows counted so far."""
        return self._total

    def add(self, outputs: NDArray[np.float32], labels: NDArray[np.int64] | NDArray[np.float32]) -> None:
        """Count the next rows: `outputs` [n, outputs], and labels [n] from 0 to outputs - 1.

        For WITHIN_BOUND `labels` are targets, [n] or [n, outputs]. Raises NanOutput, and ValueError for shapes that do
        not fit or a label that is none of the outputs. Nothing is counted then.
        """
        if outputs.ndim != 2 or outputs.shape[1] < 1 or len(labels) != len(outputs):
            raise ValueError(f"outputs {outputs.shape} and labels {labels.shape} do not fit")
        if len(outputs) == 0:
            return
        if self._metric is Metric.WITHIN_BOUND:
            counted = _within(outputs, _targets(labels, outputs.shape), self._bound)
        else:
            counted = _classified(outputs, _classes(labels, outputs.shape), self._top_k)
        if isinstance(counted, int):
            raise NanOutput(self._total + counted)
        self._ambiguous += int(counted.ambiguous.sum())
        self._correct += int(counted.right.sum())
        self._total += len(outputs)
        self._loss_sum += counted.loss
        self._digest(counted.predictions.astype("<i4"))

    def counts(self) -> Counts:
        """The integers so far."""
        # Python's round is half to even, as the contract wants it.
        loss_sum_micros = round(min(self._loss_sum * _MICROS, float(_MAX_INT64)))
        return Counts(self._correct, self._total, self._ambiguous, min(loss_sum_micros, _MAX_INT64))

    def prediction_blocks(self) -> tuple[bytes, ...]:
        """The leaf hash of each `BLOCK_ROWS` predictions in row order, as `tiltyard.predictions` defines it."""
        if self._open_rows == 0:
            return tuple(self._blocks)
        return (*self._blocks, self._open_block.digest())

    def _digest(self, predictions: NDArray[np.int32]) -> None:
        rest = memoryview(predictions.tobytes())
        while rest:
            part = rest[: (BLOCK_ROWS - self._open_rows) * PREDICTION_BYTES]
            self._open_block.update(part)
            self._open_rows += len(part) // PREDICTION_BYTES
            rest = rest[len(part) :]
            if self._open_rows == BLOCK_ROWS:
                self._blocks.append(self._open_block.digest())
                self._open_block = _new_block()
                self._open_rows = 0


def _new_block() -> "hashlib._Hash":
    return hashlib.sha256(b"\x00")


@dataclass(frozen=True)
class _Counted:
    """One batch: for each row the prediction, whether it is right, and whether machines may differ; the loss's sum."""

    predictions: NDArray[np.int64]
    right: NDArray[np.bool_]
    ambiguous: NDArray[np.bool_]
    loss: float


def _classes(labels: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.int64]:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels {labels.dtype} {labels.shape} are no classes for outputs {shape}")
    if labels.min() < 0 or labels.max() >= shape[1]:
        raise ValueError(f"a label is outside 0 to {shape[1] - 1}")
    return labels


def _targets(labels: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float64]:
    if labels.size != shape[0] * shape[1] or labels.dtype.kind != "f":
        raise ValueError(f"targets {labels.dtype} {labels.shape} do not fit outputs {shape}")
    return labels.astype(np.float64).reshape(shape)


def _first_not_finite(finite: NDArray[np.bool_], *, axis: int) -> int:
    return int(np.flatnonzero(~finite.all(axis=axis))[0])


def _classified(outputs: NDArray[np.float32], labels: NDArray[np.int64], top_k: int) -> _Counted | int:
    """The batch, or the first row with an output that is NaN or infinite."""
    # Outputs first, rows last: each operation then runs over long rows of memory, several times faster.
    columns = np.array(outputs.T, dtype=np.float32, order="C", copy=True)
    finite = np.isfinite(columns)
    if not finite.all():
        return _first_not_finite(finite, axis=0)
    predictions = columns.argmax(axis=0)
    row_index = np.arange(len(outputs))
    best = columns[predictions, row_index]
    of_label = columns[labels, row_index]
    loss = _cross_entropy(columns, best, of_label)
    if top_k == 1:
        # Overwrites the columns, so it comes last.
        return _Counted(
            predictions, predictions == labels, _ambiguous_best(columns, predictions, best, row_index), loss
        )
    right = _rank(columns, of_label, labels) < top_k
    return _Counted(predictions, right, _ambiguous_top(columns, top_k), loss)


def _within(outputs: NDArray[np.float32], targets: NDArray[np.float64], bound: float) -> _Counted | int:
    """The batch, or the first row with an output that is NaN or infinite."""
    finite = np.isfinite(outputs)
    if not finite.all():
        return _first_not_finite(finite, axis=1)
    exact = outputs.astype(np.float64)
    errors = np.abs(exact - targets)
    furthest = errors.max(axis=1)
    right = furthest <= bound
    ambiguous = np.abs(furthest - bound) <= AMBIGUITY * np.abs(exact).max(axis=1)
    loss = float(np.square(errors).mean(axis=1).sum())
    return _Counted(right.astype(np.int64), right, ambiguous, loss)


def _rank(columns: NDArray[np.float32], of_label: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many outputs go before the label's: those larger, and those equal of a lower index."""
    indices = np.arange(columns.shape[0])[:, None]
    before = (columns > of_label) | ((columns == of_label) & (indices < labels))
    ranks: NDArray[np.int64] = before.sum(axis=0)
    return ranks


def _cross_entropy(columns: NDArray[np.float32], best: NDArray[np.float32], of_label: NDArray[np.float32]) -> float:
    """The sum over rows of -log softmax(row)[label], in float64 from the outputs on."""
    shifted = columns.astype(np.float64)
    shifted -= best
    np.exp(shifted, out=shifted)
    normaliser = np.log(shifted.sum(axis=0))
    return float((normaliser + best.astype(np.float64) - of_label).sum())


def _ambiguous_best(
    columns: NDArray[np.float32],
    predictions: NDArray[np.int64],
    best: NDArray[np.float32],
    row_index: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Rows whose two best outputs lie within AMBIGUITY of the row's largest magnitude. Overwrites `columns`."""
    if columns.shape[0] < 2:
        return np.zeros(columns.shape[1], dtype=np.bool_)
    magnitude = np.maximum(np.abs(best), np.abs(columns.min(axis=0)))
    columns[predictions, row_index] = -np.inf
    return _close(best, columns.max(axis=0), magnitude)


def _ambiguous_top(columns: NDArray[np.float32], top_k: int) -> NDArray[np.bool_]:
    """Rows whose `top_k`-th largest output and the next lie that close."""
    outputs, rows = columns.shape
    if top_k >= outputs:
        return np.zeros(rows, dtype=np.bool_)
    ordered = np.partition(columns, (outputs - top_k - 1, outputs - top_k), axis=0)
    return _close(ordered[outputs - top_k], ordered[outputs - top_k - 1], np.abs(columns).max(axis=0))


def _close(upper: NDArray[np.float32], lower: NDArray[np.float32], magnitude: NDArray[np.float32]) -> NDArray[np.bool_]:
    gap = upper.astype(np.float64) - lower
    # Written with <= so that a row of zeros, where nothing distinguishes the two, is ambiguous.
    within: NDArray[np.bool_] = gap <= AMBIGUITY * magnitude.astype(np.float64)
    return within
