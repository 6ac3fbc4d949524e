"""Key holders: their names for people, their owners, and who vouches for them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from services.registry.daily import Daily
from services.registry.entries import EndorsementChanged, OwnerBound, ParticipantRegistered
from services.registry.listing import Listing, Place
from services.registry.records import Endorsement, Participant
from services.registry.selection import Selection
from services.registry.transaction import Reading, Store, Writing
from services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound
from tiltyard.identity import Envelope

# Anybody endorses whom it likes, in as many fields as it likes, and whoever is endorsed is to stay readable.
_SHOWN_ENDORSEMENTS = 100


@dataclass(frozen=True)
class Profile:
    """A participant with endorsements in force: 100 at most whose word counts, and 100 at most of all."""

    participant: Participant
    endorsements: tuple[Endorsement, ...]


class Participants:
    """Knows the key holders. The words of `trusted` participants count for eligibility.

    All changes are open to whoever has made a key, and so are counted by `daily`: they raise ResourceExhausted.
    """

    def __init__(self, store: Store, selection: Selection, daily: Daily, *, trusted: Collection[str]) -> None:
        self._store = store
        self._selection = selection
        self._daily = daily
        self._trusted = frozenset(trusted)

    async def register(
        self, caller: str, *, public_key: bytes, display_name: str, endpoint: str | None = None
    ) -> Profile:
        """Record the caller's key and name; registering again changes the name, and the endpoint unless it is None."""

        def work(tx: Writing) -> Profile:
            known = tx.participant(caller)
            participant = replace(
                known or Participant(caller, display_name, public_key, None, tx.now), display_name=display_name
            )
            if endpoint is not None:
                participant = replace(participant, endpoint=endpoint)
            if participant == known:
                return self._profile(tx, known)
            tx.put_participant(participant)
            tx.append(ParticipantRegistered(caller, public_key, display_name, participant.endpoint))
            return self._profile(tx, participant)

        # Also where nothing changes: an answer that is kept for its request's id takes room, too.
        self._daily.count_stranger()
        return await self._store.write(work)

    async def get(self, participant: str) -> Profile:
        """One participant. Raises NotFound."""
        return await self._store.read(lambda tx: self._profile(tx, _known(tx, participant)))

    async def page(self, listing: Listing) -> Sequence[tuple[Place, Profile]]:
        """Participants, each with its place."""

        def read(tx: Reading) -> Sequence[tuple[Place, Profile]]:
            return [(place, self._profile(tx, participant)) for place, participant in tx.participants(listing)]

        return await self._store.read(read)

    async def bind_owner(self, caller: str, *, owner: str, statement: Envelope) -> Profile:
        """Bind the caller to who signed the statement. Raises FailedPrecondition(OWNER_BOUND, NOT_REGISTERED)."""
        if owner == caller:
            raise InvalidArgument.field("statement.owner", "is the caller itself")

        def bindable(tx: Reading) -> Participant:
            participant = registered(tx, caller)
            if participant.owner not in (None, owner):
                raise FailedPrecondition("OWNER_BOUND", "the caller is bound to another owner")
            return participant

        def work(tx: Writing) -> Profile:
            participant = bindable(tx)
            if participant.owner is None:
                participant = replace(participant, owner=owner)
                tx.put_participant(participant)
                tx.append(OwnerBound(statement))
            return self._profile(tx, participant)

        await self._store.read(bindable)
        self._daily.count_stranger()
        # Before it is recorded: nobody is bound in the record of whom the selector has not heard.
        await self._selection.merge_owner_groups(caller, owner=owner)
        return await self._store.write(work)

    async def endorse(self, caller: str, *, subject: str, field: str, statement: Envelope) -> Profile:
        """Record the caller's word for somebody. Raises NotFound, FailedPrecondition(NOT_REGISTERED)."""
        if subject == caller:
            raise InvalidArgument.field("statement.subject", "nobody endorses itself")

        def work(tx: Writing) -> Profile:
            registered(tx, caller)
            participant = _known(tx, subject)
            if tx.endorsement(caller, subject, field) is None:
                tx.put_endorsement(Endorsement(caller, subject, field, tx.now))
                tx.append(EndorsementChanged(statement))
            return self._profile(tx, participant)

        self._daily.count_stranger()
        return await self._store.write(work)

    async def revoke(self, caller: str, *, subject: str, field: str, statement: Envelope) -> Profile:
        """Take the caller's word back. Raises NotFound when there is none."""

        def work(tx: Writing) -> Profile:
            participant = _known(tx, subject)
            if not tx.delete_endorsement(caller, subject, field):
                raise NotFound("ENDORSEMENT_NOT_FOUND", "the caller has not endorsed this participant in this field")
            tx.append(EndorsementChanged(statement))
            return self._profile(tx, participant)

        self._daily.count_stranger()
        return await self._store.write(work)

    def _profile(self, tx: Reading, participant: Participant) -> Profile:
        trusted = tx.endorsements(participant.id, by=self._trusted, limit=_SHOWN_ENDORSEMENTS)
        shown = {*trusted, *tx.endorsements(participant.id, limit=_SHOWN_ENDORSEMENTS)}
        return Profile(
            participant,
            tuple(
                replace(each, trusted=each.endorser in self._trusted)
                for each in sorted(shown, key=lambda e: (e.create_time, e.endorser, e.field))
            ),
        )


def registered(tx: Reading, participant: str) -> Participant:
    """Somebody who acts and so must have registered. Raises FailedPrecondition(NOT_REGISTERED)."""
    known = tx.participant(participant)
    if known is None:
        raise FailedPrecondition("NOT_REGISTERED", "register as a participant first")
    return known


def _known(tx: Reading, participant: str) -> Participant:
    known = tx.participant(participant)
    if known is None:
        raise NotFound("PARTICIPANT_NOT_FOUND", f"there is no participant {participant}")
    return known
