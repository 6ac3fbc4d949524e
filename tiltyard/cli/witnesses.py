"""`tiltyard log watch`: a witness of the record log, who looks again and again."""

import asyncio
import json as json_module
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiltyard.cli.audits import AnyKeyOption, connect_reader
from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    CommandError,
    JsonOption,
    OriginOption,
    RegistryOption,
    run,
    with_hint,
)

if TYPE_CHECKING:
    from tiltyard.client import Client
    from tiltyard.cosigning import WitnessKey
    from tiltyard.transparency import Checkpoint
    from tiltyard.witness import Witness

ALARM_STATUS = 3
"""Of a log that lied, apart from 1, which a registry that is away or a full disk gives, and 2, of a wrong argument."""


def watch(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the witness keeps its key and what it saw.")],
    key: AnyKeyOption = None,
    once: Annotated[bool, typer.Option("--once", help="Look once, then end.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 10.0,
    name: Annotated[str, typer.Option(help="Name of a new witness, without spaces and plus signs.")] = "",
    against: Annotated[
        list[Path] | None,
        typer.Option(help="A checkpoint that somebody else was shown; may be given several times."),
    ] = None,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Be a witness of the log.

    Keeps each checkpoint, cosigns it, and exits with 3 when the log rewrites or forks its history. With --json one
    document a line.

    A registry that is away, as while it restarts, is looked at again; only with --once that ends the command, with 1.
    """
    import grpc

    from tiltyard.client import explain, is_transient
    from tiltyard.transparency import InvalidNote
    from tiltyard.witness import Alarm, Witness

    async def work() -> None:
        try:
            witness = Witness(folder, name=name)
        except ValueError as error:
            raise CommandError(f"{folder}: {error}") from None
        away = False
        async with connect_reader(key, origin, registry) as client:
            source = RegistrySource(client)
            while True:
                try:
                    checkpoint = await witness.look(source, now_s=int(time.time()))
                    for each in against or ():
                        await _compare(witness, source, each)
                except grpc.aio.AioRpcError as error:
                    if once or not is_transient(error):
                        raise
                    if not away:
                        print(f"{with_hint(explain(error))}; looking again", file=sys.stderr, flush=True)
                    away = True
                except (Alarm, InvalidNote) as alarm:
                    # A note that nobody signed proves nothing against anybody.
                    evidence = str(folder / "alarms") if isinstance(alarm, Alarm) else None
                    if json:
                        _print_line({"alarm": str(alarm), "evidence": evidence})
                    kept = f"; what was shown lies in {evidence}" if evidence else ""
                    print(f"ALARM: {alarm}{kept}", file=sys.stderr)
                    raise typer.Exit(ALARM_STATUS) from None
                except ValueError as error:
                    raise CommandError(str(error)) from None
                else:
                    away = False
                    _tell(checkpoint, witness.public, as_document=json)
                if once:
                    return
                await asyncio.sleep(every)

    run(work())


async def _compare(witness: "Witness", source: "RegistrySource", file: Path) -> None:
    """Raises Alarm for another history, and CommandError for a file that holds no checkpoint of this log."""
    from tiltyard.transparency import InvalidNote

    try:
        await witness.compare(source, await asyncio.to_thread(file.read_text, encoding="utf-8"))
    except (InvalidNote, UnicodeDecodeError) as error:
        raise CommandError(f"{file}: {error}") from None


def _tell(checkpoint: "Checkpoint", witness: "WitnessKey", *, as_document: bool) -> None:
    root = checkpoint.root.hex()
    if as_document:
        _print_line({"size": checkpoint.size, "root": root, "witness": str(witness)})
    else:
        print(f"{checkpoint.size} leaves, root {root}: cosigned by {witness.name}", flush=True)


def _print_line(document: dict[str, Any]) -> None:
    print(json_module.dumps(document), flush=True)


class RegistrySource:
    """A registry as a witness reads it."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    async def note(self) -> str:
        """The present checkpoint."""
        from tiltyard.registry.v1 import log_pb2

        return (await self._client.log.GetCheckpoint(log_pb2.GetCheckpointRequest())).checkpoint.note

    async def leaves(self, *, start: int, end: int) -> Sequence[bytes]:
        """Leaves as they were hashed."""
        from tiltyard.audit.download import fetch_leaves

        return await fetch_leaves(self._client, start=start, end=end)

    async def consistency(self, *, old_size: int, new_size: int) -> Sequence[bytes]:
        """The proof that one size is a beginning of the other."""
        from tiltyard.registry.v1 import log_pb2

        request = log_pb2.GetConsistencyProofRequest(old_size=old_size, new_size=new_size)
        return list((await self._client.log.GetConsistencyProof(request)).path)
