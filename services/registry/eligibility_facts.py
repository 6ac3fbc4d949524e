"""What the registry tells the selector of somebody's merits when a role is asked for."""

from collections.abc import Collection

from services.registry.selection import EligibilityFacts
from services.registry.transaction import Reading


def facts_of(tx: Reading, participant: str, *, field: str, trusted: Collection[str]) -> EligibilityFacts:
    """The track record outside of the participant's own owner group, and trusted endorsers in `field`."""
    endorsers = (e.endorser for e in tx.endorsements(participant, by=trusted) if e.field == field)
    return EligibilityFacts(
        track_record=tuple(tx.track_record(participant, outside_owner_group_of=participant)),
        endorsers=tuple(sorted(set(endorsers))),
    )
