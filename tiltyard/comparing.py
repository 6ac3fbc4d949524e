"""Two evaluations of one model on one dataset, compared block by block and, where that can be, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass

from tiltyard.predictions import (
    BLOCK_ROWS,
    PREDICTION_BYTES,
    Difference,
    RowRange,
    block_hashes,
    check_handed_in,
    differing_predictions,
    differing_rows,
    prediction_root,
    search_block,
    split,
)
from tiltyard.registry.v1 import evaluation_pb2

SEARCH_HASHES = 3_000_000
"""Most hashes that are tried to name the rows of one block: every two changes in 256 rows of 10 classes."""


class NotComparable(Exception):
    """The two are not two evaluations of one model on one dataset, or one is not shown; the text says which."""


@dataclass(frozen=True)
class Comparison:
    """What differs. `unnamed` are row ranges in which the rows could not be told, `named` the rows that could."""

    rows: int
    correct: tuple[int, int]
    ranges: tuple[RowRange, ...]
    named: tuple[Difference, ...]
    unnamed: tuple[RowRange, ...]
    recomputed: tuple[bool, bool]
    """Whether predictions at hand are exactly those behind the left and the right report."""


def compare(
    left: evaluation_pb2.Evaluation,
    right: evaluation_pb2.Evaluation,
    *,
    runs: Sequence[bytes] = (),
    outputs: int = 0,
    most: int = SEARCH_HASHES,
) -> Comparison:
    """What differs between two evaluations that were read with view FULL.

    `runs` are predictions that somebody has recomputed (little-endian int32 in row order). Where they give the root of
    both reports every row is named; where they give one report's, the other's rows are searched for among `outputs`
    classes by the hashes of the blocks, up to `most` hashes a block. Raises NotComparable.
    """
    for evaluation in (left, right):
        _check(evaluation)
    one, other = left.finding, right.finding
    if one.dataset_digest != other.dataset_digest:
        raise NotComparable("they are on different datasets")
    if one.model_digest != other.model_digest:
        raise NotComparable("they are of different models")
    rows = one.counts.total
    if other.counts.total != rows:
        raise NotComparable(f"they count {rows} and {other.counts.total} rows")
    ranges = differing_rows(left.prediction_hashes, right.prediction_hashes, rows=rows)
    known = {prediction_root(block_hashes(run)): run for run in runs}
    mine, yours = known.get(one.prediction_root), known.get(other.prediction_root)
    named: list[Difference] = []
    unnamed: list[RowRange] = []
    if mine is not None and yours is not None:
        named = differing_predictions(mine, yours)
    elif left.rows_per_hash == BLOCK_ROWS and outputs and (mine is not None or yours is not None):
        named, unnamed = _searched(left, right, mine, yours, ranges, outputs=outputs, most=most)
    else:
        unnamed = ranges
    return Comparison(
        rows=rows,
        correct=(one.counts.correct, other.counts.correct),
        ranges=tuple(ranges),
        named=tuple(named),
        unnamed=tuple(unnamed),
        recomputed=(mine is not None, yours is not None),
    )


def _check(evaluation: evaluation_pb2.Evaluation) -> None:
    name, finding = evaluation.name, evaluation.finding
    if not evaluation.HasField("report"):
        raise NotComparable(f"{name} is not shown yet")
    if not finding.HasField("counts"):
        raise NotComparable(f"{name} reports a fault and has no predictions")
    problem = check_handed_in(
        evaluation.prediction_hashes, root=finding.prediction_root, blocks=finding.prediction_blocks
    )
    if problem:
        raise NotComparable(f"the hashes of {name} {problem}")


def _searched(
    left: evaluation_pb2.Evaluation,
    right: evaluation_pb2.Evaluation,
    mine: bytes | None,
    yours: bytes | None,
    ranges: Sequence[RowRange],
    *,
    outputs: int,
    most: int,
) -> tuple[list[Difference], list[RowRange]]:
    """The rows of every differing block by its hash, and the blocks in which that failed."""
    run = mine if mine is not None else yours
    if run is None:
        raise ValueError("neither side's predictions are at hand")
    hashes = split(right.prediction_hashes if mine is not None else left.prediction_hashes)
    named: list[Difference] = []
    unnamed: list[RowRange] = []
    for part in ranges:
        for start in range(part.start, part.stop, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, part.stop)
            block = run[start * PREDICTION_BYTES : stop * PREDICTION_BYTES]
            found = search_block(block, hashes[start // BLOCK_ROWS], first_row=start, outputs=outputs, most=most)
            if found is None:
                unnamed.append(RowRange(start, stop))
            elif mine is not None:
                named += found
            else:
                named += [Difference(each.row, each.right, each.left) for each in found]
    return named, unnamed
