"""Draws: a random order of a pool for one submission and round, recorded before it is answered."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain, islice
from typing import Protocol

from services.runtime.errors import (
    AlreadyExists,
    ArenaError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from services.selector import quotas
from services.selector.batches import Batches
from services.selector.picking import Drawing, Picked, Undecided, pick, proved
from services.selector.pool_trees import PoolTrees, at_version
from services.selector.pools import open_pool
from services.selector.records import Charge, Draw, DrawnPlace, PassedOverReason, Pool, Settlement
from services.selector.seating import Seating, SeatingMemory
from services.selector.transaction import Store, Transaction
from tiltyard.commitments import draw_seed
from tiltyard.sortition import Place, SumTree, draw, draw_id
from tiltyard.telemetry import metrics

MAX_FURTHER_PICKS = 1000
# Looking through as many places takes some milliseconds, in which whatever else is to be written waits.
MOST_PLACES_AT_ONCE = 1024
_DRAWS = metrics.Counter("tiltyard.draws", unit="{draw}", description="Draws answered, those asked again too.")


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

    async def sign_anchor(self, anchor: bytes) -> bytes:
        """Sigma: the one signature over an anchor."""
        ...


@dataclass(frozen=True)
class _Asked:
    """An order with what follows from it alone, and whether it is to be looked through however long that takes."""

    name: str
    order: DrawOrder
    sigma: bytes
    seed: bytes
    to_its_end: bool = False


class Draws:
    """Draws validators, goes on with draws, and keeps the account of their quotas."""

    def __init__(self, store: Store, trees: PoolTrees, signer: Signer, *, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._trees = trees
        self._signer = signer
        self._clock = clock
        self._memory = SeatingMemory()
        # A transaction takes as long as several draws do: those that wait for it are drawn in one.
        self._batches = Batches(self._draw_together)
        self._turn = asyncio.Lock()

    async def draw(self, order: DrawOrder) -> Draw:
        """Draws once for each submission and round; asked again it answers with the same draw.

        Raises NotFound, FailedPrecondition for a closed pool or too few eligible groups, ResourceExhausted when there
        would be enough but for used-up quotas, AlreadyExists when the draw was made with other arguments.
        """
        sigma = await self._signer.sign_anchor(order.anchor)
        seed = draw_seed(sigma=sigma, reveal_salt=order.reveal_salt)
        asked = _Asked(draw_id(order.submission, order.round), order, sigma, seed)
        try:
            drawn = await self._batches.ask(asked)
        except Undecided:
            # One at a time: the others find a reader that is free.
            async with self._turn:
                await self._store.read(lambda transaction: self._check_enough(transaction, order, seed))
            drawn = await self._batches.ask(replace(asked, to_its_end=True))
        _DRAWS.add()
        return drawn

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
            order = draw(known.seed, tree, [place.place.leaf_index for place in known.places])
            drawing = Drawing(name, pool, known.pool_version, tree, known.seed, order, known.submitter, paused)
            now = self._clock()
            # What draws remember is left alone: their batches read it and keep it without a pause for anybody else.
            seating = SeatingMemory().at(transaction)
            picked = pick(seating, drawing, before=known.places, wanted=picks - len(known.picks), now=now)
            if not picked.charges:
                raise FailedPrecondition(
                    "ORDER_EXHAUSTED",
                    f"no group is left after {len(known.picks)} picks",
                    picks=str(len(known.picks)),
                    **_counts([*known.places, *picked.places]),
                )
            drawn = replace(known, places=(*known.places, *proved(tree, picked.places)))
            transaction.put_places(drawn)
            quotas.charge(transaction, picked.charges, now)
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

    def _check_enough(self, transaction: Transaction, order: DrawOrder, seed: bytes) -> None:
        """Looks through the pool beside the writer. Raises what `draw` does when there are too few."""
        pool, now = open_pool(transaction, order.task), self._clock()
        # The writer's trees are the writer's.
        tree = at_version(transaction, order.task, pool.version)
        drawing = Drawing("", pool, pool.version, tree, seed, draw(seed, tree), order.submitter, order.paused)
        picked = pick(SeatingMemory().at(transaction), drawing, wanted=order.validators, now=now)
        _check_picked(picked, order.validators, pool, now)

    async def _draw_together(self, asked: Sequence[_Asked]) -> Sequence[Draw | Exception]:
        def work(transaction: Transaction) -> tuple[Sequence[Draw | Exception], Seating]:
            batch = _Batch(transaction, self._trees, self._memory.at(transaction), self._clock())
            return batch.draw(asked), batch.seating

        results, seating = await self._store.write(work)
        self._memory.keep(seating)
        return results


class _Batch:
    """The draws of one transaction. Each counts the uses of those before it; one that is refused leaves no trace."""

    def __init__(self, transaction: Transaction, trees: PoolTrees, seating: Seating, now: datetime) -> None:
        self.seating = seating
        self._transaction = transaction
        self._trees = trees
        self._now = now
        self._pools: dict[str, tuple[Pool, SumTree]] = {}
        self._orders: dict[bytes, Iterator[Place]] = {}

    def draw(self, asked: Sequence[_Asked]) -> Sequence[Draw | Exception]:
        """A draw for each, or why there is none."""
        recorded = dict(self._transaction.draws([each.name for each in asked]))
        self._look_ahead([each for each in asked if each.name not in recorded])
        results, made, charges = list[Draw | Exception](), list[Draw](), dict[Charge, str]()
        for each in asked:
            try:
                if each.name not in recorded:
                    drawn, picked = self._draw(each)
                    recorded[each.name] = drawn
                    made.append(drawn)
                    charges.update(picked.charges)
                results.append(_same(recorded[each.name], each.order))
            except (ArenaError, Undecided) as refusal:
                results.append(refusal)
        self._transaction.add_draws(made)
        quotas.charge(self._transaction, charges, self._now)
        return results

    def _look_ahead(self, asked: Sequence[_Asked]) -> None:
        """Reads the seats at once that all draws need when nobody is passed over."""
        soon: dict[str, list[int]] = {}
        for each in asked:
            with suppress(ArenaError):  # told when its turn comes
                _, tree = self._pool(each.order.task)
                places = draw(each.seed, tree)
                first = list(islice(places, each.order.validators))
                self._orders[each.seed] = chain(first, places)
                soon.setdefault(each.order.task, []).extend(place.leaf_index for place in first)
        for task, leaf_indices in soon.items():
            pool, _ = self._pool(task)
            window = quotas.window_at(pool, self._now)
            self.seating.look(task, version=pool.version, window=window, leaf_indices=leaf_indices)

    def _draw(self, asked: _Asked) -> tuple[Draw, Picked]:
        order = asked.order
        pool, tree = self._pool(order.task)
        places = self._orders.pop(asked.seed, None) or draw(asked.seed, tree)
        drawing = Drawing(asked.name, pool, pool.version, tree, asked.seed, places, order.submitter, order.paused)
        most_places = None if asked.to_its_end else MOST_PLACES_AT_ONCE
        picked = pick(self.seating, drawing, wanted=order.validators, now=self._now, most_places=most_places)
        _check_picked(picked, order.validators, pool, self._now)
        self.seating.use(order.task, quotas.window_at(pool, self._now), picked.charges.values())
        drawn = Draw(
            draw=asked.name,
            task=order.task,
            submission=order.submission,
            round=order.round,
            anchor=order.anchor,
            sigma=asked.sigma,
            reveal_salt=order.reveal_salt,
            seed=asked.seed,
            pool_root=pool.root,
            pool_weight=tree.total,
            pool_size=len(tree),
            pool_version=pool.version,
            curve=pool.policy.curve,
            assigned=order.validators,
            submitter=order.submitter,
            places=tuple(proved(tree, picked.places)),
            draw_time=self._now,
        )
        return drawn, picked

    def _pool(self, task: str) -> tuple[Pool, SumTree]:
        """An open pool with its tree. Raises NotFound, and FailedPrecondition for a closed one."""
        if task not in self._pools:
            pool = open_pool(self._transaction, task)
            self._pools[task] = pool, self._trees.current(self._transaction, pool)
        return self._pools[task]


def find_draw(transaction: Transaction, name: str) -> Draw:
    """A draw by its id. Raises NotFound."""
    known = transaction.draws([name]).get(name)
    if known is None:
        raise NotFound("DRAW_NOT_FOUND", "there is no such draw", draw=name)
    return known


def _same(known: Draw, order: DrawOrder) -> Draw:
    arguments = (order.anchor, order.reveal_salt, order.validators, order.submitter)
    if (known.anchor, known.reveal_salt, known.assigned, known.submitter) != arguments:
        raise AlreadyExists(
            "DRAW_EXISTS",
            "this submission and round was drawn with another anchor, salt, submitter or number",
            draw=known.draw,
        )
    return known


def _counts(places: Sequence[DrawnPlace]) -> dict[str, str]:
    passed_over = Counter(place.passed_over for place in places)
    return {reason.value: str(passed_over[reason]) for reason in PassedOverReason if passed_over[reason]}


def _check_picked(picked: Picked, wanted: int, pool: Pool, now: datetime) -> None:
    """Raises FailedPrecondition, or ResourceExhausted, unless as many were picked as were wanted."""
    if len(picked.charges) == wanted:
        return
    counts = _counts(picked.places)
    eligible, used_up = len(picked.charges), int(counts.get(PassedOverReason.QUOTA.value, "0"))
    described = ", ".join(f"{number} {reason}" for reason, number in counts.items()) or "nobody"
    message = f"{wanted} validators are wanted and {eligible} owner groups are eligible; passed over: {described}"
    metadata = {"eligible": str(eligible), "wanted": str(wanted), **counts}
    refill_time = quotas.refill_time(pool, now)
    if used_up:
        metadata["refill_time"] = refill_time.isoformat()
    if eligible + used_up >= wanted:
        wait_s = (refill_time - now).total_seconds()
        raise ResourceExhausted("QUOTA_USED_UP", message, retry_after_s=wait_s, **metadata)
    raise FailedPrecondition("NOT_ENOUGH_VALIDATORS", message, **metadata)
