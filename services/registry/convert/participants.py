"""Participants and their statements in the contract's words."""

import re

from services.registry.convert.envelopes import envelope, open_own_statement, open_statement
from services.registry.convert.times import timestamp
from services.registry.participants import Profile
from services.runtime import names
from services.runtime.fields import FieldChecks
from tiltyard.endpoints import parse_endpoint
from tiltyard.identity import Envelope
from tiltyard.registry.v1 import participant_pb2
from tiltyard.type.v1 import envelope_pb2

FIELD_OF_EXPERTISE = re.compile("[a-z0-9-]{1,63}")
MAX_NAME_CHARS = 100


def registration_of(request: participant_pb2.RegisterParticipantRequest) -> tuple[str, str | None]:
    """The name for people, and the endpoint where one is given (empty: none any more), checked."""
    checks = FieldChecks()
    checks.text("display_name", request.display_name, max_chars=MAX_NAME_CHARS)
    if request.endpoint:
        try:
            parse_endpoint(request.endpoint)
        except ValueError as error:
            checks.fail("endpoint", str(error))
    checks.finish()
    return request.display_name, request.endpoint if request.HasField("endpoint") else None


def owner_of(request: participant_pb2.BindOwnerRequest, *, origin: str, caller: str) -> tuple[str, Envelope]:
    """The owner who signed that it owns the caller, and the statement as it came."""
    statement, signer = open_statement(request.statement, envelope_pb2.OwnerStatement, origin=origin)
    checks = FieldChecks()
    checks.require("statement.owner", statement.owner == names.format_participant(signer), "is not the signer")
    about_caller = statement.participant == names.format_participant(caller)
    checks.require("statement.participant", about_caller, "is not the caller")
    checks.finish()
    return signer, envelope(request.statement)


def endorsement_of(
    request: participant_pb2.EndorseParticipantRequest | participant_pb2.RevokeEndorsementRequest,
    *,
    origin: str,
    caller: str,
    revoke: bool,
) -> tuple[str, str, Envelope]:
    """The subject, the field of expertise, and the statement as it came."""
    statement = open_own_statement(request.statement, envelope_pb2.EndorsementStatement, origin=origin, caller=caller)
    checks = FieldChecks()
    checks.require("statement.endorser", statement.endorser == names.format_participant(caller), "is not the signer")
    fits = FIELD_OF_EXPERTISE.fullmatch(statement.field)
    checks.require("statement.field", fits, "must be 1 to 63 characters of a-z, 0-9 and -")
    wanted = "must be set here" if revoke else "must not be set here"
    checks.require("statement.revoke", statement.revoke is revoke, wanted)
    checks.finish()
    return names.parse_participant(statement.subject, "statement.subject"), statement.field, envelope(request.statement)


def participant_message(profile: Profile) -> participant_pb2.Participant:
    """A participant with its endorsements."""
    participant = profile.participant
    return participant_pb2.Participant(
        name=names.format_participant(participant.id),
        display_name=participant.display_name,
        public_key=participant.public_key,
        owner="" if participant.owner is None else names.format_participant(participant.owner),
        endorsements=[
            participant_pb2.Endorsement(
                endorser=names.format_participant(endorsement.endorser),
                field=endorsement.field,
                trusted=endorsement.trusted,
                create_time=timestamp(endorsement.create_time),
            )
            for endorsement in profile.endorsements
        ],
        create_time=timestamp(participant.create_time),
        endpoint=participant.endpoint,
    )


def registered_message(profile: Profile) -> participant_pb2.RegisterParticipantResponse:
    """The answer of RegisterParticipant."""
    return participant_pb2.RegisterParticipantResponse(participant=participant_message(profile))


def bound_message(profile: Profile) -> participant_pb2.BindOwnerResponse:
    """The answer of BindOwner."""
    return participant_pb2.BindOwnerResponse(participant=participant_message(profile))


def endorsed_message(profile: Profile) -> participant_pb2.EndorseParticipantResponse:
    """The answer of EndorseParticipant."""
    return participant_pb2.EndorseParticipantResponse(participant=participant_message(profile))


def revoked_message(profile: Profile) -> participant_pb2.RevokeEndorsementResponse:
    """The answer of RevokeEndorsement."""
    return participant_pb2.RevokeEndorsementResponse(participant=participant_message(profile))
