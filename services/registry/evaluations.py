"""Reports sealed first and opened later, so that nobody can copy another's."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.registry.assignments import check_lease, dataset_of, ended, own_assignment
from services.registry.entries import EvaluationSealed
from services.registry.records import Assignment, Counts, Evaluation, Finding, Submission, Task
from services.registry.rounds import FIRST_ROUND
from services.registry.states import AssignmentState
from services.registry.transaction import Reading, Store, Writing
from services.runtime.errors import AlreadyExists, FailedPrecondition, FieldViolation, InvalidArgument, NotFound
from services.runtime.names import AssignmentId, format_assignment
from tiltyard.commitments import evaluation_seal, matches
from tiltyard.identity import Envelope
from tiltyard.predictions import BLOCK_ROWS, block_count, check_handed_in


@dataclass(frozen=True)
class Report:
    """What a validator says in its signed report; digests are 32 bytes."""

    dataset_digest: bytes
    model_digest: bytes
    finding: Finding
    prediction_hashes: bytes
    """What was handed in beside it, for `prediction_root` of the finding."""


@dataclass(frozen=True)
class EvaluationView:
    """An evaluation as its reader may see it; the hashes are empty unless they were asked for."""

    evaluation: Evaluation
    prediction_hashes: bytes = b""


class Evaluations:
    """Takes seals and reports, and shows a report to its validator, and to others once its submission has ended."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def commit(
        self, caller: str, assignment: AssignmentId, *, seal: bytes, statement: Envelope, token: str
    ) -> Evaluation:
        """Record the seal of a report under a running lease, which ends."""

        def write(tx: Writing) -> Evaluation:
            found = own_assignment(tx, assignment, caller)
            sealed = _evaluation(tx, assignment)
            if sealed is not None:
                if matches(sealed.seal, seal):
                    return sealed
                raise AlreadyExists("ALREADY_SEALED", "another report was sealed before")
            check_lease(tx, found, token)
            evaluation = Evaluation(
                task=found.task,
                number=found.number,
                round=found.round,
                validator=found.validator,
                seal=seal,
                statement=statement,
                seal_time=tx.now,
            )
            tx.put_evaluation(evaluation)
            tx.put_assignment(
                replace(found, state=AssignmentState.SEALED, deadline=None, opening=False, update_time=tx.now)
            )
            tx.append(
                EvaluationSealed(
                    task=found.task,
                    number=found.number,
                    round=found.round,
                    validator=found.validator,
                    statement=statement,
                )
            )
            return evaluation

        return await self._store.write(write, quick=True)

    async def open(
        self, caller: str, assignment: AssignmentId, *, report: Report, envelope: Envelope, salt: bytes
    ) -> Evaluation:
        """Lay a sealed report open while the assignment is asked to; nobody else sees it before the submission ends."""
        # Up to 65,536 hashes: not within the one writer's transaction.
        hashes_problem = await asyncio.to_thread(_hashes_problem, report)
        finding = report.finding

        def write(tx: Writing) -> Evaluation:
            found = own_assignment(tx, assignment, caller)
            evaluation = _evaluation(tx, assignment)
            if evaluation is None:
                raise FailedPrecondition("NOT_OPENING", "nothing was sealed", state=found.state.name)
            if evaluation.report is not None and evaluation.report.payload == envelope.payload:
                return evaluation
            _check_opening(tx, found)
            seal = evaluation_seal(assignment=format_assignment(assignment), report=envelope.payload, salt=salt)
            if not matches(seal, evaluation.seal):
                problem = "does not give the seal that was committed"
                raise InvalidArgument(
                    [FieldViolation("report", problem), FieldViolation("salt", problem)], reason="SEAL_MISMATCH"
                )
            task, submission = tx.task(found.task), tx.submission(found.task, found.number)
            if task is None or submission is None:
                raise LookupError(f"the assignment of {found.validator} has no submission")
            _check_report(task, submission, found.round, report, hashes_problem=hashes_problem)
            if finding.counts is not None:
                tx.put_prediction_hashes(finding.prediction_root, finding.prediction_blocks, report.prediction_hashes)
            opened = replace(evaluation, report=envelope, salt=salt, finding=report.finding, open_time=tx.now)
            tx.put_evaluation(opened)
            tx.put_assignment(
                replace(found, state=AssignmentState.OPENED, deadline=None, opening=False, update_time=tx.now)
            )
            return opened

        return await self._store.write(write, quick=True)

    async def get(self, caller: str, evaluation: AssignmentId, *, hashes: bool = False) -> EvaluationView:
        """One evaluation, without its report where it is hidden yet. `hashes`: with those of predictions."""

        def read(tx: Reading) -> EvaluationView:
            found = _evaluation(tx, evaluation)
            if found is None:
                raise NotFound("EVALUATION_NOT_FOUND", "there is no such evaluation")
            shown = shown_to(caller, found)
            finding = shown.finding
            if not hashes or finding is None:
                return EvaluationView(shown)
            return EvaluationView(shown, tx.prediction_hashes(finding.prediction_root, finding.prediction_blocks))

        return await self._store.read(read)

    async def page(
        self, caller: str, task: str, number: int, *, after: tuple[int, str], limit: int
    ) -> Sequence[Evaluation]:
        """The evaluations of a submission by round and validator, those beyond `after`."""

        def read(tx: Reading) -> Sequence[Evaluation]:
            if tx.submission(task, number) is None:
                raise NotFound("SUBMISSION_NOT_FOUND", f"task {task} has no submission {number}")
            beyond = [e for e in tx.evaluations(task, number) if (e.round, e.validator) > after]
            return [shown_to(caller, evaluation) for evaluation in beyond[:limit]]

        return await self._store.read(read)


def shown_to(caller: str, evaluation: Evaluation) -> Evaluation:
    """The evaluation as `caller` may see it."""
    if evaluation.disclosed or evaluation.validator == caller:
        return evaluation
    return replace(evaluation, report=None, salt=b"", finding=None)


def _evaluation(tx: Reading, of: AssignmentId) -> Evaluation | None:
    return tx.evaluation(of.task, of.number, of.round, of.participant)


def _check_opening(tx: Writing, assignment: Assignment) -> None:
    late = assignment.deadline is not None and tx.now >= assignment.deadline
    if assignment.state is AssignmentState.EXPIRED or (assignment.opening and late):
        raise FailedPrecondition("OPENING_EXPIRED", "the time to open the report is over")
    if assignment.state is AssignmentState.RELEASED:
        raise ended(assignment)
    if not assignment.opening:
        raise FailedPrecondition("NOT_OPENING", "reports are not to be opened yet", state=assignment.state.name)


def _check_report(task: Task, submission: Submission, round_: int, report: Report, *, hashes_problem: str) -> None:
    rows = task.evaluation_rows if round_ == FIRST_ROUND else task.holdout_rows
    counts = report.finding.counts
    problems = {
        "report.dataset_digest": report.dataset_digest != dataset_of(task, round_).sha256,
        "report.model_digest": report.model_digest != submission.model_digest,
        "report.node_endpoint": report.finding.node_endpoint and not task.config.allow_node_endpoint,
        "report.counts": counts is not None and not _adds_up(counts, rows),
        "report.prediction_blocks": report.finding.prediction_blocks != (block_count(rows) if counts else 0),
        "prediction_hashes": bool(hashes_problem),
    }
    described = {
        "report.dataset_digest": "is not the digest of the round's evaluation dataset",
        "report.model_digest": "is not the digest of the submitted model",
        "report.node_endpoint": "is not allowed in this task",
        "report.counts": f"must hold 0 <= correct, ambiguous <= total = {rows}",
        "report.prediction_blocks": f"must be one for each {BLOCK_ROWS} rows with counts, 0 with a fault",
        "prediction_hashes": hashes_problem,
    }
    violations = [FieldViolation(field, described[field]) for field, wrong in problems.items() if wrong]
    if violations:
        raise InvalidArgument(violations)


def _hashes_problem(report: Report) -> str:
    finding, handed = report.finding, report.prediction_hashes
    if finding.counts is None:
        return "must be empty with a fault" if handed else ""
    return check_handed_in(handed, root=bytes.fromhex(finding.prediction_root), blocks=finding.prediction_blocks)


def _adds_up(counts: Counts, rows: int) -> bool:
    return counts.total == rows and 0 <= counts.correct <= rows and 0 <= counts.ambiguous <= rows
