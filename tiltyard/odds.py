"""The chance of being among those drawn: exact for small pools, by simulation with its error stated for large ones."""

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice

from tiltyard.sortition import draw
from tiltyard.sumtree import SumTree

EXACT_LEAVES = 12
SIMULATED_DRAWS = 400
_SIMULATED_PLACES = 4000
"""Draws of many places are simulated less often: each of them says more, and nobody waits longer for them."""


@dataclass(frozen=True)
class Odds:
    """A chance in [0, 1], and the standard error of a simulated one; 0 when it is exact."""

    probability: float
    standard_error: float


def inclusion_probabilities(weights: Sequence[int], picks: int) -> list[float]:
    """For each leaf the exact chance of being among the first `picks` of a draw without replacement.

    Sums over all sets of leaves drawn so far: 2^n * n steps, for pools of a dozen.
    """
    total = sum(weights)
    inclusion = [0.0] * len(weights)
    reached = {0: 1.0}
    for _ in range(min(picks, sum(weight > 0 for weight in weights))):
        further: dict[int, float] = {}
        for drawn, chance in reached.items():
            left = total - sum(weight for index, weight in enumerate(weights) if drawn >> index & 1)
            for index, weight in enumerate(weights):
                if weight > 0 and not drawn >> index & 1:
                    step = chance * (weight / left)
                    inclusion[index] += step
                    further[drawn | 1 << index] = further.get(drawn | 1 << index, 0.0) + step
        reached = further
    return inclusion


def odds(tree: SumTree, index: int, picks: int, *, left_out: Collection[int] = ()) -> Odds:
    """The chance of leaf `index` to be among the first `picks`, where those `left_out` are passed over.

    0 where fewer leaves than that can be drawn: such a draw is refused. A simulated chance is the same each time.
    """
    weight = tree.weight(index)
    if weight == 0 or index in left_out:
        return Odds(0.0, 0.0)
    others = (leaf for leaf in range(len(tree)) if leaf != index and leaf not in left_out and tree.weight(leaf) > 0)
    some = list(islice(others, max(picks, EXACT_LEAVES)))
    if len(some) < picks - 1:
        return Odds(0.0, 0.0)
    if len(some) == picks - 1:
        return Odds(1.0, 0.0)
    total = tree.total - sum(map(tree.weight, left_out))
    if picks == 1:
        return Odds(weight / total, 0.0)
    if len(some) < EXACT_LEAVES:
        return Odds(inclusion_probabilities([weight, *map(tree.weight, some)], picks)[0], 0.0)
    absent = [index, *left_out]
    runs = min(SIMULATED_DRAWS, max(2, _SIMULATED_PLACES // picks))
    chances = [_chance_beside(tree, weight, total, absent, picks, run) for run in range(runs)]
    chance = math.fsum(chances) / runs
    variance = math.fsum((each - chance) ** 2 for each in chances) / (runs - 1)
    return Odds(chance, math.sqrt(variance / runs))


def _chance_beside(tree: SumTree, weight: int, total: int, absent: Sequence[int], picks: int, run: int) -> float:
    """The chance of a leaf of this weight where the others, all but those `absent`, come up in one random order.

    The mean of these is the leaf's chance, and they differ far less than being drawn and not being drawn do: a chance
    of one in a million is told as well as an even one.
    """
    seed = hashlib.sha256(b"tiltyard/odds" + run.to_bytes(4, "big")).digest()
    left, log_missed = total, 0.0
    for place in islice(draw(seed, tree, absent), picks):
        log_missed += math.log1p(-(weight / left))
        left -= place.weight
    return -math.expm1(log_missed)
