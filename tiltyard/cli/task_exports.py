"""`tiltyard task export`: a whole task for others to check: the log, the ranking, and the files that leaves name."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.audits import fetch_log, write_leaderboards
from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    CommandError,
    JsonOption,
    KeyOption,
    OriginOption,
    RegistryOption,
    TaskArgument,
    connect,
    run,
    task_name,
)
from tiltyard.cli.output import ProgressLine, print_json

if TYPE_CHECKING:
    from tiltyard.client import Client


def export(
    task: TaskArgument,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make, for `tiltyard log verify DIR`.")],
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Write all that can be checked of a task into a folder.

    The whole record log, the task's ranking, and all its datasets and models that the key may read.

    The log is whole, so it proves each of its leaves; what other tasks did is part of what weights and charges rest on.
    """
    from tiltyard.audit import write_record
    from tiltyard.audit.artifacts import named_digests

    async def work() -> None:
        name = task_name(task)
        record, boards = await fetch_log(key, origin, registry)
        if not any(entry.task_created.task == name for _, entry in record.of_kind("task_created")):
            raise CommandError(f"the log has no {name}")
        await asyncio.to_thread(write_record, record, out / "log")
        await asyncio.to_thread(write_leaderboards, [board for board in boards if board.task == name], out)
        digests = sorted(named_digests(record, name))
        async with connect(key, origin, registry) as client:
            kept = [digest for digest in digests if await _fetch(client, digest, out / "artifacts")]
        withheld = [digest for digest in digests if digest not in kept]
        if json:
            print_json({"log": str(out / "log"), "leaves": len(record.leaves), "artifacts": kept, "withheld": withheld})
            return
        print(f"{len(record.leaves)} leaves and {len(kept)} artifacts in {out}")
        for digest in withheld:
            print(f"artifacts/{digest} is not for this key to read, or is not there yet")

    run(work())


async def _fetch(client: "Client", digest: str, folder: Path) -> bool:
    """Whether the artifact lies in the folder, downloaded where it did not; False where the key may not read it."""
    import grpc

    from tiltyard.transfers import download

    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    if await asyncio.to_thread(_is_there, folder / digest):
        return True
    try:
        with ProgressLine(f"downloading {digest[:12]}", unit="bytes") as line:
            await download(client.artifacts, f"artifacts/{digest}", folder / digest, progress=line.update)
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND):
            return False
        raise
    return True


def _is_there(file: Path) -> bool:
    """Whether an export before this one, as one that was interrupted, has brought it."""
    from tiltyard.filedigest import file_digest

    return file.is_file() and file_digest(file).hex() == file.name
