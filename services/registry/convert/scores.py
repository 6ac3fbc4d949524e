"""Scores in the contract's words."""

from services.registry.records import Score
from services.runtime import names
from services.runtime.names import AssignmentId
from tiltyard.type.v1 import evaluation_pb2


def score_message(score: Score, *, task: str, number: int) -> evaluation_pb2.Score:
    """The score of one submission in one round, its evaluations as resource names."""

    def evaluation(validator: str) -> str:
        return names.format_evaluation(AssignmentId(task, number, score.round, validator))

    return evaluation_pb2.Score(
        outcome=evaluation_pb2.ScoreOutcome.Value("SCORE_OUTCOME_" + score.outcome),
        correct=score.correct,
        total=score.total,
        fault=evaluation_pb2.ModelFault.Value("MODEL_FAULT_" + score.fault) if score.fault else 0,  # type: ignore[arg-type]
        tolerance=score.tolerance,
        evaluations=[evaluation(validator) for validator in score.evaluations],
        outliers=[evaluation(validator) for validator in score.outliers],
        round=score.round,
    )
