"""What happens to the judging of one submission inside one transaction: duties offered and ended, rounds concluded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from services.registry.entries import (
    AssignmentChanged,
    EvaluationOpened,
    ScoreConcluded,
    SubmissionChanged,
    ValidatorFaultFound,
)
from services.registry.records import Assignment, Evaluation, Round, Submission, Task, ValidatorFault
from services.registry.states import (
    AssignmentState,
    MembershipState,
    RejectionReason,
    RoundState,
    SubmissionState,
    ValidatorFaultKind,
)
from services.registry.transaction import Reading, Writing
from services.registry.visibility import hides
from tiltyard import scoring

FIRST_ROUND = 1
HOLDOUT_ROUND = 2

PENDING = (AssignmentState.OFFERED, AssignmentState.ACCEPTED)
UNENDED = (*PENDING, AssignmentState.SEALED)

_EXPIRY = {
    AssignmentState.OFFERED: ValidatorFaultKind.OFFER_EXPIRED,
    AssignmentState.ACCEPTED: ValidatorFaultKind.LEASE_EXPIRED,
    AssignmentState.SEALED: ValidatorFaultKind.SEAL_UNOPENED,
}


@dataclass(frozen=True)
class Standing:
    """Where a round's duties stand: at work, sealed, and the opened reports that have a vote, each by position."""

    pending: Sequence[Assignment]
    sealed: Sequence[Assignment]
    counted: Sequence[Evaluation]

    @property
    def reported(self) -> int:
        """Seals and opened reports."""
        return len(self.sealed) + len(self.counted)

    @property
    def live(self) -> int:
        """All from whom a report has come or may still come."""
        return len(self.pending) + self.reported


def task_of(tx: Reading, round_: Round) -> Task:
    """The task of a round, which exists."""
    task = tx.task(round_.task)
    if task is None:
        raise LookupError(f"round of the unknown task {round_.task}")
    return task


def submission_of(tx: Reading, round_: Round) -> Submission:
    """The submission of a round, which exists."""
    submission = tx.submission(round_.task, round_.number)
    if submission is None:
        raise LookupError(f"round of the unknown submission {round_.task}/{round_.number}")
    return submission


def standing(tx: Reading, round_: Round) -> Standing:
    """Read where the duties of a round stand. Reports of a node's own endpoint have no vote, so they are left out."""
    assignments = tx.assignments(round_.task, round_.number, round_.round)
    opened: list[Evaluation] = []
    if any(a.state is AssignmentState.OPENED for a in assignments):
        found = {e.validator: e for e in tx.evaluations(round_.task, round_.number, round_.round)}
        opened = [found[a.validator] for a in assignments if a.state is AssignmentState.OPENED]
    return Standing(
        pending=[a for a in assignments if a.state in PENDING],
        sealed=[a for a in assignments if a.state is AssignmentState.SEALED],
        counted=[e for e in opened if e.finding is not None and not e.finding.node_endpoint],
    )


def headcount(tx: Reading, round_: Round) -> tuple[int, int]:
    """How many are `pending` in the standing of a round, and how many have `reported`; cheaper to know."""
    states = tx.assignment_states(round_.task, round_.number, round_.round)
    if AssignmentState.OPENED in states:
        found = standing(tx, round_)
        return len(found.pending), found.reported
    return sum(state in PENDING for state in states), states.count(AssignmentState.SEALED)


def start_round(tx: Writing, submission: Submission, task: Task, round_: int) -> Round:
    """A round that waits for its draw, for as long as the task allows."""
    started = Round(
        task=task.id,
        number=submission.number,
        round=round_,
        state=RoundState.WAITING,
        deadline=tx.now + task.config.schedule.draw_time,
        wanted=task.config.validators_per_submission,
        trace=submission.trace,
    )
    tx.put_round(started)
    return started


def log_assignment(tx: Writing, assignment: Assignment) -> None:
    """Append the step that an assignment has just made."""
    tx.append(
        AssignmentChanged(
            task=assignment.task,
            number=assignment.number,
            round=assignment.round,
            validator=assignment.validator,
            state=assignment.state,
            position=assignment.position,
            deadline=assignment.deadline,
        )
    )


def offer(tx: Writing, round_: Round, order: Sequence[str], *, deadline: datetime) -> None:
    """Offer the duty to those of a draw's order who have not got it yet.

    Where the round has been concluded meanwhile nobody is needed: they are released at once, so that they are refunded.
    """
    needed = round_.state is RoundState.SEALING
    for position, validator in list(enumerate(order))[round_.picks :]:
        assignment = Assignment(
            task=round_.task,
            number=round_.number,
            round=round_.round,
            validator=validator,
            state=AssignmentState.OFFERED if needed else AssignmentState.RELEASED,
            position=position,
            create_time=tx.now,
            update_time=tx.now,
            deadline=min(deadline, round_.deadline) if needed else None,
            refund=not needed,
            trace=round_.trace,
        )
        tx.put_assignment(assignment)
        log_assignment(tx, assignment)


def end_assignment(tx: Writing, assignment: Assignment, state: AssignmentState) -> Assignment:
    """End a duty as DECLINED, EXPIRED or RELEASED; who is released has not reported, so the charge is given back.

    EXPIRED is a fault of the validator, and recorded as one.
    """
    ended = tx.put_assignment(
        replace(
            assignment,
            state=state,
            deadline=None,
            opening=False,
            refund=state is AssignmentState.RELEASED,
            update_time=tx.now,
        )
    )
    log_assignment(tx, ended)
    if state is AssignmentState.EXPIRED:
        record_fault(tx, assignment, _EXPIRY[assignment.state])
    return ended


def state_when_late(tx: Reading, assignment: Assignment) -> AssignmentState:
    """How a duty ends that was not accepted or sealed in time: who could not accept it is not to blame."""
    member = tx.member(assignment.task, assignment.validator)
    joined = member is not None and member.state is not MembershipState.PENDING
    return AssignmentState.EXPIRED if joined else AssignmentState.RELEASED


def record_fault(tx: Writing, duty: Assignment | Evaluation, kind: ValidatorFaultKind) -> None:
    """Name a validator that has not done its duty, or has done it wrongly: in the list of faults and in the log."""
    fault = ValidatorFault(duty.task, duty.number, duty.round, duty.validator, kind, tx.now)
    # Who has not even accepted has kept nobody waiting for long: its quota is charged, its stake is not.
    tx.put_validator_fault(fault, costs_stake=kind is not ValidatorFaultKind.OFFER_EXPIRED)
    tx.append(ValidatorFaultFound(duty.task, duty.number, duty.round, duty.validator, kind))


def end_round(tx: Writing, round_: Round, *, detail: str = "") -> bool:
    """Conclude a round: whoever is still at work is released, and what was opened is laid open in the log.

    Where the task hides its counts, the reports stay with the registry: True, when there are any.
    """
    for assignment in tx.assignments(round_.task, round_.number, round_.round):
        if assignment.state in UNENDED:
            end_assignment(tx, assignment, AssignmentState.RELEASED)
    # Where nobody has been drawn so far, the answer to a draw may be on its way, or lost.
    unsure = round_.unsure or not round_.draw
    tx.put_round(replace(round_, state=RoundState.CONCLUDED, detail=detail, unsure=unsure))
    if hides(task_of(tx, round_)):
        found = tx.evaluations(round_.task, round_.number, round_.round)
        return any(evaluation.report is not None for evaluation in found)
    _lay_open(tx, round_.task, round_.number, round_.round)
    return False


def disclose(tx: Writing, submission: Submission) -> Submission:
    """Lay open in the log what the task's visibility has held back of a submission: its reports and its score."""
    _lay_open(tx, submission.task, submission.number, FIRST_ROUND)
    if submission.score_salt:
        score = submission.scores[FIRST_ROUND]
        tx.append(ScoreConcluded(submission.task, submission.number, score, salt=submission.score_salt))
    disclosed = replace(submission, hidden=False)
    tx.put_submission(disclosed)
    return disclosed


def _lay_open(tx: Writing, task: str, number: int, round_: int) -> None:
    for evaluation in tx.evaluations(task, number, round_):
        if evaluation.report is not None and not evaluation.disclosed:
            tx.append(
                EvaluationOpened(
                    task=evaluation.task,
                    number=evaluation.number,
                    round=evaluation.round,
                    validator=evaluation.validator,
                    report=evaluation.report,
                    salt=evaluation.salt,
                )
            )
            tx.put_evaluation(replace(evaluation, disclosed=True))


def reject(
    tx: Writing, submission: Submission, reason: RejectionReason, *, detail: str = "", original: int | None = None
) -> Submission:
    """End a submission without a score, whatever its state, and all that is still under way for it."""
    hidden = submission.hidden
    for number in (FIRST_ROUND, HOLDOUT_ROUND):
        round_ = tx.round(submission.task, submission.number, number)
        if round_ is not None and round_.state is not RoundState.CONCLUDED:
            hidden |= end_round(tx, round_, detail=f"the submission was rejected: {reason.name}")
    rejected = replace(
        submission,
        hidden=hidden,
        state=SubmissionState.REJECTED,
        reason=reason,
        detail=detail,
        original=original,
        deadline=None,
        end_time=tx.now,
    )
    tx.put_submission(rejected)
    tx.append(
        SubmissionChanged(
            task=rejected.task,
            number=rejected.number,
            state=rejected.state,
            reason=reason,
            detail=detail,
            original=original,
        )
    )
    return rejected


def give_up(tx: Writing, round_: Round, detail: str) -> None:
    """Too few validators could be drawn, or reported: round 1 rejects, round 2 leaves the score of round 1 as it is."""
    submission = submission_of(tx, round_)
    if round_.round == FIRST_ROUND:
        reject(tx, submission, RejectionReason.VALIDATORS_UNAVAILABLE, detail=detail)
        return
    end_round(tx, round_, detail=detail)
    tx.put_submission(replace(submission, detail=f"round {round_.round}: {detail}"))
    tx.append(
        SubmissionChanged(
            task=submission.task,
            number=submission.number,
            state=submission.state,
            detail=f"round {round_.round} without a result, {RejectionReason.VALIDATORS_UNAVAILABLE.name}: {detail}",
        )
    )


def set_deadline(tx: Writing, round_: Round, deadline: datetime) -> None:
    """Show in the submission until when it is judged; in round 2 it has a score already, and no deadline."""
    if round_.round == FIRST_ROUND:
        tx.put_submission(replace(submission_of(tx, round_), deadline=deadline, detail=""))


def reports_of(counted: Sequence[Evaluation]) -> list[scoring.Report]:
    """Opened evaluations as votes."""
    reports = []
    for evaluation in counted:
        finding = evaluation.finding
        if finding is None:
            raise LookupError(f"the evaluation of {evaluation.validator} has not been opened")
        counts = finding.counts
        reports.append(
            scoring.Report(
                validator=evaluation.validator,
                counts=scoring.Counts(counts.correct, counts.total, counts.ambiguous) if counts else None,
                fault=finding.fault,
                node_endpoint=finding.node_endpoint,
            )
        )
    return reports
