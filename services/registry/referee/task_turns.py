"""What the referee does with tasks as time passes: scan, open, close, rank, and let the stakes go."""

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime

import structlog

from services.registry.entries import HoldoutChanged, TaskChanged
from services.registry.listing import Listing
from services.registry.record_log import RecordLog
from services.registry.records import Task
from services.registry.referee.scans import DatasetScans
from services.registry.referee.turns import each
from services.registry.rounds import FIRST_ROUND, HOLDOUT_ROUND, disclose
from services.registry.selection import Selection
from services.registry.states import ArtifactPurpose, HoldoutState, ScoreVisibility, SubmissionState, TaskState
from services.registry.task_states import cancel, close, fail_holdout
from services.registry.transaction import Reading, Store, Writing
from services.runtime.errors import NotFound
from tiltyard.telemetry import metrics

_UNENDED = (SubmissionState.COMMITTED, SubmissionState.REVEALED, SubmissionState.EVALUATING)
_SCORED = "SCORED"
# Each has a report from every validator; others write in between.
_DISCLOSED_AT_ONCE = 20
_UNBACKED = metrics.Gauge(
    "tiltyard.tasks.unbacked",
    unit="{task}",
    description="Tasks that are judged, and wait for the selector's events of their draws in the record log.",
)

_log = structlog.get_logger("tiltyard.referee")


@dataclass(frozen=True)
class _Judged:
    """A task that has only to be ranked; whether anybody was drawn for it, and all that drew is settled."""

    task: str
    drawn: bool
    settled: bool


class TaskTurns:
    """Steps of the referee; each method is one, and answers with the number of things done."""

    def __init__(
        self,
        store: Store,
        selection: Selection,
        log: RecordLog,
        scans: DatasetScans,
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._selection = selection
        self._log = log
        self._scans = scans
        self._clock = clock
        self._waiting: frozenset[str] = frozenset()

    async def scan_evaluation_datasets(self) -> int:
        """What has been uploaded is scanned: it is to be opened, or CANCELLED with what was found."""

        def uploaded(tx: Reading) -> list[Task]:
            return [t for t in tx.tasks_in(TaskState.PREPARING) if t.open_time is None and _has_dataset(tx, t)]

        if not await self._store.finds(lambda tx: tx.tasks_in(TaskState.PREPARING)):
            return 0
        return await each(await self._store.read(uploaded), self._scan_evaluation_dataset)

    async def _scan_evaluation_dataset(self, task: Task) -> int:
        result = self._scans.look(task, task.config.evaluation_dataset)
        if result is None:
            return 0

        def record(tx: Writing) -> int:
            found = tx.task(task.id)
            if found is None or found.state is not TaskState.PREPARING or found.open_time is not None:
                return 0
            if result.fault:
                cancel(tx, found, reason=f"the evaluation dataset is not good: {result.fault}")
            else:
                # The pool's windows count from here, so this moment is fixed before the selector is asked.
                tx.put_task(replace(found, evaluation_rows=result.rows, open_time=tx.now, pool_open=True))
            return 1

        return await self._store.write(record)

    async def open_tasks(self) -> int:
        """Scanned tasks get their pool and are OPEN."""

        def scanned(tx: Reading) -> list[Task]:
            return [task for task in tx.tasks_in(TaskState.PREPARING) if task.open_time is not None]

        if not await self._store.finds(lambda tx: tx.tasks_in(TaskState.PREPARING)):
            return 0
        return await each(await self._store.read(scanned), self._open_task)

    async def _open_task(self, task: Task) -> int:
        await self._selection.open_pool(task)

        def record(tx: Writing) -> int:
            found = tx.task(task.id)
            if found is None or found.state is not TaskState.PREPARING:
                return 0
            tx.append(TaskChanged(found.id, TaskState.OPEN))
            tx.put_task(replace(found, state=TaskState.OPEN))
            return 1

        return await self._store.write(record)

    async def mind_deadlines(self) -> int:
        """PREPARING for too long is CANCELLED, OPEN tasks are CLOSED in time, holdouts not published have FAILED."""
        now = self._clock()
        if not await self._store.finds(lambda tx: tx.tasks_due(now)):
            return 0

        def record(tx: Writing) -> int:
            overdue = tx.tasks_due(tx.now)
            for task in overdue:
                if task.state is TaskState.PREPARING:
                    cancel(tx, task, reason="the evaluation dataset was not uploaded and scanned in time")
                elif task.state is TaskState.OPEN:
                    close(tx, task)
                else:
                    fail_holdout(tx, task, reason="the holdout was not published in time")
            return len(overdue)

        return await self._store.write(record)

    async def scan_holdouts(self) -> int:
        """Published holdouts are scanned: ACCEPTED, or FAILED with what was found."""

        def published(tx: Reading) -> list[Task]:
            return [task for task in tx.tasks_in(TaskState.CLOSED) if task.holdout is HoldoutState.PUBLISHED]

        if not await self._store.finds(lambda tx: tx.tasks_in(TaskState.CLOSED)):
            return 0
        return await each(await self._store.read(published), self._scan_holdout)

    async def _scan_holdout(self, task: Task) -> int:
        digest = task.config.holdout
        result = None if digest is None else self._scans.look(task, digest)
        if result is None:
            return 0

        def record(tx: Writing) -> int:
            found = tx.task(task.id)
            if found is None or found.state is not TaskState.CLOSED or found.holdout is not HoldoutState.PUBLISHED:
                return 0
            if result.fault:
                fail_holdout(tx, found, reason=f"the holdout is not good: {result.fault}")
                return 1
            leaf = tx.append(HoldoutChanged(found.id, accepted=True))
            accepted = replace(found, holdout=HoldoutState.ACCEPTED, holdout_rows=result.rows, holdout_leaf=leaf.hash)
            tx.put_task(accepted)
            return 1

        return await self._store.write(record)

    async def disclose(self) -> int:
        """Reports and scores that LADDER visibility has held back are laid open in the log once the task is closed."""

        def closed(tx: Reading) -> list[str]:
            tasks = [t for t in tx.tasks_in(TaskState.CLOSED) if t.config.score_visibility is ScoreVisibility.LADDER]
            return [task.id for task in tasks if tx.submissions_hidden(task.id, limit=1)]

        async def disclose_some(task: str) -> int:
            def write(tx: Writing) -> int:
                hidden = tx.submissions_hidden(task, limit=_DISCLOSED_AT_ONCE)
                for submission in hidden:
                    disclose(tx, submission)
                return len(hidden)

            return await self._store.write(write)

        if not await self._store.finds(lambda tx: tx.tasks_in(TaskState.CLOSED)):
            return 0
        return await each(await self._store.read(closed), disclose_some)

    async def rank(self) -> int:
        """Closed tasks of which every submission has ended in every round are FINAL.

        One for which validators were drawn waits until its duties are settled and the record log holds the selector's
        ledger up to there: what a FINAL task rests on is never still to come.
        """
        if not await self._store.finds(lambda tx: tx.tasks_in(TaskState.CLOSED)):
            self._tell_waiting(frozenset())
            return 0
        judged = await self._store.read(_judged)
        waiting = {each.task for each in judged}
        try:
            waiting -= await self._make_final({each.task for each in judged if not each.drawn})
            settled = {each.task for each in judged if each.drawn and each.settled}
            if settled and await self._log.catch_up():
                waiting -= await self._make_final(settled)
        finally:
            self._tell_waiting(frozenset(waiting))
        return len(judged) - len(waiting)

    async def _make_final(self, tasks: Collection[str]) -> set[str]:
        """Which of the tasks have become FINAL."""
        if not tasks:
            return set()

        def record(tx: Writing) -> set[str]:
            ready = [(task, ranking_round) for task, ranking_round in _to_rank(tx) if task.id in tasks]
            for task, ranking_round in ready:
                tx.append(TaskChanged(task.id, TaskState.FINAL, reason=f"round {ranking_round} ranks"))
                tx.put_task(replace(task, state=TaskState.FINAL, ranking_round=ranking_round))
            return {task.id for task, _ in ready}

        return await self._store.write(record)

    def _tell_waiting(self, tasks: frozenset[str]) -> None:
        _UNBACKED.set(len(tasks))
        if tasks - self._waiting:
            _log.warning(
                "judged tasks are FINAL once the log holds the selector's events of their draws", tasks=[*tasks]
            )
        self._waiting = tasks

    async def close_pools(self) -> int:
        """The stakes of ended tasks are unlocked once the last duty is settled."""

        def ready(tx: Reading) -> list[Task]:
            ended = tx.tasks_ended_with_pool()
            return [task for task in ended if _is_settled(tx, task.id)]

        if not await self._store.finds(lambda tx: tx.tasks_ended_with_pool()):
            return 0
        return await each(await self._store.read(ready), self._close_pool)

    async def _close_pool(self, task: Task) -> int:
        # A task that was cancelled before its pool was opened has nothing to unlock.
        with suppress(NotFound):
            await self._selection.close_pool(task.id)

        def record(tx: Writing) -> int:
            found = tx.task(task.id)
            if found is None or not found.pool_open:
                return 0
            for _, member in tx.members(task.id, Listing()):
                tx.put_member(replace(member, locked_micros=0, removed=True))
            tx.put_task(replace(found, pool_open=False))
            return 1

        return await self._store.write(record)


def _has_dataset(tx: Reading, task: Task) -> bool:
    sha256 = task.config.evaluation_dataset.sha256.hex()
    uses = tx.artifact_uses(sha256)
    claimed = any(use.task == task.id and use.purpose is ArtifactPurpose.EVALUATION_DATASET for use in uses)
    return claimed and tx.artifact(sha256) is not None


def _is_settled(tx: Reading, task: str) -> bool:
    return not tx.assignments_unsettled(task=task, limit=1) and not tx.has_unsure_rounds(task)


def _judged(tx: Reading) -> list[_Judged]:
    return [
        _Judged(task.id, tx.has_draws(task.id) or tx.has_unsure_rounds(task.id), _is_settled(tx, task.id))
        for task, _ in _to_rank(tx)
    ]


def _to_rank(tx: Reading) -> list[tuple[Task, int]]:
    ready = []
    for task in tx.tasks_in(TaskState.CLOSED):
        if task.holdout in (HoldoutState.EXPECTED, HoldoutState.PUBLISHED):
            continue
        if any(tx.submissions(task.id, state=state, limit=1) for state in _UNENDED):
            continue
        if tx.submissions_hidden(task.id, limit=1):
            continue
        if task.holdout is not HoldoutState.ACCEPTED:
            ready.append((task, FIRST_ROUND))
            continue
        if tx.rounds_unconcluded_in(task.id, HOLDOUT_ROUND) or tx.submissions_without_round(task.id, HOLDOUT_ROUND):
            continue
        scores = [s.scores.get(HOLDOUT_ROUND) for s in tx.submissions(task.id, state=SubmissionState.SCORED)]
        # Where the platform could not judge a single submission again, the first round's ranking stands.
        judged = not scores or any(score is not None and score.outcome == _SCORED for score in scores)
        ready.append((task, HOLDOUT_ROUND if judged else FIRST_ROUND))
    return ready
