"""A step before any draw: is the revealed file one of the task's model, by its size and header alone?"""

import asyncio
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

from services.registry.artifacts.files import StoredFile
from services.registry.records import Submission
from services.registry.referee.turns import each
from services.registry.rounds import FIRST_ROUND, reject, start_round
from services.registry.states import RejectionReason, SubmissionState
from services.registry.transaction import Reading, Store, Writing
from services.runtime.names import format_submission
from tiltyard.modelfile import check_model_file
from tiltyard.modelspec import ModelFault, ModelSpec
from tiltyard.telemetry import tracing


class ModelFiles(Protocol):
    """The bytes of artifacts; blocks, and raises OSError."""

    def open(self, sha256: str) -> StoredFile:
        """A complete artifact."""
        ...


@dataclass(frozen=True)
class _Revealed:
    submission: Submission
    spec: ModelSpec
    max_bytes: int
    max_parameters: int


@dataclass(frozen=True)
class _Finding:
    reason: RejectionReason
    detail: str


class StructureChecks:
    """Reads the header of each revealed model; what passes waits for its draw."""

    def __init__(self, store: Store, files: ModelFiles, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._files = files
        self._clock = clock

    async def check(self) -> int:
        """Revealed submissions are rejected by what is wrong with their file, or get their first round."""
        if not await self._store.finds(lambda tx: tx.submissions_unchecked()):
            return 0
        return await each(await self._store.read(_revealed), self._check_one)

    async def _check_one(self, revealed: _Revealed) -> int:
        submission = revealed.submission
        name = format_submission(submission.task, submission.number)
        with tracing.span("check structure", parent=submission.trace, submission=name):
            return await self._check_and_record(revealed)

    async def _check_and_record(self, revealed: _Revealed) -> int:
        submission = revealed.submission
        try:
            finding = await asyncio.to_thread(self._examine, revealed)
        except Exception as error:
            if submission.deadline is None or self._clock() < submission.deadline:
                raise
            # A file that cannot be read is not the submitter's fault; nor may one that the check stumbles over keep its
            # task from ever ending.
            why = error.strerror if isinstance(error, OSError) else type(error).__name__
            finding = _Finding(RejectionReason.VALIDATORS_UNAVAILABLE, f"the registry could not read the model: {why}")
        return await self._store.write(lambda tx: _record(tx, submission, finding))

    def _examine(self, revealed: _Revealed) -> _Finding | None:
        submission = revealed.submission
        with closing(self._files.open(submission.model_digest.hex())) as file:
            if file.size != submission.size_bytes:
                detail = f"the file has {file.size} bytes, {submission.size_bytes} were revealed"
                return _Finding(RejectionReason.DIGEST_MISMATCH, detail)
            try:
                check_model_file(
                    file.read,
                    file.size,
                    revealed.spec,
                    max_bytes=revealed.max_bytes,
                    max_parameters=revealed.max_parameters,
                )
            except ModelFault as fault:
                return _Finding(RejectionReason[fault.code.value], fault.detail)
        return None


def _revealed(tx: Reading) -> list[_Revealed]:
    found = []
    for submission in tx.submissions_unchecked():
        task = tx.task(submission.task)
        if task is not None:
            config = task.config
            found.append(
                _Revealed(
                    submission,
                    config.models[submission.model_index],
                    config.limits.max_model_bytes,
                    config.limits.max_parameters,
                )
            )
    return found


def _record(tx: Writing, seen: Submission, finding: _Finding | None) -> int:
    submission, task = tx.submission(seen.task, seen.number), tx.task(seen.task)
    if submission is None or task is None:
        return 0
    if submission.state is not SubmissionState.REVEALED or submission.structure_checked:
        return 0
    if finding is not None:
        reject(tx, submission, finding.reason, detail=finding.detail)
        return 1
    round_ = start_round(tx, submission, task, FIRST_ROUND)
    tx.put_submission(replace(submission, structure_checked=True, deadline=round_.deadline))
    return 1
