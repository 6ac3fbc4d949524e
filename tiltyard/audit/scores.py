"""Scores concluded again from the opened reports."""

from tiltyard import scoring
from tiltyard.audit.story import Story, Submission
from tiltyard.commitments import matches, score_commitment
from tiltyard.type.v1 import envelope_pb2, evaluation_pb2


class ScoreMismatch(ValueError):
    """A score that does not follow from the reports."""


def check_score(story: Story, submission: Submission, score: evaluation_pb2.Score) -> None:
    """Concludes a round again. Raises ScoreMismatch with what differs."""
    opened = story.reports[submission.name, score.round]
    counted = {name: report for name, report in opened.items() if not report.node_endpoint}
    if not score.evaluations or set(score.evaluations) != counted.keys():
        raise ScoreMismatch(f"the score of {submission.name} counts other evaluations than were opened")
    if len(set(score.evaluations)) != len(score.evaluations):
        raise ScoreMismatch(f"the score of {submission.name} counts an evaluation twice")
    config = submission.task.config
    reports = [_vote(name, counted[name]) for name in score.evaluations]
    try:
        result = scoring.conclude(reports, config.validators_per_submission, config.tolerance, disputed=True)
    except ValueError as error:
        raise ScoreMismatch(f"the score of {submission.name}: {error}") from error
    if not isinstance(result, scoring.Conclusion):
        raise ScoreMismatch(f"the reports of {submission.name} give no conclusion")
    expected = evaluation_pb2.Score(
        outcome=_OUTCOMES[result.outcome],
        correct=result.correct,
        total=result.total,
        fault=_FAULTS.get(result.fault, evaluation_pb2.MODEL_FAULT_UNSPECIFIED),
        tolerance=result.tolerance,
        evaluations=score.evaluations,
        outliers=result.outliers,
        round=score.round,
    )
    if expected != score:
        raise ScoreMismatch(
            f"{submission.name} was scored {_told(score)}, the lower median and the tolerance give {_told(expected)}"
        )
    if story.outliers[submission.name, score.round] != set(score.outliers):
        raise ScoreMismatch(f"the outliers of {submission.name} are not those who were named at fault")


def check_opened_score(submission: Submission, score: evaluation_pb2.Score, salt: bytes) -> None:
    """Whether a score that was hidden is the one that was committed to. Raises ScoreMismatch."""
    commitment = submission.hidden.get(score.round)
    if commitment is None:
        raise ScoreMismatch(f"a hidden score of {submission.name} is opened, which was never committed to")
    try:
        opened = score_commitment(score=score.SerializeToString(deterministic=True), salt=salt)
    except ValueError as error:
        raise ScoreMismatch(str(error)) from error
    if not matches(opened, commitment):
        raise ScoreMismatch(f"the score of {submission.name} is not the one committed to")


def _vote(name: str, report: envelope_pb2.EvaluationReport) -> scoring.Report:
    if report.HasField("counts"):
        counts = report.counts
        if not 0 <= counts.correct <= counts.total or counts.total < 1:
            raise ScoreMismatch(f"the counts of {name} do not add up")
        return scoring.Report(name, counts=scoring.Counts(counts.correct, counts.total, counts.ambiguous))
    if report.fault not in _FAULT_NAMES:
        raise ScoreMismatch(f"{name} names a fault that there is not")
    return scoring.Report(name, fault=_FAULT_NAMES[report.fault])


def _told(score: evaluation_pb2.Score) -> str:
    outcome = _OUTCOME_NAMES.get(score.outcome, str(score.outcome))
    fault = _FAULT_NAMES.get(score.fault, str(score.fault)) if score.fault else ""
    outliers = f", {len(score.outliers)} outliers" if score.outliers else ""
    return f"{outcome} {fault or f'{score.correct}/{score.total}'} (tolerance {score.tolerance}{outliers})"


_OUTCOMES = {
    scoring.Outcome.SCORED: evaluation_pb2.SCORE_OUTCOME_SCORED,
    scoring.Outcome.FAULT: evaluation_pb2.SCORE_OUTCOME_FAULT,
    scoring.Outcome.AMBIGUOUS: evaluation_pb2.SCORE_OUTCOME_AMBIGUOUS,
}
_OUTCOME_NAMES = {number: name.removeprefix("SCORE_OUTCOME_") for name, number in evaluation_pb2.ScoreOutcome.items()}
_FAULTS = {name.removeprefix("MODEL_FAULT_"): number for name, number in evaluation_pb2.ModelFault.items()}
_FAULT_NAMES = {number: name for name, number in _FAULTS.items()}
