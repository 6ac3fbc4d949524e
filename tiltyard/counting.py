"""Counts what a model got right: exact integers from its outputs, and digests by which two counts can be compared."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 256
"""Predictions under one digest."""

AMBIGUITY = 1e-4
"""Two best outputs closer than this share of the row's largest magnitude: honest machines may rank them differently."""

_MICROS = 1_000_000


class Metric(StrEnum):
    """What counts as right."""

    ACCURACY = "accuracy"
    TOP_K_ACCURACY = "top_k_accuracy"


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

    A row is right when its label is among the `top_k` largest outputs (1 for accuracy), the lower index going first
    among equal ones. The result does not depend on how the rows were cut into batches, but for the informative loss.
    """

    def __init__(self, metric: Metric = Metric.ACCURACY, *, top_k: int = 1) -> None:
        if top_k < 1 or (metric is Metric.ACCURACY and top_k != 1):
            raise ValueError(f"top_k is {top_k}, {metric} needs {'1' if metric is Metric.ACCURACY else '1 or more'}")
        self._top_k = top_k
        self._correct = 0
        self._total = 0
        self._ambiguous = 0
        self._loss_sum = 0.0
        self._blocks: list[bytes] = []
        self._open_block = hashlib.sha256()
        self._open_rows = 0

    @property
    def total(self) -> int:
        """Rows counted so far."""
        return self._total

    def add(self, logits: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        """Count the next rows: `logits` [n, outputs], `labels` [n] from 0 to outputs - 1.

        Raises NanOutput, and ValueError for shapes that do not fit or a label that is none of the outputs. Nothing is
        counted then.
        """
        if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 1:
            raise ValueError(f"logits {logits.shape} and labels {labels.shape} do not fit")
        rows, outputs = logits.shape
        if rows == 0:
            return
        if labels.min() < 0 or labels.max() >= outputs:
            raise ValueError(f"a label is outside 0 to {outputs - 1}")
        # Outputs first, rows last: each operation then runs over long rows of memory, several times faster.
        columns = np.array(logits.T, dtype=np.float32, order="C", copy=True)
        finite = np.isfinite(columns)
        if not finite.all():
            raise NanOutput(self._total + int(np.flatnonzero(~finite.all(axis=0))[0]))
        predictions = columns.argmax(axis=0)
        row_index = np.arange(rows)
        best = columns[predictions, row_index]
        of_label = columns[labels, row_index]
        # Summed before the best outputs are struck out below.
        loss = _cross_entropy(columns, best, of_label)
        right = predictions == labels if self._top_k == 1 else _rank(columns, of_label, labels) < self._top_k
        self._ambiguous += int(_ambiguous_rows(columns, predictions, best, row_index).sum())
        self._correct += int(right.sum())
        self._total += rows
        self._loss_sum += loss
        self._digest(predictions.astype("<i4"))

    def counts(self) -> Counts:
        """The integers so far."""
        # Python's round is half to even, as the contract wants it.
        return Counts(self._correct, self._total, self._ambiguous, round(self._loss_sum * _MICROS))

    def prediction_blocks(self) -> tuple[bytes, ...]:
        """SHA-256 of each `BLOCK_ROWS` predictions (little-endian int32) in row order; the last block may be short."""
        if self._open_rows == 0:
            return tuple(self._blocks)
        return (*self._blocks, self._open_block.digest())

    def _digest(self, predictions: NDArray[np.int32]) -> None:
        rest = memoryview(predictions.tobytes())
        while rest:
            part = rest[: (BLOCK_ROWS - self._open_rows) * 4]
            self._open_block.update(part)
            self._open_rows += len(part) // 4
            rest = rest[len(part) :]
            if self._open_rows == BLOCK_ROWS:
                self._blocks.append(self._open_block.digest())
                self._open_block = hashlib.sha256()
                self._open_rows = 0


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


def _ambiguous_rows(
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
    second = columns.max(axis=0)
    gap = best.astype(np.float64) - second
    # Written with <= so that a row of zeros, where nothing distinguishes the two, is ambiguous.
    within: NDArray[np.bool_] = gap <= AMBIGUITY * magnitude.astype(np.float64)
    return within
