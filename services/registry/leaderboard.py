"""The ranking of a task's training nodes by their best score."""

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import astuple, dataclass
from datetime import datetime

from services.registry.records import Score, Submission, Task
from services.registry.rounds import FIRST_ROUND
from services.registry.states import SubmissionState, TaskState
from services.registry.task_states import ENDED, known_task
from services.registry.transaction import Changes, Reading, Store
from services.registry.visibility import visible
from services.registry.watching import watch
from tiltyard.scoring import wilson_interval

_SCORED = "SCORED"


@dataclass(frozen=True)
class Place:
    """One node's place; `rank` counts from 1."""

    rank: int
    participant: str
    display_name: str
    number: int
    """Of its best submission."""
    correct: int
    total: int
    scored_submissions: int
    interval: tuple[float, float]
    """95 % Wilson interval of correct/total; for people."""


@dataclass(frozen=True)
class Ranking:
    """All places of one task, best first."""

    task: str
    places: tuple[Place, ...]
    round: int
    final: bool
    update_time: datetime
    ended: bool

    @property
    def face(self) -> str:
        """What a watcher sees of it, as a fingerprint: the same for as long as nothing of it changes."""
        shown = json.dumps([[astuple(place) for place in self.places], self.round, self.final])
        return hashlib.sha256(shown.encode()).hexdigest()[:32]


class Leaderboard:
    """Ranks by the first round until a task is FINAL, then by the round that ranks it."""

    def __init__(self, store: Store, changes: Changes) -> None:
        self._store = store
        self._changes = changes

    async def get(self, task: str) -> Ranking:
        """The ranking as it is. Raises NotFound."""
        return await self._store.read(lambda tx: _ranking(tx, task))

    async def watch(self, task: str, *, after: str) -> AsyncIterator[Ranking]:
        """The ranking now, unless its face is still `after`, and after each change of it until the task has ended."""
        seen = after
        async with aclosing(watch(self._changes, f"tasks/{task}", lambda: self.get(task))) as rankings:
            async for ranking in rankings:
                if ranking.face != seen:
                    seen = ranking.face
                    yield ranking
                if ranking.ended:
                    return


def _ranking(tx: Reading, task_id: str) -> Ranking:
    task = known_task(tx, task_id)
    round_ = task.ranking_round or FIRST_ROUND
    best: dict[str, tuple[tuple[int, int], Submission, Score]] = {}
    counts: dict[str, int] = {}
    for submission in tx.submissions(task.id, state=SubmissionState.SCORED):
        judged = submission.scores.get(round_)
        if judged is None or judged.outcome != _SCORED:
            continue
        counts[submission.participant] = counts.get(submission.participant, 0) + 1
        score = visible(task, submission).scores.get(round_)
        if score is None:
            continue
        # Totals are the same for all; numbers are in the order of commits.
        merit = (-score.correct, submission.number)
        known = best.get(submission.participant)
        if known is None or merit < known[0]:
            best[submission.participant] = (merit, submission, score)
    ordered = sorted(best.values(), key=lambda entry: entry[0])
    places = tuple(
        _place(tx, rank, submission, score, counts[submission.participant])
        for rank, (_, submission, score) in enumerate(ordered, start=1)
    )
    return Ranking(
        task=task.id,
        places=places,
        round=round_,
        final=task.state is TaskState.FINAL,
        update_time=_changed(task, [submission for _, submission, _ in ordered]),
        ended=task.state in ENDED,
    )


def _place(tx: Reading, rank: int, submission: Submission, score: Score, scored: int) -> Place:
    participant = tx.participant(submission.participant)
    return Place(
        rank=rank,
        participant=submission.participant,
        display_name="" if participant is None else participant.display_name,
        number=submission.number,
        correct=score.correct,
        total=score.total,
        scored_submissions=scored,
        interval=wilson_interval(score.correct, score.total),
    )


def _changed(task: Task, ranked: list[Submission]) -> datetime:
    if task.state in ENDED:
        return task.update_time
    return max((s.end_time for s in ranked if s.end_time is not None), default=task.create_time)
