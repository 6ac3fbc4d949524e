"""The chance of being among those drawn: exact for small pools, by simulation with its error stated for large ones."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from tiltyard.sortition import draw
from tiltyard.sumtree import SumTree

EXACT_LEAVES = 12
SIMULATED_DRAWS = 2000


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


def odds(weights: Sequence[int], index: int, picks: int) -> Odds:
    """The chance of leaf `index` to be among the first `picks`. A simulated one is the same each time."""
    if weights[index] == 0:
        return Odds(0.0, 0.0)
    drawable = sum(weight > 0 for weight in weights)
    if picks >= drawable:
        return Odds(1.0, 0.0)
    if picks == 1:
        return Odds(weights[index] / sum(weights), 0.0)
    if drawable <= EXACT_LEAVES:
        compact = [weight for weight in weights if weight > 0]
        place = sum(weight > 0 for weight in weights[:index])
        return Odds(inclusion_probabilities(compact, picks)[place], 0.0)
    tree = SumTree((str(leaf), weight) for leaf, weight in enumerate(weights))
    hits = 0
    for run in range(SIMULATED_DRAWS):
        seed = hashlib.sha256(b"tiltyard/odds" + run.to_bytes(4, "big")).digest()
        hits += any(place.leaf_index == index for place in islice(draw(seed, tree), picks))
    chance = hits / SIMULATED_DRAWS
    # Laplace's estimate keeps the error of a chance near 0 or 1 above 0.
    smoothed = (hits + 1) / (SIMULATED_DRAWS + 2)
    return Odds(chance, math.sqrt(smoothed * (1 - smoothed) / SIMULATED_DRAWS))
