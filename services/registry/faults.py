"""Faults of validators: listed for everybody, and taken to the selector, which knows what each costs."""

from collections.abc import Sequence
from contextlib import suppress

from services.registry.listing import Listing, Place
from services.registry.records import ValidatorFault
from services.registry.referee.turns import each
from services.registry.selection import Selection
from services.registry.transaction import Store, Writing
from services.runtime.errors import AlreadyExists
from services.runtime.names import AssignmentId, format_assignment

_SLASHED_A_TURN = 64


class ValidatorFaults:
    """What drawn validators owed; `rounds.record_fault` writes it down."""

    def __init__(self, store: Store, selection: Selection) -> None:
        self._store = store
        self._selection = selection

    async def page(
        self, listing: Listing, *, task: str | None, validator: str | None
    ) -> Sequence[tuple[Place, ValidatorFault]]:
        """Those in one task, or of one validator."""
        return await self._store.read(lambda tx: tx.validator_faults(listing, task=task, validator=validator))

    async def slash(self) -> int:
        """A step of the referee: every fault that costs stake is told to the selector, which takes it once."""

        async def slash_one(found: tuple[int, ValidatorFault]) -> int:
            position, fault = found
            duty = AssignmentId(fault.task, fault.number, fault.round, fault.validator)
            # Its book is the truth: evidence that it knows, for another fault, is of an arena before a restored backup.
            with suppress(AlreadyExists):
                await self._selection.slash(fault.validator, fault.kind, evidence=format_assignment(duty))

            def note(tx: Writing) -> int:
                tx.note_slashed(position)
                return 1

            return await self._store.write(note)

        if not await self._store.finds(lambda tx: tx.faults_unslashed(limit=1)):
            return 0
        return await each(await self._store.read(lambda tx: tx.faults_unslashed(limit=_SLASHED_A_TURN)), slash_one)
