"""ParticipantService over the domain's participants."""

from typing import Any

from services.registry.convert import listings
from services.registry.convert import participants as convert
from services.registry.participants import Participants, Profile
from services.runtime.auth import current_caller
from services.runtime.idempotency import idempotent
from services.runtime.names import parse_participant
from services.runtime.paging import PageTokens
from tiltyard.registry.v1 import participant_pb2, participant_pb2_grpc


class ParticipantServicer(participant_pb2_grpc.ParticipantServiceServicer):
    """The key holders of the arena."""

    def __init__(self, participants: Participants, *, origin: str, tokens: PageTokens) -> None:
        self._participants = participants
        self._origin = origin
        self._tokens = tokens

    @idempotent(answer=convert.registered_message)
    async def RegisterParticipant(self, request: participant_pb2.RegisterParticipantRequest, context: Any) -> Profile:
        caller = current_caller()
        name, endpoint = convert.registration_of(request)
        return await self._participants.register(
            caller.id, public_key=caller.public_key, display_name=name, endpoint=endpoint
        )

    async def GetParticipant(
        self, request: participant_pb2.GetParticipantRequest, context: Any
    ) -> participant_pb2.GetParticipantResponse:
        profile = await self._participants.get(parse_participant(request.name))
        return participant_pb2.GetParticipantResponse(participant=convert.participant_message(profile))

    async def ListParticipants(
        self, request: participant_pb2.ListParticipantsRequest, context: Any
    ) -> participant_pb2.ListParticipantsResponse:
        page = listings.PARTICIPANTS.open(request, self._tokens)
        found = await self._participants.page(page.listing)
        participants, token = page.close(self._tokens, found, convert.participant_message)
        return participant_pb2.ListParticipantsResponse(participants=participants, next_page_token=token)

    @idempotent(answer=convert.bound_message)
    async def BindOwner(self, request: participant_pb2.BindOwnerRequest, context: Any) -> Profile:
        caller = current_caller().id
        owner, statement = convert.owner_of(request, origin=self._origin, caller=caller)
        return await self._participants.bind_owner(caller, owner=owner, statement=statement)

    @idempotent(answer=convert.endorsed_message)
    async def EndorseParticipant(self, request: participant_pb2.EndorseParticipantRequest, context: Any) -> Profile:
        caller = current_caller().id
        subject, field, statement = convert.endorsement_of(request, origin=self._origin, caller=caller, revoke=False)
        return await self._participants.endorse(caller, subject=subject, field=field, statement=statement)

    @idempotent(answer=convert.revoked_message)
    async def RevokeEndorsement(self, request: participant_pb2.RevokeEndorsementRequest, context: Any) -> Profile:
        caller = current_caller().id
        subject, field, statement = convert.endorsement_of(request, origin=self._origin, caller=caller, revoke=True)
        return await self._participants.revoke(caller, subject=subject, field=field, statement=statement)
