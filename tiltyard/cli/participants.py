"""`tiltyard participant`: register a key, vouch for others, bind to an owner."""

from pathlib import Path
from typing import Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    CommandError,
    JsonOption,
    KeyOption,
    OriginOption,
    RegistryOption,
    connect,
    participant_name,
    run,
)
from tiltyard.cli.output import print_json, print_message, print_table

app = typer.Typer(help="Register, list and endorse participants.", no_args_is_help=True)

WhoArgument = Annotated[str, typer.Argument(metavar="PARTICIPANT", help="participants/{id} or the id.")]


@app.command("register")
def register(
    name: Annotated[str, typer.Argument(help="Name for people, 1 to 100 characters.")],
    key: KeyOption,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="A training node's own inference server, grpc://HOST:PORT or grpcs://HOST:PORT; '' for none."
        ),
    ] = None,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Register the key under NAME.

    Registering again changes the name, and the endpoint where one is given.
    """
    from tiltyard.client import new_request_id
    from tiltyard.registry.v1 import participant_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            request = participant_pb2.RegisterParticipantRequest(
                display_name=name, endpoint=endpoint, request_id=new_request_id()
            )
            answer = await client.participants.RegisterParticipant(request)
        print_message(answer.participant, as_document=json)

    run(work())


@app.command("get")
def get(
    key: KeyOption,
    participant: Annotated[str, typer.Argument(help="participants/{id} or the id; the key's own when left out.")] = "",
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Show one participant."""
    from tiltyard.registry.v1 import participant_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            name = participant_name(participant) if participant else client.participant
            answer = await client.participants.GetParticipant(participant_pb2.GetParticipantRequest(name=name))
        print_message(answer.participant, as_document=json)

    run(work())


@app.command("list")
def list_participants(
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """List all participants in order of registration."""
    from tiltyard.cli.output import as_json
    from tiltyard.client import pages
    from tiltyard.registry.v1 import participant_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            request = participant_pb2.ListParticipantsRequest(page_size=1000)
            found = [
                each
                async for page in pages(client.participants.ListParticipants, request)
                for each in page.participants
            ]
        if json:
            print_json({"participants": [as_json(each) for each in found]})
        else:
            print_table(
                ("participant", "name", "endorsements"),
                ((each.name, each.display_name, len(each.endorsements)) for each in found),
            )

    run(work())


@app.command("endorse")
def endorse(
    participant: WhoArgument,
    key: KeyOption,
    field: Annotated[str, typer.Option(help="Field of expertise, [a-z0-9-].")] = "general",
    revoke: Annotated[bool, typer.Option("--revoke", help="Take an earlier endorsement back.")] = False,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Vouch for PARTICIPANT in a field of expertise."""
    from tiltyard.client import new_request_id
    from tiltyard.registry.v1 import participant_pb2
    from tiltyard.statements import sign_statement
    from tiltyard.type.v1 import envelope_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            statement = envelope_pb2.EndorsementStatement(
                origin=origin,
                endorser=client.participant,
                subject=participant_name(participant),
                field=field,
                revoke=revoke,
            )
            signed, request_id = sign_statement(client.key, statement), new_request_id()
            if revoke:
                taken = participant_pb2.RevokeEndorsementRequest(statement=signed, request_id=request_id)
                print_message((await client.participants.RevokeEndorsement(taken)).participant, as_document=json)
            else:
                given = participant_pb2.EndorseParticipantRequest(statement=signed, request_id=request_id)
                print_message((await client.participants.EndorseParticipant(given)).participant, as_document=json)

    run(work())


@app.command("bind-owner")
def bind_owner(
    statement: Annotated[Path, typer.Argument(help="Envelope from the owner's `tiltyard sign owner`, as JSON.")],
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Bind the key to an owner: in draws both count as one."""
    from google.protobuf.json_format import Parse, ParseError

    from tiltyard.client import new_request_id
    from tiltyard.registry.v1 import participant_pb2
    from tiltyard.type.v1 import envelope_pb2

    def read() -> envelope_pb2.Envelope:
        try:
            return Parse(statement.read_text(encoding="utf-8"), envelope_pb2.Envelope())
        except (ParseError, UnicodeDecodeError) as error:
            raise CommandError(f"{statement} holds no Envelope as JSON: {error}") from None

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            request = participant_pb2.BindOwnerRequest(statement=read(), request_id=new_request_id())
            answer = await client.participants.BindOwner(request)
        print_message(answer.participant, as_document=json)

    run(work())
