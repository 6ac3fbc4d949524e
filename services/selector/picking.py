"""Goes on in a draw's order: whose place comes up is picked, or passed over for a reason, until enough are picked."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice

from services.selector import quotas
from services.selector.records import Charge, DrawnPlace, PassedOverReason, Pool
from services.selector.seating import SeatedGroup, Seating
from tiltyard.sortition import Place, SumTree, drawn_member

_MOST_AT_ONCE = 1024


@dataclass(frozen=True)
class Drawing:
    """A draw under way: its order from where it stopped, the tree that it is drawn from, and those it passes over.

    `version` is the pool's when the draw began, `submitter` and `paused` are participant ids.
    """

    draw: str
    pool: Pool
    version: int
    tree: SumTree
    seed: bytes
    order: Iterator[Place]
    submitter: str
    paused: Set[str]


@dataclass(frozen=True)
class Picked:
    """What came of a draw's further places, and the charges of those picked, with the owner group of each.

    The places are not proved yet, which takes as long as all the rest: see `proved`.
    """

    places: tuple[DrawnPlace, ...]
    charges: Mapping[Charge, str]


class Undecided(Exception):
    """As many places came up as were to be looked at, and too few were picked."""


def pick(
    seating: Seating,
    drawing: Drawing,
    *,
    before: Sequence[DrawnPlace] = (),
    wanted: int,
    now: datetime,
    most_places: int | None = None,
) -> Picked:
    """Takes further places until there are `wanted` picks more, or no weight is left. Nothing is charged yet.

    Raises Undecided after `most_places`, or a few more.
    """
    pool = drawing.pool
    window = quotas.window_at(pool, now)
    earlier = [place.participant for place in before if place.passed_over is None]
    groups = seating.groups([drawing.submitter, pool.creator, *earlier])
    left_out = {
        groups[drawing.submitter]: PassedOverReason.SUBMITTER,
        groups[pool.creator]: PassedOverReason.TASK_CREATOR,
    } | {groups[participant]: PassedOverReason.ALREADY_PICKED for participant in earlier}
    places, charges = list[DrawnPlace](), dict[Charge, str]()
    # The seats of many places are read at once: first of as many as may be enough.
    at_once = wanted
    while len(charges) < wanted and (batch := list(islice(drawing.order, at_once))):
        if most_places is not None and len(places) >= most_places:
            raise Undecided
        indices = [place.leaf_index for place in batch]
        seats = seating.look(pool.task, version=drawing.version, window=window, leaf_indices=indices)
        for place, (group, used) in zip(batch, seats, strict=True):
            came = _judge(drawing, place, group, used=used, left_out=left_out)
            places.append(came)
            if came.passed_over is None:
                charges[Charge(drawing.draw, came.participant, pool.task, window)] = group.owner_group
                left_out[group.owner_group] = PassedOverReason.ALREADY_PICKED
                if len(charges) == wanted:
                    break
        at_once = min(2 * at_once, _MOST_AT_ONCE)
    return Picked(tuple(places), charges)


def proved(tree: SumTree, places: Sequence[DrawnPlace]) -> Sequence[DrawnPlace]:
    """Places with what proves each of them: the leaf's id, and the nodes beside its way."""
    # The leaf's own id: its group may have become part of another since.
    return [
        replace(each, owner_group=tree.identifier(each.place.leaf_index), path=tree.path(each.place.leaf_index))
        for each in places
    ]


def _judge(
    drawing: Drawing, place: Place, group: SeatedGroup, *, used: int, left_out: Mapping[str, PassedOverReason]
) -> DrawnPlace:
    """Picks a member of the group whose place came up, or says why it is passed over."""
    paused = drawing.paused
    members = tuple(member for member in group.members if member not in paused) if paused else group.members
    reason = None
    if not group.members:
        reason = PassedOverReason.LEFT
    elif group.owner_group in left_out:
        reason = left_out[group.owner_group]
    elif not members:
        reason = PassedOverReason.PAUSED
    elif used >= quotas.limit_of(drawing.pool, place.weight):
        reason = PassedOverReason.QUOTA
    if reason is not None:
        return DrawnPlace(place, passed_over=reason)
    participant = drawn_member(drawing.seed, place.place, members)
    return DrawnPlace(place, members=members, participant=participant)
