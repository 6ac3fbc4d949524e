"""Questions about submissions and artifacts."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, or_, select

from services.registry.convert.times import micros_of, moment_of
from services.registry.listing import Listing, Place
from services.registry.queries.asking import Asking
from services.registry.records import Artifact, ArtifactUse, Submission
from services.registry.rows import ARTIFACT_USES, ARTIFACTS, EVALUATIONS, PARTICIPANTS, ROUNDS, SUBMISSIONS, TASKS
from services.registry.states import EvaluationVerdict, RejectionReason, SubmissionState
from services.runtime import names
from services.runtime.engines import Written, given
from services.runtime.names import AssignmentId

_S, _E, _T, _P, _R, _A, _U = (
    kind.c for kind in (SUBMISSIONS, EVALUATIONS, TASKS, PARTICIPANTS, ROUNDS, ARTIFACTS, ARTIFACT_USES)
)
_TRACK_RECORD = 10
_PLATFORM_FAULTS = (RejectionReason.VALIDATORS_UNAVAILABLE.name, RejectionReason.TASK_CANCELLED.name)

_DUE = Written(SUBMISSIONS.query().where(_S.state == given("state"), _S.deadline <= given("now")).order_by(_S.deadline))
_UNCHECKED = Written(
    SUBMISSIONS.query()
    .where(_S.state == SubmissionState.REVEALED.name, _S.structure_checked.is_(False))
    .order_by(_S.commit_time, _S.task, _S.number)
)


class SubmissionQuestions(Asking):
    """The part of `transaction.Reading` that is about what was handed in."""

    def submission(self, task: str, number: int) -> Submission | None:
        return self._load(SUBMISSIONS, task, number)

    def submissions(
        self,
        task: str,
        *,
        limit: int | None = None,
        state: SubmissionState | None = None,
        participant: str | None = None,
    ) -> Sequence[Submission]:
        query = SUBMISSIONS.query().where(_S.task == task)
        if state is not None:
            query = query.where(_S.state == state.name)
        if participant is not None:
            query = query.where(_S.participant == participant)
        return self._records(SUBMISSIONS, query.order_by(_S.number).limit(limit))

    def submissions_listed(self, task: str, listing: Listing) -> Sequence[tuple[Place, Submission]]:
        return self._page(SUBMISSIONS, listing, _S.task == task, number=_S.number)

    def submissions_in(self, *states: SubmissionState) -> Sequence[Submission]:
        query = SUBMISSIONS.query().where(_S.state.in_([state.name for state in states]))
        return self._records(SUBMISSIONS, query.order_by(_S.commit_time, _S.task, _S.number))

    def submissions_with_digest(self, task: str, model_digest: bytes) -> Sequence[Submission]:
        query = SUBMISSIONS.query().where(_S.task == task, _S.model_digest == model_digest)
        return self._records(SUBMISSIONS, query.order_by(_S.number))

    def count_submissions(self, task: str, participant: str, *, since: datetime) -> int:
        counted = _counted(task, participant, since)
        return int(self._one(select(func.count()).select_from(_S.task.table).where(*counted)))

    def oldest_submission_since(self, task: str, participant: str, *, since: datetime) -> datetime | None:
        oldest = self._one(select(func.min(_S.commit_time)).where(*_counted(task, participant, since)))
        return None if oldest is None else moment_of(oldest)

    def track_record(self, participant: str, *, outside_owner_group_of: str) -> Sequence[str]:
        inside = self._owner_group(outside_owner_group_of)
        scored = (
            select(_S.commit_time, _S.task, _S.number)
            .join(_T.id.table, _T.id == _S.task)
            .where(_S.participant == participant, _S.state == SubmissionState.SCORED.name)
            .where(_T.creator.not_in(inside))
            .order_by(_S.commit_time.desc())
            .limit(_TRACK_RECORD)
        )
        agreed = (
            select(_E.seal_time, _E.task, _E.number, _E.round)
            .join(_T.id.table, _T.id == _E.task)
            .where(_E.validator == participant, _E.verdict == EvaluationVerdict.AGREED.name)
            .where(_T.creator.not_in(inside))
            .order_by(_E.seal_time.desc())
            .limit(_TRACK_RECORD)
        )
        found = [(time, names.format_submission(task, number)) for time, task, number in self._ask(scored)]
        for time, task, number, round_ in self._ask(agreed):
            found.append((time, names.format_evaluation(AssignmentId(task, number, round_, participant))))
        found.sort(reverse=True)
        return [name for _, name in found[:_TRACK_RECORD]]

    def _owner_group(self, participant: str) -> set[str]:
        found = self._load(PARTICIPANTS, participant)
        owner = None if found is None else found.owner
        group = {participant, owner or participant}
        return group | {row.id for row in self._ask(select(_P.id).where(_P.owner.in_(sorted(group))))}

    def submissions_due(self, state: SubmissionState, now: datetime) -> Sequence[Submission]:
        return self._found(SUBMISSIONS, _DUE, state=state.name, now=micros_of(now))

    def submissions_unchecked(self) -> Sequence[Submission]:
        return self._found(SUBMISSIONS, _UNCHECKED)

    def public_best(self, task: str, participant: str) -> int | None:
        query = select(func.max(_S.public_best)).where(_S.task == task, _S.participant == participant)
        best: int | None = self._one(query)
        return best

    def submissions_hidden(self, task: str, *, limit: int) -> Sequence[Submission]:
        query = SUBMISSIONS.query().where(_S.task == task, _S.hidden.is_(True))
        return self._records(SUBMISSIONS, query.order_by(_S.number).limit(limit))

    def submissions_without_round(self, task: str, round_: int) -> Sequence[Submission]:
        judged = select(_R.number).where(_R.task == task, _R.number == _S.number, _R.round == round_)
        query = SUBMISSIONS.query().where(_S.task == task, ~judged.exists(), _S.state == SubmissionState.SCORED.name)
        return self._records(SUBMISSIONS, query.order_by(_S.number))

    def artifact(self, sha256: str) -> Artifact | None:
        return self._load(ARTIFACTS, sha256)

    def artifact_uses(self, sha256: str) -> Sequence[ArtifactUse]:
        query = ARTIFACT_USES.query().where(_U.sha256 == sha256)
        return self._records(ARTIFACT_USES, query.order_by(_U.task, _U.purpose, _U.number))

    def artifacts_of(self, owner: str) -> Sequence[tuple[ArtifactUse, int]]:
        query = ARTIFACT_USES.query(_A.size_bytes).join(_A.sha256.table, _A.sha256 == _U.sha256)
        return [(ARTIFACT_USES.record(row), row.size_bytes) for row in self._ask(query.where(_U.owner == owner))]

    def artifacts_with(self, prefix: str) -> Sequence[str]:
        # Digests are hex: `g` is after each of them.
        query = select(_A.sha256).where(_A.sha256 >= prefix, _A.sha256 < f"{prefix}g")
        return [row.sha256 for row in self._ask(query)]


def _counted(task: str, participant: str, since: datetime) -> Sequence[Any]:
    return (
        _S.task == task,
        _S.participant == participant,
        _S.commit_time >= micros_of(since),
        or_(_S.reason.is_(None), _S.reason.not_in(_PLATFORM_FAULTS)),
    )
