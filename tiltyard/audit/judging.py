"""Commits, reveals, draws, seals, reports and scores, each held against what must come before it."""

from collections.abc import Iterator

from tiltyard.audit import duties
from tiltyard.audit.reading import Reading
from tiltyard.audit.scores import ScoreMismatch, check_opened_score, check_score
from tiltyard.audit.story import FIRST_ROUND, HOLDOUT_ROUND, Story, Submission, Task
from tiltyard.audit.wrong import Claim, Wrong, demand, moment_ns
from tiltyard.commitments import (
    DIGEST_BYTES,
    SALT_BYTES,
    evaluation_seal,
    holdout_anchor,
    matches,
    submission_commitment,
)
from tiltyard.receipts import ReceiptInvalid, verify_receipt
from tiltyard.type.v1 import draw_pb2, envelope_pb2, evaluation_pb2, log_pb2, participation_pb2, task_pb2

_COMMITTED = evaluation_pb2.SUBMISSION_STATE_COMMITTED
_REVEALED = evaluation_pb2.SUBMISSION_STATE_REVEALED
_EVALUATING = evaluation_pb2.SUBMISSION_STATE_EVALUATING
_SCORED = evaluation_pb2.SUBMISSION_STATE_SCORED
_REJECTED = evaluation_pb2.SUBMISSION_STATE_REJECTED
# Found by validators, so that there is a score behind it.
_JUDGED = (
    evaluation_pb2.REJECTION_REASON_NAN_OUTPUT,
    evaluation_pb2.REJECTION_REASON_TOO_SLOW,
    evaluation_pb2.REJECTION_REASON_OUT_OF_MEMORY,
    evaluation_pb2.REJECTION_REASON_CRASHED,
    evaluation_pb2.REJECTION_REASON_AMBIGUOUS,
)
# Found by a look at the file, or by validators.
_STRUCTURE = (
    evaluation_pb2.REJECTION_REASON_BAD_FORMAT,
    evaluation_pb2.REJECTION_REASON_SHAPE_MISMATCH,
    evaluation_pb2.REJECTION_REASON_TOO_LARGE,
    evaluation_pb2.REJECTION_REASON_DIGEST_MISMATCH,
)
_ACTIVE_NODE = (participation_pb2.ROLE_TRAINING_NODE, participation_pb2.MEMBERSHIP_STATE_ACTIVE)


def committed(reading: Reading, index: int, leaf: bytes, entry: log_pb2.SubmissionCommitted) -> None:
    """A model is committed to, by an active training node of an open task."""
    story = reading.story
    commit, signer = reading.open(entry.statement, envelope_pb2.CommitStatement)
    task = reading.task(commit.task)
    demand(commit.participant == signer, Claim.ENVELOPES, f"{commit.participant} did not sign, {signer} did")
    demand(
        entry.submission == f"{task.name}/submissions/{task.submissions + 1}",
        Claim.HISTORY,
        f"{entry.submission} is not the next submission of {commit.task}",
    )
    demand(
        task.state == task_pb2.TASK_STATE_OPEN, Claim.HISTORY, f"{entry.submission} is committed, {task.name} not open"
    )
    demand(
        story.members.get((task.name, signer)) == _ACTIVE_NODE,
        Claim.HISTORY,
        f"{signer} is no active training node of {task.name}",
    )
    task.submissions += 1
    story.submissions[entry.submission] = Submission(entry.submission, task, commit, reading.time_ns)


def revealed(reading: Reading, index: int, leaf: bytes, entry: log_pb2.SubmissionRevealed) -> None:
    """A commitment is opened."""
    submission = _submission(reading.story, entry.submission)
    reveal, signer = reading.open(entry.statement, envelope_pb2.RevealStatement)
    commit = submission.commit
    demand(commit.participant == signer, Claim.ENVELOPES, f"{commit.participant} did not sign, {signer} did")
    demand(reveal.submission == submission.name, Claim.ENVELOPES, f"the reveal is of {reveal.submission}")
    demand(submission.state == _COMMITTED, Claim.HISTORY, f"{submission.name} is revealed a second time, or too late")
    sized = len(reveal.model_digest) == DIGEST_BYTES and len(reveal.salt) == SALT_BYTES
    right = sized and matches(
        submission_commitment(
            origin=commit.origin,
            task=commit.task,
            participant=commit.participant,
            model_digest=reveal.model_digest,
            salt=reveal.salt,
        ),
        commit.commitment,
    )
    demand(right, Claim.COMMITMENTS, f"{submission.name} was committed to with another model or salt")
    submission.reveal, submission.reveal_leaf, submission.state = reveal, leaf, _REVEALED
    reading.counts[Claim.COMMITMENTS] += 1


def changed(reading: Reading, index: int, leaf: bytes, entry: log_pb2.SubmissionChanged) -> None:
    """The registry concludes a state."""
    story, submission = reading.story, _submission(reading.story, entry.submission)
    name, before = submission.name, submission.state
    hidden, score = bool(submission.hidden), submission.scores.get(FIRST_ROUND)
    if entry.state == _EVALUATING:
        drawn = (name, FIRST_ROUND) in story.draws
        demand(before == _REVEALED and drawn, Claim.HISTORY, f"{name} is evaluated without a reveal and a draw")
    elif entry.state == _SCORED:
        demand(before in (_EVALUATING, _SCORED), Claim.HISTORY, f"{name} is scored without an evaluation")
        stands = hidden or (score is not None and score.outcome == evaluation_pb2.SCORE_OUTCOME_SCORED)
        demand(stands, Claim.SCORES, f"{name} is scored, but no score was concluded")
    elif entry.state == _REJECTED:
        demand(before != _REJECTED, Claim.HISTORY, f"{name} is rejected twice")
        _check_rejection(story, submission, entry, reading.time_ns)
    else:
        raise Wrong(Claim.HISTORY, f"{name} goes to a state that only its submitter brings about")
    submission.state = entry.state
    if entry.state == _REJECTED:
        submission.reason, submission.end_index = entry.reason, index
    copied = entry.state == _REJECTED and entry.reason == evaluation_pb2.REJECTION_REASON_COPY
    demand(copied or not entry.original, Claim.HISTORY, f"{name} is no copy, and {entry.original} is named")
    reading.counts[Claim.HISTORY] += 1


def _check_rejection(story: Story, submission: Submission, entry: log_pb2.SubmissionChanged, time_ns: int) -> None:
    name, reason = submission.name, entry.reason
    if reason == evaluation_pb2.REJECTION_REASON_REVEAL_EXPIRED:
        demand(submission.state == _COMMITTED, Claim.HISTORY, f"{name} was revealed, and is rejected as if it were not")
        expiry_ns = submission.commit_time_ns + submission.task.config.schedule.reveal_time.ToNanoseconds()
        demand(time_ns >= expiry_ns, Claim.HISTORY, f"{name} is rejected before its time to be revealed is over")
    elif reason == evaluation_pb2.REJECTION_REASON_COPY:
        original = story.submissions.get(entry.original)
        right = (
            original is not None
            and original.task is submission.task
            and original.number < submission.number
            and original.reveal is not None
            and submission.reveal is not None
            and original.reveal.model_digest == submission.reveal.model_digest
        )
        demand(right, Claim.HISTORY, f"{name} is no copy of {entry.original or 'anything'}")
    elif _was_judged(story, submission, reason) and not submission.hidden:
        score = submission.scores.get(FIRST_ROUND)
        demand(score is not None and _gives(score, reason), Claim.SCORES, f"{name} is rejected for what nobody found")


def _was_judged(story: Story, submission: Submission, reason: "evaluation_pb2.RejectionReason.ValueType") -> bool:
    """Whether a rejection for this reason must rest on a score: a look at the file comes before any draw."""
    return reason in _JUDGED or (reason in _STRUCTURE and (submission.name, FIRST_ROUND) in story.draws)


def _gives(score: evaluation_pb2.Score, reason: "evaluation_pb2.RejectionReason.ValueType") -> bool:
    if score.outcome == evaluation_pb2.SCORE_OUTCOME_AMBIGUOUS:
        return reason == evaluation_pb2.REJECTION_REASON_AMBIGUOUS
    fault = evaluation_pb2.ModelFault.Name(score.fault).removeprefix("MODEL_FAULT_")
    return (
        score.outcome == evaluation_pb2.SCORE_OUTCOME_FAULT
        and evaluation_pb2.RejectionReason.Name(reason) == f"REJECTION_REASON_{fault}"
    )


def drawn(reading: Reading, index: int, leaf: bytes, receipt: draw_pb2.DrawReceipt) -> None:
    """Validators are drawn, or the order of a draw is extended."""
    story, submission = reading.story, _submission(reading.story, receipt.submission)
    what, reveal, task = receipt.draw, submission.reveal, submission.task
    demand(reveal is not None, Claim.DRAWS, f"{what} is for {submission.name}, which was never revealed")
    if receipt.round == FIRST_ROUND:
        anchor = submission.reveal_leaf
    else:
        demand(receipt.round == HOLDOUT_ROUND, Claim.DRAWS, f"{what} is for round {receipt.round}, which there is not")
        demand(bool(task.holdout_leaf), Claim.DRAWS, f"{what} is for a holdout that was not accepted")
        anchor = holdout_anchor(holdout_leaf=task.holdout_leaf, submission=submission.name)
    demand(receipt.anchor == anchor, Claim.DRAWS, f"{what} is not anchored in the leaf that fixed its moment")
    salt = b"" if reveal is None else reveal.salt
    demand(receipt.reveal_salt == salt, Claim.DRAWS, f"{what} has another salt than the reveal")
    wanted = task.config.validators_per_submission
    demand(receipt.assigned == wanted, Claim.DRAWS, f"{what} assigns {receipt.assigned}, the task wants {wanted}")
    interested = {submission.commit.participant, task.creator}
    neutral = interested.isdisjoint(pick.participant for pick in receipt.picks)
    demand(neutral, Claim.DRAWS, f"{what} picks the submitter or the task's creator")
    named = {who for pick in receipt.picks for who in pick.members}
    strangers = named - story.participants.keys()
    demand(not strangers, Claim.DRAWS, f"{what} names {min(strangers, default='')}, who has not registered")
    moment_ns(receipt.draw_time, Claim.DRAWS, what)
    try:
        verify_receipt(receipt, selector_key=story.selector_key)
    except ReceiptInvalid as error:
        raise Wrong(Claim.DRAWS, f"{what}: {error.reason}") from error
    key = (submission.name, receipt.round)
    earlier = story.draws.get(key)
    if earlier is None:
        story.draw_leaves[key] = index
    else:
        _check_extension(earlier, receipt)
    story.draws[key] = receipt
    for pick in receipt.picks:
        story.picked.setdefault((receipt.draw, pick.participant), index)
    reading.counts[Claim.DRAWS] += 1


def _check_extension(earlier: draw_pb2.DrawReceipt, later: draw_pb2.DrawReceipt) -> None:
    same = (
        earlier.pool_root == later.pool_root
        and list(later.picks)[: len(earlier.picks)] == list(earlier.picks)
        and list(later.passed_over)[: len(earlier.passed_over)] == list(earlier.passed_over)
    )
    demand(same, Claim.DRAWS, f"{later.draw} does not go on where it stopped")


def sealed(reading: Reading, index: int, leaf: bytes, entry: log_pb2.EvaluationSealed) -> None:
    """A report is sealed under a lease."""
    story, name = reading.story, entry.evaluation
    seal, signer = reading.open(entry.statement, envelope_pb2.SealStatement)
    _, _, validator = duties.parts(name, "/evaluations/")
    demand(validator == signer, Claim.ENVELOPES, f"{validator} did not sign, {signer} did")
    assignment = name.replace("/evaluations/", "/assignments/")
    demand(seal.assignment == assignment, Claim.SEALS, f"{name} was sealed for {seal.assignment}")
    demand(name not in story.seals, Claim.SEALS, f"{name} is sealed twice")
    duties.seal(story, assignment, name)
    story.seals[name] = seal


def opened(reading: Reading, index: int, leaf: bytes, entry: log_pb2.EvaluationOpened) -> None:
    """A sealed report is laid open."""
    story, name = reading.story, entry.evaluation
    report, signer = reading.open(entry.report, envelope_pb2.EvaluationReport)
    submission_name, round_, validator = duties.parts(name, "/evaluations/")
    submission = _submission(story, submission_name)
    demand(validator == signer, Claim.ENVELOPES, f"{validator} did not sign, {signer} did")
    demand(name in story.seals, Claim.SEALS, f"{name} is opened, and was never sealed")
    demand(name not in story.reports[submission_name, round_], Claim.SEALS, f"{name} is opened twice")
    seal = story.seals[name]
    right = len(entry.salt) == SALT_BYTES and matches(
        evaluation_seal(assignment=seal.assignment, report=entry.report.payload, salt=entry.salt), seal.seal
    )
    demand(right, Claim.SEALS, f"{name} is not what was sealed")
    demand(report.assignment == seal.assignment, Claim.SEALS, f"{name} reports on {report.assignment}")
    digest = b"" if submission.reveal is None else submission.reveal.model_digest
    demand(report.model_digest == digest, Claim.SCORES, f"{name} is about another model than {submission.name}'s")
    dataset = submission.task.dataset(round_)
    demand(report.dataset_digest == dataset, Claim.SCORES, f"{name} is about another dataset than the task's")
    demand(round_ not in submission.scores, Claim.SCORES, f"{name} is opened after the score was concluded")
    duties.open_report(story, seal.assignment, name)
    story.reports[submission_name, round_][name] = report
    reading.counts[Claim.SEALS] += 1


def concluded(reading: Reading, index: int, leaf: bytes, entry: log_pb2.ScoreConcluded) -> None:
    """A score, or a commitment to one."""
    story, submission = reading.story, _submission(reading.story, entry.submission)
    if not entry.HasField("score"):
        hidden = submission.task.hides and len(entry.commitment) == 32 and not entry.salt
        demand(hidden and not submission.hidden, Claim.SCORES, f"the score of {submission.name} is kept back")
        submission.hidden[FIRST_ROUND] = entry.commitment
        return
    score = entry.score
    kept_back = bool(entry.salt) or not submission.task.hides
    demand(kept_back, Claim.SCORES, f"the score of {submission.name} is shown, and was to be kept back")
    demand(score.round in (FIRST_ROUND, HOLDOUT_ROUND), Claim.SCORES, f"there is no round {score.round}")
    demand((submission.name, score.round) in story.draws, Claim.SCORES, f"{submission.name} was scored and never drawn")
    demand(score.round not in submission.scores, Claim.SCORES, f"{submission.name} is scored twice in a round")
    try:
        check_score(story, submission, score)
        if entry.salt:
            check_opened_score(submission, score, entry.salt)
            submission.hidden.pop(score.round, None)
    except ScoreMismatch as error:
        raise Wrong(Claim.SCORES, str(error)) from error
    demand(score.round not in submission.hidden, Claim.SCORES, f"the score of {submission.name} is shown unsalted")
    if entry.salt:
        _check_conclusion(story, submission, score)
    submission.scores[score.round] = score
    reading.counts[Claim.SCORES] += 1


def _check_conclusion(story: Story, submission: Submission, score: evaluation_pb2.Score) -> None:
    """Whether a score that was kept back is what its submission's state was concluded from."""
    name = submission.name
    if submission.state == _SCORED:
        scored = score.outcome == evaluation_pb2.SCORE_OUTCOME_SCORED
        demand(scored, Claim.SCORES, f"{name} is scored, and the score that was kept back says otherwise")
    elif _was_judged(story, submission, submission.reason):
        right = _gives(score, submission.reason)
        demand(right, Claim.SCORES, f"{name} is rejected for another reason than the score that was kept back gives")


def cancelled_without_its_task(story: Story) -> Iterator[tuple[int, str]]:
    """Submissions that were rejected with a task which was never cancelled: the leaf, and what is wrong with it."""
    for submission in story.submissions.values():
        ended_with_task = submission.reason == evaluation_pb2.REJECTION_REASON_TASK_CANCELLED
        if ended_with_task and submission.task.state != task_pb2.TASK_STATE_CANCELLED:
            yield submission.end_index, f"{submission.name} is rejected as cancelled, and {submission.task.name} is not"


def ranking_round(story: Story, task: Task) -> int:
    """The round that ranks a task whose submissions have all ended. Raises Wrong when they have not."""
    mine = [each for each in story.submissions.values() if each.task is task]
    for each in mine:
        demand(each.state in (_SCORED, _REJECTED), Claim.HISTORY, f"{task.name} is final, {each.name} has not ended")
        demand(not each.hidden, Claim.SCORES, f"{task.name} is final, and the score of {each.name} was never opened")
        _check_first(each, mine)
    judged_again = task.holdout_told or not task.config.HasField("holdout")
    demand(judged_again, Claim.HISTORY, f"{task.name} is final, and nothing is said of its holdout")
    if not task.holdout_leaf:
        return FIRST_ROUND
    scored = [each for each in mine if each.state == _SCORED]
    second = [each.scores[HOLDOUT_ROUND] for each in scored if HOLDOUT_ROUND in each.scores]
    judged = not scored or any(score.outcome == evaluation_pb2.SCORE_OUTCOME_SCORED for score in second)
    return HOLDOUT_ROUND if judged else FIRST_ROUND


def _check_first(submission: Submission, all_of_task: list[Submission]) -> None:
    """Raises Wrong for a scored copy: of those revealed the earliest commit owns a model."""
    if submission.state != _SCORED or submission.reveal is None:
        return
    for other in all_of_task:
        same = other.reveal is not None and other.reveal.model_digest == submission.reveal.model_digest
        # Who failed through the platform's fault alone may submit the same model again.
        again = (
            other.commit.participant == submission.commit.participant
            and other.reason == evaluation_pb2.REJECTION_REASON_VALIDATORS_UNAVAILABLE
        )
        owned = same and other.number < submission.number and not again
        demand(not owned, Claim.HISTORY, f"{submission.name} is scored, and is a copy of {other.name}")


def _submission(story: Story, name: str) -> Submission:
    demand(name in story.submissions, Claim.HISTORY, f"{name} was never committed")
    return story.submissions[name]
