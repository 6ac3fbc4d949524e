"""`tiltyard log verify` and `export`: the whole record log checked, and kept."""

import asyncio
import hashlib
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    CommandError,
    JsonOption,
    OriginOption,
    RegistryOption,
    connect,
    run,
    tls_of_environment,
)
from tiltyard.cli.output import ProgressLine, as_json, print_json

if TYPE_CHECKING:
    from tiltyard.audit import Audit, Record
    from tiltyard.client import Client
    from tiltyard.registry.v1 import leaderboard_pb2
    from tiltyard.witness import Testimony

# Reading the log needs a key but no participant: whoever names none gets one for the moment.
AnyKeyOption = Annotated[
    Path | None,
    typer.Option("--key", envvar="TILTYARD_KEY", help="File of the key that asks; one is made up when left out."),
]


def verify(
    where: Annotated[
        str, typer.Argument(metavar="DIR|ADDRESS", help="A folder with an exported log, or HOST:PORT of a registry.")
    ],
    key: AnyKeyOption = None,
    log_key: Annotated[
        str, typer.Option(help="The log's public key in hex; when left out, the one in its own genesis is believed.")
    ] = "",
    witness: Annotated[Path | None, typer.Option(help="Folder of a witness, as `tiltyard log watch` keeps it.")] = None,
    origin: OriginOption = DEFAULT_ORIGIN,
    json: JsonOption = False,
) -> None:
    """Check all of a record log by its leaves alone. Exits with 1 when anything does not hold."""
    from tiltyard.audit import audit
    from tiltyard.endpoints import check_address
    from tiltyard.witness import Alarm

    folder = Path(where)
    is_folder = folder.is_dir()
    try:
        if not is_folder:
            check_address(where)
    except ValueError:
        raise typer.BadParameter(f"{where!r} is neither a folder nor HOST:PORT", param_hint="DIR|ADDRESS") from None
    expected_key = _hex("--log-key", log_key)

    async def work() -> None:
        if is_folder:
            record, boards = await asyncio.to_thread(_read_folder, folder)
        else:
            record, boards = await fetch_log(key, origin, where)
        with ProgressLine("checking the log", unit="leaves") as line:
            found = await asyncio.to_thread(
                audit, record, shown=boards, log_key=expected_key or None, progress=line.update
            )
        problems = [str(failure) for failure in found.failures]
        said: Testimony | None = None
        if witness is not None and not problems:
            try:
                said = await asyncio.to_thread(_testimony, witness, record)
            except Alarm as alarm:
                problems.append(str(alarm))
        unfinished: list[str] = []
        if is_folder:
            wrong, unfinished = await asyncio.to_thread(_check_artifacts, folder, record)
            problems += wrong
        _tell(found, problems, said, unfinished, as_document=json)
        if problems:
            raise typer.Exit(1)

    run(work())


def export(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; the log comes to lie in DIR/log.")],
    key: AnyKeyOption = None,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Download the record log for `tiltyard log verify DIR`.

    The leaderboards that go with it, too.
    """
    from tiltyard.audit import write_record

    async def work() -> None:
        record, boards = await fetch_log(key, origin, registry)
        await asyncio.to_thread(write_record, record, out / "log")
        await asyncio.to_thread(write_leaderboards, boards, out)
        if json:
            print_json({"log": str(out / "log"), "leaves": len(record.leaves), "leaderboards": len(boards)})
        else:
            print(f"{len(record.leaves)} leaves and {len(boards)} leaderboards in {out}")

    run(work())


def _hex(option: str, text: str) -> bytes:
    """Bytes from hex digits. Raises BadParameter."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not in hex", param_hint=option) from None


def connect_reader(key: Path | None, origin: str, registry: str) -> "Client":
    """A client that reads, with a key of its own when none is given."""
    from tiltyard.client import Client
    from tiltyard.identity import Key

    if key is not None:
        return connect(key, origin, registry)
    return Client(Key.generate(), origin=origin, registry=registry, tls=tls_of_environment())


def write_leaderboards(boards: Sequence["leaderboard_pb2.Leaderboard"], folder: Path) -> None:
    """Each as JSON, for `tiltyard log verify` to hold against the log."""
    import json

    (folder / "leaderboards").mkdir(parents=True, exist_ok=True)
    for board in boards:
        file = folder / "leaderboards" / f"{board.task.removeprefix('tasks/')}.json"
        file.write_text(json.dumps(as_json(board), indent=2) + "\n", encoding="utf-8")


async def fetch_log(key: Path | None, origin: str, registry: str) -> "tuple[Record, list[leaderboard_pb2.Leaderboard]]":
    """The log, and the rankings that the registry shows; both once more where it has grown between the two."""
    from tiltyard.audit import audit
    from tiltyard.registry.v1 import leaderboard_pb2, log_pb2

    async with connect_reader(key, origin, registry) as client:
        record = await _downloaded(client)
        for _ in range(_GROWING_LOG_TRIES):
            ranked = (await asyncio.to_thread(audit, record)).leaderboards
            boards = []
            for each in ranked:
                request = leaderboard_pb2.GetLeaderboardRequest(task=each.task)
                boards.append((await client.leaderboard.GetLeaderboard(request)).leaderboard)
            now = (await client.log.GetCheckpoint(log_pb2.GetCheckpointRequest())).checkpoint
            if now.size == len(record.leaves):
                return record, boards
            record = await _downloaded(client)
    # It grows all the time: the log is checked by itself.
    return record, []


_GROWING_LOG_TRIES = 3


async def _downloaded(client: "Client") -> "Record":
    from tiltyard.audit.download import fetch_record

    with ProgressLine("downloading the log", unit="leaves") as line:
        return await fetch_record(client, progress=line.update)


def _read_folder(folder: Path) -> "tuple[Record, list[leaderboard_pb2.Leaderboard]]":
    from google.protobuf import json_format

    from tiltyard.audit import InvalidRecord, read_record
    from tiltyard.registry.v1 import leaderboard_pb2

    log = folder / "log" if (folder / "log").is_dir() else folder
    boards = []
    for file in sorted((folder / "leaderboards").glob("*.json")):
        try:
            boards.append(json_format.Parse(file.read_bytes(), leaderboard_pb2.Leaderboard()))
        except (json_format.ParseError, UnicodeDecodeError) as error:
            raise InvalidRecord(f"{file} is no leaderboard: {error}") from error
    return read_record(log), boards


def _check_artifacts(folder: Path, record: "Record") -> tuple[list[str], list[str]]:
    """What is wrong with the files under `artifacts/`, each named in a leaf by its digest; and downloads broken off."""
    from tiltyard.audit.artifacts import named_digests
    from tiltyard.transfers import PART_SUFFIX

    folder = folder / "artifacts"
    if not folder.is_dir():
        return [], []
    named = named_digests(record)
    problems, unfinished = [], []
    for file in sorted(folder.iterdir()):
        if file.suffix == PART_SUFFIX and file.stem in named:
            unfinished.append(str(file))
            continue
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != file.name:
            problems.append(f"{file} has the digest {digest}")
        elif digest not in named:
            problems.append(f"no leaf names {file}")
    return problems, unfinished


def _testimony(folder: Path, record: "Record") -> "Testimony | None":
    from tiltyard.transparency import leaf_hash
    from tiltyard.witness import witnessed

    genesis = record.genesis
    hashes = [leaf_hash(leaf) for leaf in record.leaves]
    try:
        return witnessed(folder, leaf_hashes=hashes, log_key=genesis.log_key, origin=genesis.origin)
    except ValueError as error:
        raise CommandError(f"{folder}: {error}") from None


def _told_time(time_ns: int) -> str:
    """RFC 3339, in UTC."""
    from google.protobuf.timestamp_pb2 import Timestamp

    time = Timestamp()
    time.FromNanoseconds(time_ns)
    return time.ToJsonString()


def _tell(
    found: "Audit", problems: list[str], said: "Testimony | None", unfinished: list[str], *, as_document: bool
) -> None:
    witnessed = (
        f"witnessed by {said.name} up to leaf {said.size - 1} on {datetime.fromtimestamp(said.time_s, UTC):%F %TZ}"
        if said
        else "unwitnessed: another history may have been shown to others"
    )
    pending_since = None if found.pending_since_ns is None else _told_time(found.pending_since_ns)
    if as_document:
        print_json(
            {
                "verified": not problems,
                "leaves": found.size,
                "checked": {each.claim: each.count for each in found.checks},
                "problems": problems,
                "unfinished": unfinished,
                "witness": None if said is None else {"name": said.name, "size": said.size, "time_s": said.time_s},
                "pending": found.pending,
                "pending_since": pending_since,
                "hidden": list(found.hidden),
                "leaderboards": [as_json(board) for board in found.leaderboards],
            }
        )
        return
    for each in found.checks:
        print(f"{'verified' if each.passed else 'NOT VERIFIED'}: {each.claim} ({each.count})")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if found.pending:
        print(f"{found.pending} checks wait for ledger events that are not in the log yet, since {pending_since}")
    for task in found.hidden:
        print(f"{task} keeps its scores hidden until it is closed; the log holds commitments to them")
    for file in unfinished:
        print(f"not checked: {file}, whose download broke off; `tiltyard task export` into this folder goes on with it")
    print(f"{found.size} leaves; {witnessed}")
