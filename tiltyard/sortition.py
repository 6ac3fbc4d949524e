"""Draws of validators that anyone can recompute: an order of owner groups that follows from a seed and a pool alone.

Place 0, 1, 2 ... of the order is drawn in proportion to the weights of the groups that are left. Who may not be
picked is passed over when its place comes up, so that nothing that happens after the seed is known changes the order of
the others.
Written out for a second implementation in docs/sortition.md; vectors in tests/vectors/draws.json.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tiltyard.curves import SQUARE_ROOT, WEIGHT_SCALE, Curve, CurveKind, weight
from tiltyard.sumtree import Remaining, SumTree, prove_place

__all__ = [
    "SQUARE_ROOT",
    "WEIGHT_SCALE",
    "Curve",
    "CurveKind",
    "Place",
    "ProvedPlace",
    "SumTree",
    "check_order",
    "draw",
    "draw_id",
    "drawn_member",
    "drawn_value",
    "quota_limit",
    "weight",
]

SEED_BYTES = 32

# Groups and their members are drawn from two streams, so that the members never move the order of the groups.
_GROUP_STREAM = b"\x00"
_MEMBER_STREAM = b"\x01"


class Place(NamedTuple):
    """One place of a draw's order: the leaf that it fell on, the leaf's weight, and the value that was drawn."""

    place: int
    leaf_index: int
    weight: int
    value: int


@dataclass(frozen=True)
class ProvedPlace:
    """A place with what proves it: the leaf's id, and the nodes beside its way up to the pool's root (SumTree.path)."""

    place: Place
    identifier: str
    path: bytes


def draw_id(submission: str, round: int) -> str:
    """Id of the one draw for a submission (a resource name) and round: half of a SHA-256, in hex."""
    return hashlib.sha256(f"{submission}/{round}".encode()).hexdigest()[:32]


def draw(seed: bytes, tree: SumTree, drawn: Iterable[int] = ()) -> Iterator[Place]:
    """Draws the order of the leaves of `tree`, place after place, until no weight is left.

    `drawn` holds the leaves of the places that came before, in order: the draw goes on after them. O(log n) a place.
    The tree must not change while the iterator is used. Raises ValueError for a seed that has not 32 bytes.
    """
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} bytes, not {len(seed)}")
    remaining = Remaining(tree)
    place = 0
    for index in drawn:
        remaining.take(index)
        place += 1
    while remaining.total > 0:
        value = drawn_value(seed, place, remaining.total)
        index = remaining.pop(value)
        yield Place(place, index, tree.weight(index), value)
        place += 1


def drawn_value(seed: bytes, place: int, bound: int) -> int:
    """The value drawn for a place: uniform in [0, bound)."""
    return _uniform(seed + _GROUP_STREAM + place.to_bytes(4, "big"), bound)


def drawn_member(seed: bytes, place: int, members: Sequence[str]) -> str:
    """The one of a group's members who is picked for a place: uniform. `members` is in ascending order, not empty."""
    return members[_uniform(seed + _MEMBER_STREAM + place.to_bytes(4, "big"), len(members))]


def check_order(seed: bytes, places: Sequence[ProvedPlace], *, root: bytes, leaf_count: int, total: int) -> None:
    """Checks that `places` are the first of the order that follows from `seed` and the pool under `root`.

    Needs O(k log n) data and not the pool. Raises ValueError, naming the place that does not fit.
    """
    before: list[Place] = []
    for expected, proved in enumerate(places):
        place = proved.place
        if place.place != expected:
            raise ValueError(f"place {expected} of the order is missing")
        try:
            left_of = prove_place(
                proved.identifier,
                place.weight,
                proved.path,
                index=place.leaf_index,
                root=root,
                leaf_count=leaf_count,
                total=total,
            )
        except (ValueError, OverflowError) as error:
            raise ValueError(f"place {expected}: {error}") from error
        if any(earlier.leaf_index == place.leaf_index for earlier in before):
            raise ValueError(f"place {expected}: its leaf was drawn before")
        remaining = total - sum(earlier.weight for earlier in before)
        left_of -= sum(earlier.weight for earlier in before if earlier.leaf_index < place.leaf_index)
        if remaining <= 0 or place.value != drawn_value(seed, expected, remaining):
            raise ValueError(f"place {expected}: the value does not follow from the seed")
        if not left_of <= place.value < left_of + place.weight:
            raise ValueError(f"place {expected}: the value falls on another leaf")
        before.append(place)


def quota_limit(weight: int, *, reference_weight: int, limit: int) -> int:
    """How often an owner group of this weight may be assigned in one window: max(1, floor(limit * share)).

    The share is its weight over that of the reference stake, 1 at most. A reference stake so far below the minimum that
    it weighs nothing in integers counts as 1.
    """
    reference = max(1, reference_weight)
    return max(1, limit * min(weight, reference) // reference)


def _uniform(stream: bytes, bound: int) -> int:
    """An integer in [0, bound): the first bits of SHA-256 over the stream and a counter, drawn again when too large."""
    if bound == 1:
        return 0  # of no bits
    bits = (bound - 1).bit_length()
    attempt = 0
    while True:
        digest = hashlib.sha256(stream + attempt.to_bytes(4, "big")).digest()
        value = int.from_bytes(digest, "big") >> (256 - bits)
        if value < bound:
            return value
        attempt += 1
