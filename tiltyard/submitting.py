"""Submits a model by commit, upload and reveal, from a journal that outlives the process at any moment."""

import asyncio
import json
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tiltyard.client import PATIENCE_S, Client, new_request_id, persist
from tiltyard.commitments import SALT_BYTES, submission_commitment
from tiltyard.filedigest import file_digest
from tiltyard.foldersync import sync_folder
from tiltyard.keyfiles import write_secret
from tiltyard.registry.v1 import submission_pb2
from tiltyard.statements import sign_statement
from tiltyard.transfers import Progress, upload
from tiltyard.type.v1 import envelope_pb2, model_pb2


class JournalMismatch(Exception):
    """The journal is of another submission: another arena, task, key or model."""


@dataclass(frozen=True)
class Journal:
    """What must be known to go on with one submission; digest and salt are 32 bytes in hex."""

    origin: str
    task: str
    participant: str
    model_digest: str
    model_index: int
    model_format: model_pb2.ModelFormat.ValueType
    salt: str
    commit_request_id: str
    reveal_request_id: str
    submission: str = ""
    revealed: bool = False


async def submit_model(
    client: Client,
    *,
    task: str,
    model: Path,
    model_index: int = 0,
    format: model_pb2.ModelFormat.ValueType = model_pb2.MODEL_FORMAT_SAFETENSORS,
    journal: Path,
    progress: Progress | None = None,
    patience_s: float = PATIENCE_S,
) -> str:
    """Commits to the model, uploads it, reveals it, and returns the submission's name.

    The client's key must be a training node of the task. Salt and request ids are in `journal` (mode 0600) before
    the first call, so that calling again with the same journal, after a crash at any point, goes on with the same
    submission and never makes a second one. Index and format may be others until the registry has taken the reveal: a
    mistyped one costs no second submission. Raises JournalMismatch for the journal of something else,
    grpc.aio.AioRpcError for what the registry refuses.
    """
    digest = await asyncio.to_thread(file_digest, model)
    begun = await asyncio.to_thread(
        _begin,
        journal,
        Journal(
            origin=client.origin,
            task=task,
            participant=client.participant,
            model_digest=digest.hex(),
            model_index=model_index,
            model_format=format,
            salt=secrets.token_hex(SALT_BYTES),
            commit_request_id=new_request_id(),
            reveal_request_id=new_request_id(),
        ),
    )
    if not begun.submission:
        submission = await _commit(client, begun, patience_s)
        begun = replace(begun, submission=submission)
        await asyncio.to_thread(_write, journal, begun)
    if not begun.revealed:
        await upload(
            client.artifacts,
            model,
            submission=begun.submission,
            digest=digest,
            progress=progress,
            patience_s=patience_s,
        )
        await _reveal(client, begun, patience_s)
        await asyncio.to_thread(_write, journal, replace(begun, revealed=True))
    return begun.submission


async def _commit(client: Client, begun: Journal, patience_s: float) -> str:
    commitment = submission_commitment(
        origin=begun.origin,
        task=begun.task,
        participant=begun.participant,
        model_digest=bytes.fromhex(begun.model_digest),
        salt=bytes.fromhex(begun.salt),
    )
    statement = envelope_pb2.CommitStatement(
        origin=begun.origin, task=begun.task, participant=begun.participant, commitment=commitment
    )
    request = submission_pb2.CommitSubmissionRequest(
        statement=sign_statement(client.key, statement), request_id=begun.commit_request_id
    )
    answer = await persist(lambda: client.submissions.CommitSubmission(request), patience_s=patience_s)
    return answer.submission.name


async def _reveal(client: Client, begun: Journal, patience_s: float) -> None:
    statement = envelope_pb2.RevealStatement(
        origin=begun.origin,
        submission=begun.submission,
        model_digest=bytes.fromhex(begun.model_digest),
        salt=bytes.fromhex(begun.salt),
        format=begun.model_format,
        model_index=begun.model_index,
    )
    request = submission_pb2.RevealSubmissionRequest(
        statement=sign_statement(client.key, statement), request_id=begun.reveal_request_id
    )
    await persist(lambda: client.submissions.RevealSubmission(request), patience_s=patience_s)


def read_journal(path: Path) -> Journal:
    """The journal in a file. Raises FileNotFoundError, or JournalMismatch for a file that is no journal."""
    try:
        return Journal(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise JournalMismatch(f"{path} is not the journal of a submission") from error


def _begin(path: Path, fresh: Journal) -> Journal:
    """The journal as it is, with what the reveal is to say from `fresh`; all of that where there is none."""
    try:
        found = read_journal(path)
    except FileNotFoundError:
        try:
            write_secret(path, _document(fresh))
        except FileExistsError:
            # Another process has begun meanwhile: both go on with its salt.
            found = read_journal(path)
        else:
            return fresh
    fixed = ["origin", "task", "participant", "model_digest"]
    if found.revealed:
        # The commitment says nothing of these two, and a reveal that did and was refused is none.
        fixed += ["model_index", "model_format"]
    for name in fixed:
        if getattr(found, name) != getattr(fresh, name):
            known = f"{path} is of another submission: its {name} is {getattr(found, name)!r}"
            raise JournalMismatch(f"{known}; name another journal to submit anew")
    if (found.model_index, found.model_format) != (fresh.model_index, fresh.model_format):
        found = replace(
            found,
            model_index=fresh.model_index,
            model_format=fresh.model_format,
            reveal_request_id=fresh.reveal_request_id,
        )
        _write(path, found)
    return found


def _write(path: Path, journal: Journal) -> None:
    # Two processes may write at once.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write_secret(draft, _document(journal))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def _document(journal: Journal) -> bytes:
    return json.dumps(asdict(journal), indent=1).encode()
