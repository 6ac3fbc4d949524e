"""The record log as outsiders read it: signed checkpoints, leaves in order, and proofs."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from services.registry.entries import Genesis, LedgerEventSeen
from services.registry.selection import Selection
from services.registry.transaction import Leaf, Reading, Store, Writing
from services.runtime.errors import FailedPrecondition, OutOfRange
from tiltyard.identity import Key
from tiltyard.telemetry import metrics, tracing
from tiltyard.transparency import (
    EMPTY_ROOT,
    Checkpoint,
    ReadNode,
    checkpoint_body,
    consistency_proof,
    inclusion_proof,
    sign_note,
)

T = TypeVar("T")

MAX_PAGE_BYTES = 2 * 1024 * 1024
_EVENTS_A_TURN = 500
_SIGNED = metrics.Gauge(
    "tiltyard.log.checkpoint.time",
    unit="s",
    description="When the newest checkpoint was signed, or this process began where none was, in Unix time.",
)
_DIVERGED = metrics.Gauge(
    "tiltyard.log.ledger.diverged",
    unit="{ledger}",
    description="1 while the selector's ledger is not the one that the record log has followed so far, else 0.",
)
_LEAVES_A_READ = 100


@dataclass(frozen=True)
class SignedCheckpoint:
    """The log at one size, with the note that says so."""

    checkpoint: Checkpoint
    note: str
    sign_time: datetime


@dataclass(frozen=True)
class InclusionProof:
    """That a leaf is in the tree of a size."""

    leaf_hash: bytes
    tree_size: int
    path: tuple[bytes, ...]


@dataclass(frozen=True)
class ConsistencyProof:
    """That an older tree is a beginning of the tree of `new_size`."""

    new_size: int
    path: tuple[bytes, ...]


class RecordLog:
    """Signs and serves the log; the leaves are appended by whoever changes a state."""

    def __init__(
        self, store: Store, selection: Selection, clock: Callable[[], datetime], *, origin: str, key: Key
    ) -> None:
        self._store = store
        self._selection = selection
        self._clock = clock
        self._origin = origin
        self._key = key

    async def begin(self, *, operators: Collection[str]) -> None:
        """Write leaf 0 where there is none: who runs this arena. Raises Unavailable without the selector.

        FailedPrecondition where it names another log key or origin than this registry has.
        """
        # Where nobody ever comes for a checkpoint, that is to be noticed, too.
        _SIGNED.set(self._clock().timestamp())
        begun = await self._store.read(lambda tx: tx.genesis())
        if begun is not None:
            self._check_own(begun)
            return
        genesis = Genesis(
            origin=self._origin,
            log_key=self._key.public_bytes,
            selector_key=await self._selection.selector_key(),
            operators=tuple(sorted(operators)),
        )

        def work(tx: Writing) -> None:
            if tx.log_size() == 0:
                tx.append(genesis)

        await self._store.write(work)

    def _check_own(self, begun: Genesis) -> None:
        """What is signed in another name or with another key than the log's own would be taken for a forgery."""
        if begun.origin != self._origin:
            raise FailedPrecondition(
                "LOG_OF_ANOTHER_ORIGIN", f"the record log is that of {begun.origin}, and this registry {self._origin}"
            )
        if begun.log_key != self._key.public_bytes:
            raise FailedPrecondition(
                "LOG_OF_ANOTHER_KEY",
                "the record log was begun with another log key: bring back log.pem of the state folder from the backup",
            )

    async def checkpoint(self) -> SignedCheckpoint:
        """The log as it is, signed."""
        size, root = await self._store.read(lambda tx: tx.log_root())
        checkpoint = Checkpoint(self._origin, size, root)
        note = sign_note(self._key, name=self._origin, body=checkpoint_body(checkpoint))
        signed = SignedCheckpoint(checkpoint, note, self._clock())
        _SIGNED.set(signed.sign_time.timestamp())
        return signed

    async def entries(self, *, start: int, limit: int) -> Sequence[Leaf]:
        """Leaves in order; at least one where there is one, and at most 2 MiB otherwise. Raises OutOfRange."""

        def read(tx: Reading) -> Sequence[Leaf]:
            _check_within(start, tx.log_size())
            found: list[Leaf] = []
            size_bytes = 0
            while len(found) < limit:
                wanted = min(_LEAVES_A_READ, limit - len(found))
                leaves = tx.leaves(start=start + len(found), limit=wanted)
                for leaf in leaves:
                    size_bytes += len(leaf.entry)
                    if found and size_bytes > MAX_PAGE_BYTES:
                        return found
                    found.append(leaf)
                if len(leaves) < wanted:
                    break
            return found

        return await self._store.read(read)

    async def prove_inclusion(self, *, index: int, tree_size: int) -> InclusionProof:
        """That a leaf is in the tree of a size, 0 for the newest. Raises OutOfRange."""

        def read(tx: Reading) -> InclusionProof:
            size = tree_size or tx.log_size()
            _check_within(size, tx.log_size())
            if index >= size:
                raise OutOfRange("BEYOND_LOG", f"there is no leaf {index} in a tree of {size}", size=str(size))
            leaf, path = read_nodes(tx, lambda node: (node(0, index), inclusion_proof(index, size, node)))
            return InclusionProof(leaf, size, tuple(path))

        return await self._store.read(read)

    async def prove_consistency(self, *, old_size: int, new_size: int) -> ConsistencyProof:
        """That the tree of one size is a beginning of another, 0 for the newest. Raises OutOfRange."""

        def read(tx: Reading) -> ConsistencyProof:
            size = new_size or tx.log_size()
            _check_within(size, tx.log_size())
            _check_within(old_size, size)
            path = read_nodes(tx, lambda node: consistency_proof(old_size, size, node))
            return ConsistencyProof(size, tuple(path))

        return await self._store.read(read)

    async def take_ledger_events(self) -> int:
        """A step of the referee: changes of the selector's state become leaves, each once and in order.

        Raises FailedPrecondition(LEDGER_DIVERGED), and takes nothing, where the selector does not know the last one.
        """
        taken, _ = await self._take_page()
        return taken

    async def catch_up(self) -> bool:
        """Take more of the selector's ledger; whether the log holds by now all that there was when this was asked.

        Raises as `take_ledger_events` does, and Unavailable.
        """
        _, is_last = await self._take_page()
        return is_last

    async def _take_page(self) -> tuple[int, bool]:
        """How many events have become leaves, and whether these are the last that there were."""
        position, digest = await self._store.look_up(lambda tx: (tx.ledger_position(), tx.ledger_digest()))
        # Asked every second, whether there is anything or not.
        with tracing.untraced():
            events = await self._events_from(position, digest)
        is_last = len(events) < _EVENTS_A_TURN
        if not events or events[-1][0] == position:
            return 0, is_last

        def work(tx: Writing) -> int:
            taken = 0
            for sequence, event in events:
                if sequence == tx.ledger_position() + 1:
                    tx.append(LedgerEventSeen(event))
                    tx.set_ledger_position(sequence, _digest(event))
                    taken += 1
            return taken

        return await self._store.write(work), is_last

    async def _events_from(self, position: int, digest: bytes | None) -> Sequence[tuple[int, bytes]]:
        """Those from `position` on, the one there, which is a leaf already, with this digest.

        A selector from an older backup gives the numbers of the events that it has lost to others. These would never
        become leaves, and once there are more of them than were lost, numbers alone would not tell.
        """
        try:
            events = await self._selection.ledger_events(start=max(position, 1), limit=_EVENTS_A_TURN)
        except OutOfRange:
            events = ()
        diverged = position > 0 and (not events or digest not in (None, _digest(events[0][1])))
        _DIVERGED.set(int(diverged))
        if diverged:
            raise FailedPrecondition(
                "LEDGER_DIVERGED",
                f"the selector's ledger does not hold event {position} as the record log has it: it is from an older "
                "backup than the registry, or another selector's",
                sequence=str(position),
            )
        return events


def _digest(event: bytes) -> bytes:
    return hashlib.sha256(event).digest()


def read_nodes(tx: Reading, prove: Callable[[ReadNode], T]) -> T:
    """What `prove` makes of the log's nodes, which are read in one go: what it asks for depends on sizes alone."""
    wanted: list[tuple[int, int]] = []

    def note(level: int, index: int) -> bytes:
        wanted.append((level, index))
        return EMPTY_ROOT

    prove(note)
    nodes = tx.log_nodes(wanted)
    return prove(lambda level, index: nodes[level, index])


def _check_within(position: int, size: int) -> None:
    if position > size:
        raise OutOfRange("BEYOND_LOG", f"the log has {size} leaves", size=str(size))
