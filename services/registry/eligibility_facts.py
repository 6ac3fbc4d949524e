"""What the registry tells the selector of somebody's merits when a role is asked for, and somebody who is refused."""

from collections.abc import Collection

from services.registry.records import Verdict
from services.registry.selection import EligibilityFacts
from services.registry.transaction import Reading
from services.runtime.errors import FailedPrecondition


def facts_of(tx: Reading, participant: str, *, field: str | None, trusted: Collection[str]) -> EligibilityFacts:
    """The track record outside of the participant's own owner group, and trusted endorsers in `field`, or in any."""
    endorsers = (e.endorser for e in tx.endorsements(participant, by=trusted) if field in (None, e.field))
    return EligibilityFacts(
        track_record=tuple(tx.track_record(participant, outside_owner_group_of=participant)),
        endorsers=tuple(sorted(set(endorsers))),
    )


def not_eligible(verdict: Verdict) -> FailedPrecondition:
    """What somebody is told whom a verdict refuses."""
    return FailedPrecondition("NOT_ELIGIBLE", verdict.explanation or "not eligible for this role")
