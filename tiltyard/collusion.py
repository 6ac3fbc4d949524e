"""How often validators who collude take a score away from the honest ones, by the draw and the rules of `scoring`.

All weigh the same here; colluders all report the same, which is the most that they can do. Pure, so that a task's
creator can choose k by it.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Capture:
    """Two chances: that colluders decide the score alone, and that they leave it without any (AMBIGUOUS)."""

    decided: float
    blocked: float

    @property
    def lost(self) -> float:
        """The chance that honest validators do not decide."""
        return self.decided + self.blocked


def capture(k: int, *, pool: int, colluding: int) -> Capture:
    """What `colluding` of `pool` validators can do to a submission that is judged by k of them, drawn without return.

    When the first k agree, that is the score. When they do not, up to 2k+1 more are called in, as many as the pool has,
    and the majority of all decides. Raises ValueError for numbers that fit no pool.
    """
    if not (0 <= colluding <= pool and 1 <= k <= pool):
        raise ValueError(f"{colluding} colluding of a pool of {pool} with k = {k} is no draw")
    more = min(2 * k + 1, pool - k)
    decided, blocked = _drawn(k, k, pool, colluding), 0.0
    for first in range(1, k):
        chance = _drawn(first, k, pool, colluding)
        for later in range(more + 1):
            both = chance * _drawn(later, more, pool - k, colluding - first)
            if 2 * (first + later) > k + more:
                decided += both
            elif 2 * (first + later) == k + more:
                blocked += both
    return Capture(decided, blocked)


def _drawn(colluders: int, places: int, pool: int, colluding: int) -> float:
    """The hypergeometric chance that so many of the drawn are colluders."""
    if not 0 <= colluders <= colluding or not 0 <= places - colluders <= pool - colluding:
        return 0.0
    ways = math.comb(colluding, colluders) * math.comb(pool - colluding, places - colluders)
    return ways / math.comb(pool, places)
