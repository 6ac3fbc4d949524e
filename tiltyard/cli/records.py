"""`tiltyard log`: the record log's checkpoint and its entries."""

import base64
from typing import Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    JsonOption,
    KeyOption,
    OriginOption,
    RegistryOption,
    connect,
    run,
)
from tiltyard.cli.output import as_json, print_json

app = typer.Typer(help="Read the record log.", no_args_is_help=True)


@app.command("checkpoint")
def checkpoint(
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Print the signed checkpoint of the log as it is."""
    from tiltyard.registry.v1 import log_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            found = (await client.log.GetCheckpoint(log_pb2.GetCheckpointRequest())).checkpoint
        print_json(as_json(found)) if json else print(found.note, end="")

    run(work())


@app.command("entries")
def entries(
    key: KeyOption,
    start: Annotated[int, typer.Option(help="First index, from 0.")] = 0,
    limit: Annotated[int, typer.Option(help="At most this many; 0 for all.")] = 100,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """List entries of the log; with --json each with its bytes as they were hashed."""
    from tiltyard.registry.v1 import log_pb2
    from tiltyard.type.v1 import log_pb2 as log_type_pb2

    async def work() -> None:
        found: list[log_pb2.Leaf] = []
        async with connect(key, origin, registry) as client:
            while not limit or len(found) < limit:
                size = min(1000, limit - len(found)) if limit else 1000
                request = log_pb2.ListEntriesRequest(start_index=start + len(found), page_size=size)
                leaves = (await client.log.ListEntries(request)).leaves
                if not leaves:
                    break
                found += leaves
        parsed = [(leaf, log_type_pb2.LogEntry.FromString(leaf.entry)) for leaf in found]
        if json:
            documents = [
                {"index": leaf.index, "entry": as_json(entry), "bytes": base64.b64encode(leaf.entry).decode()}
                for leaf, entry in parsed
            ]
            print_json({"entries": documents})
            return
        for leaf, entry in parsed:
            kind = entry.WhichOneof("entry") or "unknown"
            print(f"{leaf.index:>6}  {entry.time.ToJsonString()}  {kind}")

    run(work())
