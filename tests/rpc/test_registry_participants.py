"""ParticipantService over a real server."""

import grpc
import pytest

from services.registry.records import Endorsement
from services.registry.transaction import Writing
from tests.support.registry_server import ORIGIN, RegistryServer, refused
from tiltyard.client import Client
from tiltyard.identity import Key, issue_token, sign_envelope
from tiltyard.registry.v1 import participant_pb2
from tiltyard.registry.v1.participant_pb2 import (
    BindOwnerRequest,
    EndorseParticipantRequest,
    GetParticipantRequest,
    ListParticipantsRequest,
    RegisterParticipantRequest,
    RevokeEndorsementRequest,
)
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


def owner_statement(owner: Key, owned: str, *, named: str | None = None, origin: str = ORIGIN) -> envelope_pb2.Envelope:
    statement = envelope_pb2.OwnerStatement(
        origin=origin, owner=named or f"participants/{owner.id}", participant=f"participants/{owned}"
    )
    return sign_statement(owner, statement)


def endorsement(
    key: Key, subject: str, *, field: str = "vision", revoke: bool = False, endorser: str | None = None
) -> envelope_pb2.Envelope:
    statement = envelope_pb2.EndorsementStatement(
        origin=ORIGIN,
        endorser=endorser or f"participants/{key.id}",
        subject=f"participants/{subject}",
        field=field,
        revoke=revoke,
    )
    return sign_statement(key, statement)


async def get(client: Client, participant: str) -> participant_pb2.Participant:
    request = GetParticipantRequest(name=f"participants/{participant}")
    return (await client.participants.GetParticipant(request)).participant


async def test_registering_records_the_key_and_again_changes_the_name(arena: RegistryServer) -> None:
    client = await arena.participant("Ada")
    found = await get(client, client.key.id)
    assert (found.display_name, found.public_key) == ("Ada", client.key.public_bytes)
    assert found.create_time.ToDatetime().isoformat() == "2026-01-01T00:00:00"
    await client.participants.RegisterParticipant(RegisterParticipantRequest(display_name="Ada L."))
    assert (await get(client, client.key.id)).display_name == "Ada L."
    assert await arena.kinds() == ["genesis", "participant_registered", "participant_registered"]


async def test_an_endpoint_stays_until_it_is_changed(arena: RegistryServer) -> None:
    client = await arena.participant("Ada")
    for given, stands in (
        (None, ""),
        ("grpcs://node.example:7403", "grpcs://node.example:7403"),
        (None, None),
        ("", ""),
    ):
        before = (await get(client, client.key.id)).endpoint
        await client.participants.RegisterParticipant(RegisterParticipantRequest(display_name="Ada", endpoint=given))
        assert (await get(client, client.key.id)).endpoint == (before if stands is None else stands)
    assert await arena.kinds() == ["genesis", *["participant_registered"] * 3]


@pytest.mark.parametrize(
    "endpoint", ["node.example:7403", "http://node.example:1", "grpc://node.example", "grpc://a b:1"]
)
async def test_what_is_no_endpoint_is_refused(arena: RegistryServer, endpoint: str) -> None:
    client = await arena.participant("Ada")
    with refused(INVALID, field="endpoint"):
        await client.participants.RegisterParticipant(RegisterParticipantRequest(display_name="Ada", endpoint=endpoint))


async def test_the_same_name_again_is_no_news(arena: RegistryServer) -> None:
    await arena.participant("Ada", key=(await arena.participant("Ada")).key)
    assert await arena.kinds() == ["genesis", "participant_registered"]


@pytest.mark.parametrize("name", ["", " ", "x" * 101, "two\nlines", "tab\t", "nul\0", "\u202eevil"])
async def test_bad_names_change_nothing(arena: RegistryServer, name: str) -> None:
    client = await arena.client(Key.generate())
    with refused(INVALID, field="display_name"):
        await client.participants.RegisterParticipant(RegisterParticipantRequest(display_name=name))
    with refused(NOT_FOUND):
        await get(client, client.key.id)


async def test_a_name_that_is_not_utf_8_changes_nothing(arena: RegistryServer) -> None:
    key = Key.generate()
    good = RegisterParticipantRequest(display_name="Ada").SerializeToString()
    token = issue_token(key, audience=f"{ORIGIN}/registry")
    async with grpc.aio.insecure_channel(arena.server.address) as channel:
        register = channel.unary_unary("/tiltyard.registry.v1.ParticipantService/RegisterParticipant")
        with refused(INVALID, "NOT_A_MESSAGE"):
            await register(
                good.replace(b"Ada", b"\xff\xfea"), metadata=(("authorization", f"Bearer {token}"),), timeout=20
            )
    with refused(NOT_FOUND):
        await get(await arena.client(key), key.id)


async def test_a_request_id_answers_once(arena: RegistryServer) -> None:
    client = await arena.client(Key.generate())
    request = RegisterParticipantRequest(display_name="Ada", request_id="r")
    first = await client.participants.RegisterParticipant(request)
    await client.participants.RegisterParticipant(RegisterParticipantRequest(display_name="Other"))
    assert await client.participants.RegisterParticipant(request) == first
    assert (await get(client, client.key.id)).display_name == "Other"
    with refused(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"):
        await client.participants.RegisterParticipant(RegisterParticipantRequest(display_name="B", request_id="r"))


async def test_pages_list_everybody_in_order_and_tokens_are_not_for_other_lists(arena: RegistryServer) -> None:
    keys = [(await arena.participant(f"number {index}")).key for index in range(5)]
    client = await arena.client(keys[0])
    names: list[str] = []
    token, tokens = "", []
    while True:
        page = await client.participants.ListParticipants(ListParticipantsRequest(page_size=2, page_token=token))
        names += [found.name for found in page.participants]
        token = page.next_page_token
        if not token:
            break
        tokens.append(token)
    assert names == [f"participants/{key.id}" for key in keys]
    assert len(tokens) == 2
    for bad in ("forged", tokens[0][:-2] + "xx"):
        with refused(INVALID, field="page_token"):
            await client.participants.ListParticipants(ListParticipantsRequest(page_token=bad))
    with refused(INVALID, field="page_size"):
        await client.participants.ListParticipants(ListParticipantsRequest(page_size=-1))


async def test_an_owner_binds_by_signature_and_for_good(arena: RegistryServer) -> None:
    client, owner = await arena.participant(), Key.generate()
    request = BindOwnerRequest(statement=owner_statement(owner, client.key.id))
    answer = await client.participants.BindOwner(request)
    assert answer.participant.owner == f"participants/{owner.id}"
    assert await client.participants.BindOwner(request) == answer
    with refused(PRECONDITION, "OWNER_BOUND"):
        await client.participants.BindOwner(BindOwnerRequest(statement=owner_statement(Key.generate(), client.key.id)))
    assert (await arena.kinds()).count("owner_bound") == 1
    assert arena.selection.owners == {client.key.id: owner.id}


async def test_nobody_is_bound_of_whom_the_selector_has_not_heard(arena: RegistryServer) -> None:
    client, owner = await arena.participant(), Key.generate()
    request = BindOwnerRequest(statement=owner_statement(owner, client.key.id), request_id="once")
    arena.selection.unavailable = True
    with refused(grpc.StatusCode.UNAVAILABLE):
        await client.participants.BindOwner(request)
    assert (await get(client, client.key.id)).owner == ""
    assert "owner_bound" not in await arena.kinds()
    arena.selection.unavailable = False
    assert (await client.participants.BindOwner(request)).participant.owner == f"participants/{owner.id}"


async def test_owner_statements_about_others_are_refused(arena: RegistryServer) -> None:
    client, owner, stranger = await arena.participant(), Key.generate(), Key.generate()
    own = client.key.id
    unsigned = owner_statement(owner, own)
    unsigned.signature = bytes(64)
    for statement, field in (
        (owner_statement(owner, stranger.id), "statement.participant"),
        (owner_statement(owner, own, named=f"participants/{stranger.id}"), "statement.owner"),
        (owner_statement(client.key, own), "statement.owner"),
        (owner_statement(owner, own, origin="else.where"), "statement.origin"),
        (endorsement(owner, own), "statement"),
        (unsigned, "statement"),
        (envelope_pb2.Envelope(), "statement"),
    ):
        with refused(INVALID, field=field):
            await client.participants.BindOwner(BindOwnerRequest(statement=statement))
    unregistered = await arena.client(Key.generate())
    with refused(PRECONDITION, "NOT_REGISTERED"):
        await unregistered.participants.BindOwner(
            BindOwnerRequest(statement=owner_statement(owner, unregistered.key.id))
        )


async def test_endorsements_show_whom_the_arena_trusts(arena: RegistryServer) -> None:
    subject, friend = await arena.participant(), await arena.participant()
    for endorser in (friend, await arena.participant(key=arena.trusted), await arena.participant(key=arena.operator)):
        request = EndorseParticipantRequest(statement=endorsement(endorser.key, subject.key.id))
        answer = await endorser.participants.EndorseParticipant(request)
        assert await endorser.participants.EndorseParticipant(request) == answer
    found = {e.endorser.removeprefix("participants/"): e.trusted for e in answer.participant.endorsements}
    assert found == {friend.key.id: False, arena.trusted.id: True, arena.operator.id: True}
    assert (await arena.kinds()).count("endorsement_changed") == 3


async def test_whoever_is_endorsed_over_and_over_stays_readable(arena: RegistryServer) -> None:
    subject = await arena.participant()
    strangers = [Endorsement("0" * 40, subject.key.id, f"field-{number}", arena.clock()) for number in range(40_000)]

    def put(tx: Writing) -> None:
        for stranger in strangers:
            tx.put_endorsement(stranger)

    await arena.registry.store.write(put)
    trusted = await arena.participant(key=arena.trusted)
    request = EndorseParticipantRequest(statement=endorsement(arena.trusted, subject.key.id))
    answer = await trusted.participants.EndorseParticipant(request)
    found = await get(subject, subject.key.id)
    assert found == answer.participant
    assert len(found.endorsements) == 101
    assert [e.endorser for e in found.endorsements if e.trusted] == [f"participants/{arena.trusted.id}"]


async def test_an_endorsement_is_taken_back_once(arena: RegistryServer) -> None:
    subject, friend = await arena.participant(), await arena.participant()
    statement = endorsement(friend.key, subject.key.id)
    await friend.participants.EndorseParticipant(EndorseParticipantRequest(statement=statement))
    request = RevokeEndorsementRequest(statement=endorsement(friend.key, subject.key.id, revoke=True))
    assert not (await friend.participants.RevokeEndorsement(request)).participant.endorsements
    with refused(NOT_FOUND, "ENDORSEMENT_NOT_FOUND"):
        await friend.participants.RevokeEndorsement(request)


def signed(key: Key, payload_type: str, payload: bytes) -> envelope_pb2.Envelope:
    envelope = sign_envelope(key, payload_type, payload)
    return envelope_pb2.Envelope(
        payload_type=payload_type, payload=payload, signature=envelope.signature, public_key=envelope.public_key
    )


async def test_bad_endorsements_are_refused(arena: RegistryServer) -> None:
    client, subject = await arena.participant(), await arena.participant()
    key, other = client.key, subject.key
    good = endorsement(key, other.id)
    # A field of a later version, of 4096 bytes.
    unknown = b"\xfa\x7f\x80\x20" + bytes(4096)
    for statement, field in (
        (endorsement(key, key.id), "statement.subject"),
        (endorsement(key, other.id, field="Vision!"), "statement.field"),
        (endorsement(key, other.id, revoke=True), "statement.revoke"),
        (endorsement(key, other.id, endorser=f"participants/{other.id}"), "statement.endorser"),
        (endorsement(key, "nobody"), "statement.subject"),
        (endorsement(other, key.id), "statement"),
        (signed(key, good.payload_type, good.payload + unknown), "statement.payload"),
    ):
        with refused(INVALID, field=field):
            await client.participants.EndorseParticipant(EndorseParticipantRequest(statement=statement))
    with refused(NOT_FOUND, "PARTICIPANT_NOT_FOUND"):
        statement = endorsement(key, Key.generate().id)
        await client.participants.EndorseParticipant(EndorseParticipantRequest(statement=statement))
    assert "endorsement_changed" not in await arena.kinds()


async def test_a_restart_keeps_everything(arena: RegistryServer) -> None:
    key = (await arena.participant("Ada")).key
    before = await arena.kinds()
    await arena.restart()
    client = await arena.client(key)
    assert (await get(client, key.id)).display_name == "Ada"
    assert await arena.kinds() == before
