"""`tiltyard log`: the record log's checkpoint and its entries."""

import base64
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
    run,
)
from tiltyard.cli.output import as_json, print_json

app = typer.Typer(help="Read the record log.", no_args_is_help=True)

_MOST_LEAVES = 2**63 - 1  # as many as the contract can count


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


@app.command("inclusion")
def inclusion(
    index: Annotated[int, typer.Argument(min=0, max=_MOST_LEAVES, help="Index of the leaf, from 0.")],
    key: KeyOption,
    size: Annotated[int, typer.Option(min=0, max=_MOST_LEAVES, help="Size of the tree; 0 for the newest.")] = 0,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Prove that a leaf is in the log.

    Checked against the signed checkpoint where it is of the same size.
    """
    from tiltyard.registry.v1 import log_pb2
    from tiltyard.transparency import leaf_hash, verify_inclusion

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            checkpoint = (await client.log.GetCheckpoint(log_pb2.GetCheckpointRequest())).checkpoint
            wanted = size or checkpoint.size
            request = log_pb2.GetInclusionProofRequest(index=index, tree_size=wanted)
            proof = await client.log.GetInclusionProof(request)
            entries = await client.log.ListEntries(log_pb2.ListEntriesRequest(start_index=index, page_size=1))
        leaf = leaf_hash(entries.leaves[0].entry) if entries.leaves else b""
        proved = wanted == checkpoint.size and verify_inclusion(
            leaf=leaf, index=index, size=wanted, path=list(proof.path), root=checkpoint.root_hash
        )
        if leaf != proof.leaf_hash or (wanted == checkpoint.size and not proved):
            raise CommandError(f"leaf {index} is not in the log of {wanted} leaves that the checkpoint signs")
        document = {
            "index": index,
            "tree_size": wanted,
            "leaf_hash": leaf.hex(),
            "path": [each.hex() for each in proof.path],
            "root_hash": checkpoint.root_hash.hex() if proved else None,
            "proved": proved,
        }
        if json:
            print_json(document)
            return
        print(f"leaf {index} of {wanted}, hash {leaf.hex()}" + (", is under the signed root" if proved else ""))
        for each in proof.path:
            print(f"  {each.hex()}")

    run(work())


@app.command("consistency")
def consistency(
    old_size: Annotated[int, typer.Argument(min=0, max=_MOST_LEAVES, help="Size of the older tree.")],
    new_size: Annotated[int, typer.Argument(min=0, max=_MOST_LEAVES, help="Size of the newer tree; 0 for the newest.")],
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Prove that the log of one size begins that of another."""
    from tiltyard.registry.v1 import log_pb2

    async def work() -> None:
        request = log_pb2.GetConsistencyProofRequest(old_size=old_size, new_size=new_size)
        async with connect(key, origin, registry) as client:
            proof = await client.log.GetConsistencyProof(request)
        path = [each.hex() for each in proof.path]
        if json:
            print_json({"old_size": old_size, "new_size": proof.new_size, "path": path})
            return
        print(f"{old_size} leaves are a beginning of {proof.new_size} by")
        for each in path:
            print(f"  {each}")

    run(work())


@app.command("entries")
def entries(
    key: KeyOption,
    start: Annotated[int, typer.Option(min=0, max=_MOST_LEAVES, help="First index, from 0.")] = 0,
    limit: Annotated[int, typer.Option(min=0, help="At most this many; 0 for all.")] = 100,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """List entries of the log.

    With --json each with its bytes as they were hashed.
    """
    from google.protobuf.message import DecodeError

    from tiltyard.registry.v1 import log_pb2
    from tiltyard.type.v1 import log_pb2 as log_type_pb2

    def read(leaf: log_pb2.Leaf) -> log_type_pb2.LogEntry:
        try:
            return log_type_pb2.LogEntry.FromString(leaf.entry)
        except DecodeError:
            raise CommandError(f"leaf {leaf.index} is not a LogEntry") from None

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
        parsed = [(leaf, read(leaf)) for leaf in found]
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
