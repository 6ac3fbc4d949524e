"""Leaderboards made again from the scores in the log."""

from collections import Counter

from tiltyard.audit.story import Story, Submission
from tiltyard.registry.v1 import leaderboard_pb2
from tiltyard.scoring import wilson_interval
from tiltyard.type.v1 import evaluation_pb2, task_pb2

_INTERVAL_ERROR = 1e-9


def leaderboard(story: Story, task_name: str) -> leaderboard_pb2.Leaderboard | None:
    """The ranking that the scores give; None while the task hides them, or for an unknown task."""
    task = story.tasks.get(task_name)
    if task is None or task.hides:
        return None
    final = task.state == task_pb2.TASK_STATE_FINAL
    best: dict[str, tuple[int, int, Submission, evaluation_pb2.Score]] = {}
    counted: Counter[str] = Counter()
    for submission in story.submissions.values():
        score = submission.scores.get(task.ranking_round)
        scored = submission.state == evaluation_pb2.SUBMISSION_STATE_SCORED and submission.task is task
        if not scored or score is None or score.outcome != evaluation_pb2.SCORE_OUTCOME_SCORED:
            continue
        participant = submission.commit.participant
        counted[participant] += 1
        merit = (-score.correct, submission.number, submission, score)
        if participant not in best or merit[:2] < best[participant][:2]:
            best[participant] = merit
    board = leaderboard_pb2.Leaderboard(task=task_name, round=task.ranking_round, final=final)
    ranked = sorted(best.values(), key=lambda merit: merit[:2])
    for rank, (_, _, submission, score) in enumerate(ranked, start=1):
        participant = submission.commit.participant
        low, high = wilson_interval(score.correct, score.total)
        board.entries.add(
            rank=rank,
            participant=participant,
            display_name=story.participants.get(participant, ""),
            submission=submission.name,
            correct=score.correct,
            total=score.total,
            scored_submissions=counted[participant],
            interval_low=low,
            interval_high=high,
        )
    return board


def difference(shown: leaderboard_pb2.Leaderboard, expected: leaderboard_pb2.Leaderboard) -> str:
    """What a leaderboard that was shown says otherwise than the log, empty for nothing."""
    if (shown.task, shown.round, shown.final) != (expected.task, expected.round, expected.final):
        return f"{shown.task} is ranked by round {shown.round}, final: {shown.final}; the log says otherwise"
    if len(shown.entries) != len(expected.entries):
        return (
            f"the leaderboard of {shown.task} has {len(shown.entries)} places, the scores give {len(expected.entries)}"
        )
    for mine, other in zip(shown.entries, expected.entries, strict=True):
        if _face(mine) != _face(other) or _interval_differs(mine, other):
            return f"place {other.rank} of {shown.task} shows {_told(mine)}, the scores give {_told(other)}"
    return ""


def _face(entry: leaderboard_pb2.LeaderboardEntry) -> tuple[object, ...]:
    return (
        entry.rank,
        entry.participant,
        entry.display_name,
        entry.submission,
        entry.correct,
        entry.total,
        entry.scored_submissions,
    )


def _interval_differs(one: leaderboard_pb2.LeaderboardEntry, other: leaderboard_pb2.LeaderboardEntry) -> bool:
    low, high = abs(one.interval_low - other.interval_low), abs(one.interval_high - other.interval_high)
    # NaN is near nothing.
    return not (low <= _INTERVAL_ERROR and high <= _INTERVAL_ERROR)


def _told(entry: leaderboard_pb2.LeaderboardEntry) -> str:
    return f"{entry.participant} with {entry.submission}, {entry.correct}/{entry.total}"
