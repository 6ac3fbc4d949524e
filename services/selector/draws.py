"""Draws: a random order of a pool for one submission and round, recorded before it is answered."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Protocol

from services.runtime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from services.selector import quotas
from services.selector.pool_trees import PoolTrees, at_version
from services.selector.pools import open_pool
from services.selector.records import Draw, DrawnPlace, PassedOverReason, Pool, Seat, Settlement
from services.selector.transaction import Store, Transaction
from tiltyard.commitments import draw_seed
from tiltyard.sortition import Place, SumTree, draw, draw_id, drawn_member

MAX_FURTHER_PICKS = 1000
MAX_BATCH = 1024


@dataclass(frozen=True)
class DrawOrder:
    """What a draw is asked for. `submission` is a resource name, `submitter` and `paused` are participant ids."""

    task: str
    submission: str
    round: int
    anchor: bytes
    reveal_salt: bytes
    validators: int
    submitter: str
    paused: frozenset[str]


class Signer(Protocol):
    """The selector's BLS key."""

    def sign_anchor(self, anchor: bytes) -> bytes:
        """Sigma: the one signature over an anchor."""
        ...


class Draws:
    """Draws validators, goes on with draws, and keeps the account of their quotas."""

    def __init__(self, store: Store, trees: PoolTrees, signer: Signer, *, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._trees = trees
        self._signer = signer
        self._clock = clock

    async def draw(self, order: DrawOrder) -> Draw:
        """Draws once for each submission and round; asked again it answers with the same draw.

        Raises NotFound, FailedPrecondition for a closed pool or too few eligible groups, ResourceExhausted when there
        would be enough but for used-up quotas, AlreadyExists when the draw was made with other arguments.
        """
        # Half a millisecond, outside of the interpreter's lock: the loop answers others meanwhile.
        sigma = await asyncio.to_thread(self._signer.sign_anchor, order.anchor)
        name = draw_id(order.submission, order.round)

        def work(transaction: Transaction) -> Draw:
            known = transaction.draw(name)
            if known is not None:
                return _same(known, order)
            pool = open_pool(transaction, order.task)
            tree = self._trees.current(transaction, pool)
            now = self._clock()
            drawn = Draw(
                draw=name,
                task=order.task,
                submission=order.submission,
                round=order.round,
                anchor=order.anchor,
                sigma=sigma,
                reveal_salt=order.reveal_salt,
                seed=draw_seed(sigma=sigma, reveal_salt=order.reveal_salt),
                pool_root=tree.root(),
                pool_weight=tree.total,
                pool_size=len(tree),
                pool_version=pool.version,
                curve=pool.policy.curve,
                assigned=order.validators,
                submitter=order.submitter,
                places=(),
                draw_time=now,
            )
            drawn = _go_on(transaction, pool, tree, drawn, wanted=order.validators, paused=order.paused, now=now)
            if len(drawn.picks) < order.validators:
                raise _not_enough(drawn, order.validators, pool, now)
            transaction.add_draw(drawn)
            return drawn

        return await self._store.write(work)

    async def extend(self, name: str, *, picks: int, paused: frozenset[str]) -> Draw:
        """Goes on in the same order until there are `picks` in all, or no group is left.

        Raises NotFound, InvalidArgument for more than 1000 further picks, FailedPrecondition for a closed pool, or when
        more are asked for and not one is left.
        """

        def work(transaction: Transaction) -> Draw:
            known = find_draw(transaction, name)
            if picks <= len(known.picks):
                return known
            if picks > len(known.picks) + MAX_FURTHER_PICKS:
                raise InvalidArgument.field(
                    "picks", f"is {picks}, allowed are {MAX_FURTHER_PICKS} more than the {len(known.picks)} there are"
                )
            pool = open_pool(transaction, known.task)
            if pool.version == known.pool_version:
                tree = self._trees.current(transaction, pool)
            else:
                tree = at_version(transaction, known.task, known.pool_version)
            now = self._clock()
            drawn = _go_on(transaction, pool, tree, known, wanted=picks, paused=paused, now=now)
            if len(drawn.picks) == len(known.picks):
                raise FailedPrecondition(
                    "ORDER_EXHAUSTED",
                    f"no group is left after {len(known.picks)} picks",
                    picks=str(len(known.picks)),
                    **_counts(drawn),
                )
            transaction.put_places(drawn)
            return drawn

        return await self._store.write(work)

    async def get(self, name: str) -> Draw:
        """A draw with all places so far. Raises NotFound."""
        return await self._store.read(lambda transaction: find_draw(transaction, name))

    async def settle(self, name: str, *, participant: str, settlement: Settlement) -> int:
        """Ends the account of one pick; returns the uses charged to the owner group in its window."""

        def work(transaction: Transaction) -> int:
            find_draw(transaction, name)
            return quotas.settle(
                transaction, draw=name, participant=participant, settlement=settlement, now=self._clock()
            )

        return await self._store.write(work)


def find_draw(transaction: Transaction, name: str) -> Draw:
    """A draw by its id. Raises NotFound."""
    known = transaction.draw(name)
    if known is None:
        raise NotFound("DRAW_NOT_FOUND", "there is no such draw", draw=name)
    return known


def _go_on(
    transaction: Transaction,
    pool: Pool,
    tree: SumTree,
    drawn: Draw,
    *,
    wanted: int,
    paused: Set[str],
    now: datetime,
) -> Draw:
    """Takes further places until there are `wanted` picks or no weight is left, and charges each pick."""
    known = [place.participant for place in drawn.picks]
    groups = transaction.owner_groups([*known, drawn.submitter, pool.creator])
    left_out = {
        groups[drawn.submitter]: PassedOverReason.SUBMITTER,
        groups[pool.creator]: PassedOverReason.TASK_CREATOR,
    } | {groups[participant]: PassedOverReason.ALREADY_PICKED for participant in known}
    places, picked = list(drawn.places), dict[str, str]()
    order = draw(drawn.seed, tree, [place.place.leaf_index for place in places])
    # What is asked of the database is asked for many places at once: first for as many as may be enough.
    batch_size = wanted - len(known)
    while len(known) + len(picked) < wanted and (batch := list(islice(order, batch_size))):
        for place, group in _look_up(transaction, pool, drawn, batch, now):
            came = _judge(pool, tree, drawn, place, group, left_out=left_out, paused=paused)
            places.append(came)
            if came.passed_over is None:
                picked[came.participant] = group.owner_group
                left_out[group.owner_group] = PassedOverReason.ALREADY_PICKED
                if len(known) + len(picked) == wanted:
                    break
        batch_size = min(2 * batch_size, MAX_BATCH)
    quotas.charge(transaction, pool, draw=drawn.draw, picked=picked, now=now)
    return replace(drawn, places=tuple(places))


@dataclass(frozen=True)
class _Group:
    """Those who can be picked when a leaf comes up: nobody, or members of one owner group."""

    owner_group: str
    members: tuple[str, ...]
    used: int


def _look_up(
    transaction: Transaction, pool: Pool, drawn: Draw, places: Sequence[Place], now: datetime
) -> Iterator[tuple[Place, _Group]]:
    """The places with what the database knows of their groups now."""
    window = quotas.window_at(pool, now)
    indices = [place.leaf_index for place in places]
    seated: dict[int, list[Seat]] = {index: [] for index in indices}
    for seat in transaction.seats(pool.task, leaf_indices=indices, version=drawn.pool_version, window=window):
        seated[seat.leaf_index].append(seat)
    # Whoever is not alone may share its quota with somebody who has left the pool.
    shared = {seats[0].owner_group for seats in seated.values() if seats and not seats[0].is_alone}
    used = transaction.quota_used(pool.task, window=window, owner_groups=shared) if shared else {}
    for place in places:
        seats = seated[place.leaf_index]
        if not seats:
            yield place, _Group("", (), 0)
            continue
        group = seats[0].owner_group
        yield place, _Group(group, tuple(seat.participant for seat in seats), used.get(group, seats[0].used))


def _judge(
    pool: Pool,
    tree: SumTree,
    drawn: Draw,
    place: Place,
    group: _Group,
    *,
    left_out: Mapping[str, PassedOverReason],
    paused: Set[str],
) -> DrawnPlace:
    """Picks a member of the group whose place came up, or says why it is passed over."""
    members = tuple(member for member in group.members if member not in paused)
    reason = None
    if not group.members:
        reason = PassedOverReason.LEFT
    elif group.owner_group in left_out:
        reason = left_out[group.owner_group]
    elif not members:
        reason = PassedOverReason.PAUSED
    elif group.used >= quotas.limit_of(pool, place.weight):
        reason = PassedOverReason.QUOTA
    # The leaf's own id: its group may have become part of another since.
    leaf, path = tree.identifier(place.leaf_index), tree.path(place.leaf_index)
    if reason is not None:
        return DrawnPlace(place, leaf, path, passed_over=reason)
    return DrawnPlace(place, leaf, path, members, drawn_member(drawn.seed, place.place, members))


def _same(known: Draw, order: DrawOrder) -> Draw:
    arguments = (order.anchor, order.reveal_salt, order.validators, order.submitter)
    if (known.anchor, known.reveal_salt, known.assigned, known.submitter) != arguments:
        raise AlreadyExists(
            "DRAW_EXISTS",
            "this submission and round was drawn with another anchor, salt, submitter or number",
            draw=known.draw,
        )
    return known


def _counts(drawn: Draw) -> dict[str, str]:
    passed_over = Counter(place.passed_over for place in drawn.places)
    return {reason.value: str(passed_over[reason]) for reason in PassedOverReason if passed_over[reason]}


def _not_enough(drawn: Draw, wanted: int, pool: Pool, now: datetime) -> FailedPrecondition | ResourceExhausted:
    counts = _counts(drawn)
    eligible, used_up = len(drawn.picks), int(counts.get(PassedOverReason.QUOTA.value, "0"))
    described = ", ".join(f"{number} {reason}" for reason, number in counts.items()) or "nobody"
    message = f"{wanted} validators are wanted and {eligible} owner groups are eligible; passed over: {described}"
    metadata = {"eligible": str(eligible), "wanted": str(wanted), **counts}
    refill_time = quotas.refill_time(pool, now)
    if used_up:
        metadata["refill_time"] = refill_time.isoformat()
    if eligible + used_up >= wanted:
        wait_s = (refill_time - now).total_seconds()
        return ResourceExhausted("QUOTA_USED_UP", message, retry_after_s=wait_s, **metadata)
    return FailedPrecondition("NOT_ENOUGH_VALIDATORS", message, **metadata)
