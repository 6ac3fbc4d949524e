"""Datasets and models: who may hand them in, who may read them, and their way in chunks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol, TypeVar

from services.registry.records import (
    Artifact,
    ArtifactPurpose,
    ArtifactUse,
    Assignment,
    AssignmentState,
    DatasetDigest,
    HoldoutState,
    Submission,
    SubmissionState,
    Task,
    TaskState,
)
from services.registry.rounds import FIRST_ROUND, HOLDOUT_ROUND
from services.registry.task_states import holdout_deadline
from services.registry.tasks import own_task
from services.registry.transaction import Reading, Store, Writing
from services.runtime.errors import (
    Aborted,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
)

T = TypeVar("T")

DOWNLOAD_CHUNK_BYTES = 512 * 1024


class Partial(Protocol):
    """One upload on its way; its methods block."""

    size: int

    def append(self, chunk: bytes) -> None:
        """The next bytes."""
        ...

    def finish(self) -> bool:
        """Put the whole file in its place, durably. False where the digest is another: then nothing is kept."""
        ...

    def close(self) -> None:
        """Keep what there is for the next try."""
        ...


class ArtifactFiles(Protocol):
    """The bytes of artifacts; all methods block, and raise OSError."""

    def path(self, sha256: str) -> Path:
        """The file of a complete artifact."""
        ...

    def size(self, sha256: str) -> int:
        """Bytes of a complete artifact."""
        ...

    def read(self, sha256: str, offset: int, length: int) -> bytes:
        """Bytes of a complete artifact from `offset` on; fewer at its end."""
        ...

    def partial_size(self, owner: str, sha256: str) -> int:
        """Bytes of one participant's upload so far."""
        ...

    def open_partial(self, owner: str, sha256: str, *, anew: bool) -> Partial:
        """One participant's upload, to go on with or to begin anew."""
        ...


@dataclass(frozen=True)
class Upload:
    """What an upload says of itself. Either `task` (a dataset) or `submission` (its task and number) is given."""

    sha256: str
    size_bytes: int
    offset: int
    task: str | None
    submission: tuple[str, int] | None


@dataclass(frozen=True)
class Progress:
    """How far an upload is."""

    offset: int
    complete: bool


class Artifacts:
    """Takes and gives the bytes of datasets and models."""

    def __init__(self, store: Store, files: ArtifactFiles, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._files = files
        self._clock = clock
        self._uploading: set[tuple[str, str]] = set()

    async def upload(self, caller: str, upload: Upload, chunks: AsyncIterator[bytes]) -> Artifact:
        """Take the bytes from `upload.offset` on; what came before a break is kept for the next try.

        Raises FailedPrecondition(UPLOAD_NOT_EXPECTED), ResourceExhausted(TOO_LARGE), OutOfRange(WRONG_OFFSET),
        InvalidArgument(SIZE_MISMATCH, DIGEST_MISMATCH), Aborted(UPLOAD_RUNNING), PermissionDenied, NotFound.
        """
        key = (caller, upload.sha256)
        now = self._clock()

        def check(tx: Reading) -> Artifact | None:
            _expected(tx, caller, upload, now)
            return _own(tx, caller, upload.sha256)

        known = await self._store.read(check)
        if known is not None and upload.offset == known.size_bytes == upload.size_bytes:
            # Here already by another use of the caller: claimed, not sent again.
            return await self._store.write(lambda tx: _complete(tx, caller, upload))
        if key in self._uploading:
            raise Aborted("UPLOAD_RUNNING", "the caller uploads this artifact in another call")
        self._uploading.add(key)
        try:
            await self._receive(caller, upload, chunks)
        finally:
            self._uploading.discard(key)
        return await self._store.write(lambda tx: _complete(tx, caller, upload))

    async def progress(self, caller: str, sha256: str) -> Progress:
        """How far the caller's upload of one artifact is."""
        known = await self._store.read(lambda tx: _own(tx, caller, sha256))
        if known is not None:
            return Progress(known.size_bytes, complete=True)
        return Progress(await asyncio.to_thread(self._files.partial_size, caller, sha256), complete=False)

    async def get(self, caller: str, sha256: str) -> Artifact:
        """What is known of one artifact. Raises NotFound, PermissionDenied."""
        now = self._clock()
        return await self._store.read(lambda tx: _readable(tx, caller, sha256, now))

    async def download(self, caller: str, sha256: str, *, offset: int) -> AsyncIterator[bytes]:
        """The bytes from `offset` on in chunks. Raises NotFound, PermissionDenied, OutOfRange, DataLoss."""
        artifact = await self.get(caller, sha256)
        if offset > artifact.size_bytes:
            size = artifact.size_bytes
            raise OutOfRange("WRONG_OFFSET", f"offset {offset} is beyond the {size} bytes", offset=str(size))
        while offset < artifact.size_bytes:
            length = min(DOWNLOAD_CHUNK_BYTES, artifact.size_bytes - offset)
            chunk = await asyncio.to_thread(self._read, sha256, offset, length)
            offset += len(chunk)
            yield chunk

    def _read(self, sha256: str, offset: int, length: int) -> bytes:
        try:
            chunk = self._files.read(sha256, offset, length)
        except FileNotFoundError:
            chunk = b""
        if len(chunk) != length:
            raise DataLoss("ARTIFACT_LOST", f"the bytes of artifacts/{sha256} are gone")
        return chunk

    async def _receive(self, caller: str, upload: Upload, chunks: AsyncIterator[bytes]) -> None:
        have = await asyncio.to_thread(self._files.partial_size, caller, upload.sha256)
        if upload.offset not in (0, have):
            raise OutOfRange("WRONG_OFFSET", f"the upload goes on at {have}", offset=str(have))
        partial = await _whole(lambda: self._files.open_partial(caller, upload.sha256, anew=upload.offset == 0))
        finished = False
        try:
            async for chunk in chunks:
                if partial.size + len(chunk) > upload.size_bytes:
                    raise _size_mismatch(f"more than the {upload.size_bytes} bytes announced were sent")
                await _whole(lambda chunk=chunk: partial.append(chunk))  # type: ignore[misc]
            if partial.size < upload.size_bytes:
                raise _size_mismatch(f"ends after {partial.size} of {upload.size_bytes} bytes; resume from there")
            finished = True
            if not await _whole(partial.finish):
                raise InvalidArgument.field(
                    "chunk", "the bytes are not those of the digest; begin anew", reason="DIGEST_MISMATCH"
                )
        finally:
            if not finished:
                await _whole(partial.close)


async def _whole(work: Callable[[], T]) -> T:
    """Run `work` in a thread to its end, also when the caller is cancelled meanwhile: no two threads on one file."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        raise


def may_read(tx: Reading, caller: str, use: ArtifactUse, now: datetime) -> bool:
    """Whether this use of an artifact lets the caller read it.

    A dataset: its creator and who holds a running lease on an assignment of its task and round. A model: its submitter,
    who holds a running lease on an assignment of its submission, and the task's creator once the task is closed.
    """
    if caller == use.owner:
        return True
    if use.purpose is not ArtifactPurpose.MODEL:
        round_ = FIRST_ROUND if use.purpose is ArtifactPurpose.EVALUATION_DATASET else HOLDOUT_ROUND
        return any((lease.task, lease.round) == (use.task, round_) for lease in _leases(tx, caller, now))
    submission = tx.submission(use.task, use.number)
    if submission is None or submission.model_digest.hex() != use.sha256:
        # Uploaded, but never revealed as the model of this submission.
        return False
    task = tx.task(use.task)
    if task is not None and task.creator == caller:
        return task.state in (TaskState.CLOSED, TaskState.FINAL)
    return any((lease.task, lease.number) == (use.task, use.number) for lease in _leases(tx, caller, now))


def _leases(tx: Reading, caller: str, now: datetime) -> list[Assignment]:
    return [
        assignment
        for assignment in tx.assignments_unended_of(caller)
        if assignment.state is AssignmentState.ACCEPTED
        and assignment.deadline is not None
        and now < assignment.deadline
    ]


def _readable(tx: Reading, caller: str, sha256: str, now: datetime) -> Artifact:
    uses = tx.artifact_uses(sha256)
    artifact = tx.artifact(sha256)
    if not uses or artifact is None:
        raise NotFound("ARTIFACT_NOT_FOUND", f"there is no artifact {sha256}")
    if not any(may_read(tx, caller, use, now) for use in uses):
        raise PermissionDenied("ARTIFACT_NOT_YOURS", "this artifact is for others to read")
    return artifact


def _own(tx: Reading, caller: str, sha256: str) -> Artifact | None:
    """The complete artifact, where the caller itself has handed it in."""
    mine = any(use.owner == caller for use in tx.artifact_uses(sha256))
    return tx.artifact(sha256) if mine else None


def _complete(tx: Writing, caller: str, upload: Upload) -> Artifact:
    use = _expected(tx, caller, upload, tx.now)
    tx.put_artifact_use(use)
    known = tx.artifact(upload.sha256)
    if known is not None:
        return known
    artifact = Artifact(upload.sha256, upload.size_bytes, tx.now)
    tx.put_artifact(artifact)
    return artifact


def _expected(tx: Reading, caller: str, upload: Upload, now: datetime) -> ArtifactUse:
    if upload.submission is not None:
        return _expected_model(tx, caller, upload, now)
    task = own_task(tx, caller, upload.task or "")
    digest, purpose = _awaited(task, upload.sha256, now)
    if digest.size_bytes != upload.size_bytes:
        raise _size_mismatch(f"is {upload.size_bytes}, the task announced {digest.size_bytes}", "header.size_bytes")
    return ArtifactUse(upload.sha256, task.id, purpose, caller)


def _awaited(task: Task, sha256: str, now: datetime) -> tuple[DatasetDigest, ArtifactPurpose]:
    config = task.config
    if config.evaluation_dataset.sha256.hex() == sha256 and task.state is TaskState.PREPARING:
        return config.evaluation_dataset, ArtifactPurpose.EVALUATION_DATASET
    if config.holdout is not None and config.holdout.sha256.hex() == sha256:
        unended = task.state in (TaskState.PREPARING, TaskState.OPEN, TaskState.CLOSED)
        late = task.state is TaskState.CLOSED and now >= holdout_deadline(task)
        if unended and task.holdout is not HoldoutState.FAILED and not late:
            return config.holdout, ArtifactPurpose.HOLDOUT
    raise _not_expected("the task does not await this artifact")


def _expected_model(tx: Reading, caller: str, upload: Upload, now: datetime) -> ArtifactUse:
    if upload.submission is None:
        raise ValueError("the upload is of no submission")
    task_id, number = upload.submission
    submission, task = tx.submission(task_id, number), tx.task(task_id)
    if submission is None or task is None:
        raise NotFound("SUBMISSION_NOT_FOUND", f"task {task_id} has no submission {number}")
    if submission.participant != caller:
        raise PermissionDenied("NOT_THE_SUBMITTER", "this is somebody else's submission")
    if not _awaits_model(submission, upload.sha256, now):
        raise _not_expected(f"the submission is {submission.state.name} and awaits no model")
    limit = task.config.limits.max_model_bytes
    if upload.size_bytes > limit:
        raise ResourceExhausted(
            "TOO_LARGE", f"the model has {upload.size_bytes} bytes, the task allows {limit}", max_bytes=str(limit)
        )
    return ArtifactUse(upload.sha256, task_id, ArtifactPurpose.MODEL, caller, number)


def _awaits_model(submission: Submission, sha256: str, now: datetime) -> bool:
    if submission.state is SubmissionState.COMMITTED:
        return submission.deadline is None or now < submission.deadline
    # An answer that was lost is asked for again after the reveal.
    return submission.model_digest.hex() == sha256


def _not_expected(why: str) -> FailedPrecondition:
    return FailedPrecondition("UPLOAD_NOT_EXPECTED", why)


def _size_mismatch(description: str, field: str = "chunk") -> InvalidArgument:
    return InvalidArgument.field(field, description, reason="SIZE_MISMATCH")
