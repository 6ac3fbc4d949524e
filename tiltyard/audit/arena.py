"""The arena: its beginning, its outages, its participants with their owners, and who endorses whom."""

from tiltyard.audit.names import Form, demand_name
from tiltyard.audit.reading import Reading
from tiltyard.audit.wrong import Claim, demand, moment_ns
from tiltyard.identity import participant_id
from tiltyard.type.v1 import envelope_pb2, log_pb2


def began(reading: Reading, index: int, leaf: bytes, genesis: log_pb2.Genesis) -> None:
    """The first leaf names the arena and its keys."""
    reading.story.origin, reading.story.selector_key = genesis.origin, genesis.selector_key
    for operator in genesis.operators:
        demand_name(operator, Form.PARTICIPANT, Claim.HISTORY)


def outage_ended(reading: Reading, index: int, leaf: bytes, entry: log_pb2.OutageEnded) -> None:
    """The registry is back, at the time of this leaf."""
    back_ns = moment_ns(entry.back, Claim.HISTORY, "the end of an outage")
    right = back_ns == reading.time_ns
    right = right and moment_ns(entry.last_alive, Claim.HISTORY, "the beginning of an outage") < back_ns
    demand(right, Claim.HISTORY, "an outage ends at another time than it is told, or before it began")


def participant_registered(reading: Reading, index: int, leaf: bytes, entry: log_pb2.ParticipantRegistered) -> None:
    """Somebody registers, under the id of the key."""
    named = f"participants/{participant_id(entry.public_key)}"
    demand(named == entry.participant, Claim.HISTORY, f"{entry.participant} is not the id of its key")
    reading.story.participants[entry.participant] = entry.display_name


def owner_bound(reading: Reading, index: int, leaf: bytes, entry: log_pb2.OwnerBound) -> None:
    """An owner vouches for a participant."""
    # An owner vouches with a key of its own, and takes part in nothing.
    said, signer = reading.open(entry.statement, envelope_pb2.OwnerStatement, by_participant=False)
    known = said.participant in reading.story.participants
    demand(known, Claim.HISTORY, f"{said.participant} is owned, and has not registered")
    demand(said.owner == signer, Claim.ENVELOPES, f"{said.owner} did not sign, {signer} did")
    reading.story.owners[said.participant] = said.owner


def endorsement_changed(reading: Reading, index: int, leaf: bytes, entry: log_pb2.EndorsementChanged) -> None:
    """A participant endorses another in a field, or takes that back."""
    said, signer = reading.open(entry.statement, envelope_pb2.EndorsementStatement)
    demand(said.endorser == signer, Claim.ENVELOPES, f"{said.endorser} did not sign, {signer} did")
    known = said.subject in reading.story.participants
    demand(known, Claim.HISTORY, f"{said.subject} is endorsed, and has not registered")
    if not said.revoke:
        reading.story.endorsements.add((said.endorser, said.subject, said.field))
