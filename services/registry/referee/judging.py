"""Steps from the first lease to the score: expired duties, reports asked to open, conclusions."""

import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from services.registry.entries import ScoreConcluded, SubmissionChanged
from services.registry.records import Round, Score, Submission, Task
from services.registry.referee.docket import Docket
from services.registry.referee.turns import each, traced
from services.registry.rounds import (
    FIRST_ROUND,
    Standing,
    end_assignment,
    end_round,
    give_up,
    headcount,
    record_fault,
    reject,
    reports_of,
    set_deadline,
    standing,
    state_when_late,
    submission_of,
    task_of,
)
from services.registry.states import (
    AssignmentState,
    EvaluationVerdict,
    RejectionReason,
    RoundState,
    SubmissionState,
    ValidatorFaultKind,
)
from services.registry.transaction import Reading, Store, Writing
from services.registry.visibility import hides
from tiltyard import ladder, scoring
from tiltyard.commitments import SALT_BYTES


class Judging:
    """Looks on a snapshot for what is due, and looks again in the transaction that does it."""

    def __init__(self, store: Store, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._clock = clock
        self._sealing = Docket(RoundState.SEALING, _sealing_is_over)
        self._opening = Docket(RoundState.OPENING, _opening_is_over)

    async def expire_assignments(self) -> int:
        """Duties that were not accepted, or not sealed, in time: the next reserve may have them."""
        now = self._clock()
        if not await self._store.finds(lambda tx: tx.assignments_due(now)):
            return 0

        def expire(tx: Writing) -> int:
            due = tx.assignments_due(tx.now)
            for assignment in due:
                end_assignment(tx, assignment, state_when_late(tx, assignment))
            return len(due)

        return await self._store.write(expire)

    async def open_reports(self) -> int:
        """Rounds with all the seals they want, or no more to come, ask for the reports."""
        return await self._turn("ask to open", self._sealing, _ask_to_open)

    async def conclude(self) -> int:
        """Rounds whose reports have been opened, or whose time to open is over, are concluded."""
        return await self._turn("conclude", self._opening, _conclude)

    async def _turn(self, step: str, docket: Docket, work: Callable[[Writing, Round], None]) -> int:
        now = self._clock()

        async def do(seen: Round) -> int:
            def write(tx: Writing) -> int:
                round_ = tx.round(seen.task, seen.number, seen.round)
                if round_ is None or not docket.is_due(tx, round_, tx.now):
                    return 0
                work(tx, round_)
                return 1

            with traced(step, seen):
                return await self._store.write(write)

        if not await self._store.finds(lambda tx: docket.news(tx, now)):
            return 0
        due = await self._store.read(lambda tx: docket.look(tx, now))
        return await each(due, do, undone=docket.put_back)


def _quorum(tx: Reading, round_: Round) -> int:
    return scoring.quorum(task_of(tx, round_).config.validators_per_submission)


def _sealing_is_over(tx: Reading, round_: Round, now: datetime) -> bool:
    if now >= round_.deadline:
        return True
    pending, reported = headcount(tx, round_)
    if reported >= round_.wanted:
        return True
    return round_.exhausted and (not pending or pending + reported < _quorum(tx, round_))


def _ask_to_open(tx: Writing, round_: Round) -> None:
    found, quorum = standing(tx, round_), _quorum(tx, round_)
    for assignment in found.pending:
        late = assignment.deadline is not None and tx.now >= assignment.deadline
        end_assignment(tx, assignment, state_when_late(tx, assignment) if late else AssignmentState.RELEASED)
    if found.reported < quorum:
        give_up(tx, round_, f"{found.reported} reports came in, at least {quorum} are needed")
        return
    deadline = tx.now + task_of(tx, round_).config.schedule.evaluation_time
    for assignment in found.sealed:
        tx.put_assignment(replace(assignment, opening=True, deadline=deadline, update_time=tx.now))
    tx.put_round(replace(round_, state=RoundState.OPENING, deadline=deadline, detail=""))
    set_deadline(tx, round_, deadline)


def _opening_is_over(tx: Reading, round_: Round, now: datetime) -> bool:
    return now >= round_.deadline or not standing(tx, round_).sealed


def _conclude(tx: Writing, round_: Round) -> None:
    for assignment in standing(tx, round_).sealed:
        end_assignment(tx, assignment, AssignmentState.EXPIRED)
        evaluation = tx.evaluation(round_.task, round_.number, round_.round, assignment.validator)
        if evaluation is not None:
            tx.put_evaluation(replace(evaluation, verdict=EvaluationVerdict.UNOPENED))
    found, quorum = standing(tx, round_), _quorum(tx, round_)
    if len(found.counted) < quorum:
        if round_.exhausted:
            give_up(tx, round_, f"{len(found.counted)} reports were opened, at least {quorum} are needed")
        else:
            _seal_again(tx, round_, wanted=round_.wanted)
        return
    config = task_of(tx, round_).config
    result = scoring.conclude(
        reports_of(found.counted),
        config.validators_per_submission,
        config.tolerance,
        disputed=round_.disputed or round_.exhausted,
    )
    match result:
        case scoring.NeedMore(reserves_wanted=more):
            _seal_again(tx, replace(round_, disputed=True), wanted=len(found.counted) + more)
        case scoring.Conclusion():
            _record(tx, round_, found, result)


def _seal_again(tx: Writing, round_: Round, *, wanted: int) -> None:
    """Back to sealing, for reserves that are still to be called in; the reports that were opened are kept."""
    schedule = task_of(tx, round_).config.schedule
    deadline = tx.now + schedule.evaluation_time
    tx.put_round(replace(round_, state=RoundState.SEALING, deadline=deadline, wanted=wanted))
    set_deadline(tx, round_, deadline + schedule.evaluation_time)


def _record(tx: Writing, round_: Round, found: Standing, result: scoring.Conclusion) -> None:
    if result.outcome is not scoring.Outcome.AMBIGUOUS:
        for evaluation in found.counted:
            outlier = evaluation.validator in result.outliers
            verdict = EvaluationVerdict.OUTLIER if outlier else EvaluationVerdict.AGREED
            tx.put_evaluation(replace(evaluation, verdict=verdict))
            if outlier:
                record_fault(tx, evaluation, ValidatorFaultKind.OUTLIER)
    task = task_of(tx, round_)
    end_round(tx, round_)
    score = Score(
        round=round_.round,
        outcome=result.outcome.value,
        correct=result.correct,
        total=result.total,
        fault=result.fault,
        tolerance=result.tolerance,
        evaluations=tuple(evaluation.validator for evaluation in found.counted),
        outliers=result.outliers,
    )
    submission = submission_of(tx, round_)
    submission = replace(submission, scores={**submission.scores, round_.round: score})
    if hides(task):
        submission = replace(
            submission,
            hidden=True,
            score_salt=secrets.token_bytes(SALT_BYTES),
            public_best=_public_best(tx, task, submission, score),
        )
    tx.append(ScoreConcluded(task.id, submission.number, score, salt=submission.score_salt, hidden=hides(task)))
    if round_.round != FIRST_ROUND:
        tx.put_submission(submission)
    elif result.outcome is scoring.Outcome.SCORED:
        scored = replace(submission, state=SubmissionState.SCORED, detail="", deadline=None, end_time=tx.now)
        tx.put_submission(scored)
        tx.append(SubmissionChanged(task=scored.task, number=scored.number, state=scored.state))
    elif result.outcome is scoring.Outcome.FAULT:
        detail = f"{len(found.counted) - len(result.outliers)} of {len(found.counted)} validators found it"
        reject(tx, submission, RejectionReason[result.fault], detail=detail)
    else:
        reject(tx, submission, RejectionReason.AMBIGUOUS, detail="the validators found no majority")


def _public_best(tx: Reading, task: Task, submission: Submission, score: Score) -> int | None:
    """What the node's public best becomes by this score; None where it stays as it was."""
    if score.outcome != scoring.Outcome.SCORED.value:
        return None
    # Those rejected later as copies have been shown too.
    best = tx.public_best(task.id, submission.participant)
    return ladder.climbed(best, score.correct, score.total, task.config.ladder_step_micros)
