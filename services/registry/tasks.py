"""Tasks as their creators post, amend, close and cancel them; what time does to them is `task_turns`."""

import re
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import datetime

from services.registry.base_models import BaseModels, demand_base_model
from services.registry.daily import Daily
from services.registry.eligibility_facts import facts_of, not_eligible
from services.registry.entries import TaskChanged, TaskCreated, VerdictGiven
from services.registry.listing import Listing, Place
from services.registry.participants import registered
from services.registry.records import ArtifactUse, Member, Task, Verdict
from services.registry.selection import EligibilityFacts, Selection
from services.registry.states import ArtifactPurpose, HoldoutState, MembershipState, Role, TaskState
from services.registry.task_config import TaskConfig
from services.registry.task_states import ENDED, cancel, check_unended, close, holdout_deadline, known_task, own_task
from services.registry.transaction import Changes, Reading, Store, Writing
from services.registry.watching import watch
from services.runtime.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
)


@dataclass(frozen=True)
class CreatedTask:
    """A new task with its creator's verdict."""

    task: Task
    verdict: Verdict


@dataclass(frozen=True)
class Amendment:
    """What changes; None stays as it is."""

    display_name: str | None = None
    description: str | None = None
    close_time: datetime | None = None


class Tasks:
    """Keeps tasks. The endorsements of `trusted` participants count for eligibility.

    `daily` counts every change by a creator, and refused verdicts: all but questions raise ResourceExhausted.
    """

    def __init__(
        self,
        store: Store,
        selection: Selection,
        changes: Changes,
        base_models: BaseModels,
        daily: Daily,
        *,
        trusted: Collection[str],
        make_id: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        self._store = store
        self._selection = selection
        self._changes = changes
        self._base_models = base_models
        self._daily = daily
        self._trusted = frozenset(trusted)
        self._make_id = make_id

    async def create(self, caller: str, *, task_id: str, config: TaskConfig) -> CreatedTask:
        """Create a task as PREPARING. Zeros in `config.selection` stand for the selector's defaults.

        Raises FailedPrecondition(NOT_REGISTERED, NOT_ELIGIBLE), AlreadyExists(TASK_EXISTS), InvalidArgument for a
        policy or a base model. The verdict is recorded either way, unless too many were refused today.
        """
        task = task_id or self._make_id()

        def gather(tx: Reading) -> EligibilityFacts:
            registered(tx, caller)
            _check_free(tx, task)
            return facts_of(tx, caller, field=config.field, trusted=self._trusted)

        facts = await self._store.read(gather)
        await self._base_models.check(caller, config)
        try:
            answer = await self._selection.check_eligibility(
                participant=caller, task=task, role=Role.TASK_CREATOR, facts=facts, policy=config.selection
            )
        except InvalidArgument as error:
            raise _in_config(error) from None
        verdict = answer.verdict
        if not verdict.eligible:
            self._daily.count_stranger()
            await self._store.write(lambda tx: record_verdict(tx, verdict), final=False)
            raise not_eligible(verdict)
        self._daily.count_change()
        whole = replace(config, selection=answer.policy)
        return await self._store.write(lambda tx: _create(tx, caller, task, whole, verdict))

    async def get(self, task: str) -> Task:
        """One task. Raises NotFound."""
        return await self._store.read(lambda tx: known_task(tx, task))

    async def page(self, listing: Listing) -> Sequence[tuple[Place, Task]]:
        """Tasks, each with its place."""
        return await self._store.read(lambda tx: tx.tasks(listing))

    async def watch(self, task: str, *, after: int | None) -> AsyncIterator[Task]:
        """The task now, unless its revision is still `after`, and again after each change until it has ended."""
        seen = after
        async with aclosing(watch(self._changes, f"tasks/{task}", lambda: self.get(task))) as states:
            async for found in states:
                if found.revision != seen:
                    seen = found.revision
                    yield found
                if found.state in ENDED:
                    return

    async def update(self, caller: str, task: str, amendment: Amendment) -> Task:
        """Amend a task that has not ended. Creator only."""

        def work(tx: Writing) -> Task:
            found = own_task(tx, caller, task)
            check_unended(found)
            config = found.config
            if amendment.display_name is not None:
                config = replace(config, display_name=amendment.display_name)
            if amendment.description is not None:
                config = replace(config, description=amendment.description)
            if amendment.close_time is not None:
                if found.state is TaskState.CLOSED:
                    raise FailedPrecondition("TASK_CLOSED", "the task is closed, and a closed task stays closed")
                if amendment.close_time < config.schedule.close_time:
                    raise InvalidArgument.field("task.config.schedule.close_time", "is earlier than it was")
                config = replace(config, schedule=replace(config.schedule, close_time=amendment.close_time))
            if config == found.config:
                return found
            tx.append(TaskChanged(task, found.state, config))
            return tx.put_task(replace(found, config=config))

        return await self._change(lambda tx: own_task(tx, caller, task), work)

    async def close(self, caller: str, task: str) -> Task:
        """End the taking of submissions. Creator only. Raises FailedPrecondition(TASK_NOT_OPEN, TASK_ENDED)."""

        def work(tx: Writing) -> Task:
            found = own_task(tx, caller, task)
            check_unended(found)
            if found.state is TaskState.CLOSED:
                return found
            if found.state is not TaskState.OPEN:
                raise FailedPrecondition("TASK_NOT_OPEN", "the task has not been opened yet")
            return close(tx, found, reason="closed by its creator")

        return await self._change(lambda tx: own_task(tx, caller, task), work)

    async def cancel(self, caller: str, task: str, *, reason: str, operator: bool) -> Task:
        """End a task without a result. Creator or operator. Raises FailedPrecondition(TASK_ENDED) for a FINAL one."""

        def find(tx: Reading) -> Task:
            return known_task(tx, task) if operator else own_task(tx, caller, task)

        def work(tx: Writing) -> Task:
            found = find(tx)
            if found.state is TaskState.CANCELLED:
                return found
            check_unended(found)
            return cancel(tx, found, reason=reason or "cancelled without a reason given")

        return await self._change(find, work)

    async def publish_holdout(self, caller: str, task: str) -> Task:
        """Hand the uploaded holdout in. Creator only.

        Raises FailedPrecondition(NO_HOLDOUT, TASK_NOT_CLOSED, HOLDOUT_NOT_UPLOADED, HOLDOUT_EXPIRED).
        """

        def work(tx: Writing) -> Task:
            found = own_task(tx, caller, task)
            digest = found.config.holdout
            if digest is None:
                raise FailedPrecondition("NO_HOLDOUT", "the task has no holdout")
            if found.state is not TaskState.CLOSED:
                raise FailedPrecondition("TASK_NOT_CLOSED", f"the task is {found.state.name}, not CLOSED")
            if found.holdout in (HoldoutState.PUBLISHED, HoldoutState.ACCEPTED):
                return found
            if found.holdout is HoldoutState.FAILED or tx.now >= holdout_deadline(found):
                raise FailedPrecondition("HOLDOUT_EXPIRED", "the time to publish the holdout is over")
            sha256 = digest.sha256.hex()
            own = ArtifactUse(sha256, task, ArtifactPurpose.HOLDOUT, caller, tx.now)
            # That somebody has handed in such bytes is not enough: digests are public, and who publishes may read.
            if tx.artifact(sha256) is None or own not in tx.artifact_uses(sha256):
                raise FailedPrecondition("HOLDOUT_NOT_UPLOADED", "upload the holdout for this task first")
            return tx.put_task(replace(found, holdout=HoldoutState.PUBLISHED))

        return await self._change(lambda tx: own_task(tx, caller, task), work)

    async def _change(self, permitted: Callable[[Reading], Task], work: Callable[[Writing], Task]) -> Task:
        # Counted for those alone who may. Also where nothing changes: an answer that is kept has the whole task in it.
        await self._store.look_up(permitted)
        self._daily.count_change()
        return await self._store.write(work)


def record_verdict(tx: Writing, verdict: Verdict) -> None:
    """Keep a verdict and make it a leaf."""
    tx.put_verdict(verdict)
    tx.append(VerdictGiven(verdict))


def _in_config(error: InvalidArgument) -> InvalidArgument:
    """What the selector finds wrong with the policy, by the path that the caller knows."""
    violations = [
        FieldViolation(re.sub("^policy", "config.selection", violation.field), violation.description)
        for violation in error.violations
    ]
    return InvalidArgument(violations, reason=error.reason)


def _check_free(tx: Reading, task: str) -> None:
    if tx.task(task) is not None:
        raise AlreadyExists("TASK_EXISTS", f"there is a task {task} already")


def _create(tx: Writing, caller: str, task: str, config: TaskConfig, verdict: Verdict) -> CreatedTask:
    _check_free(tx, task)
    if config.base_model:
        # Once more, and named from now on: nothing removes it any more.
        demand_base_model(tx, caller, config.base_model, tx.now)
        tx.put_artifact_use(ArtifactUse(config.base_model, task, ArtifactPurpose.BASE_MODEL, caller, tx.now))
    created = tx.put_task(
        Task(
            id=task,
            creator=caller,
            config=config,
            state=TaskState.PREPARING,
            create_time=tx.now,
            update_time=tx.now,
            holdout=HoldoutState.NONE if config.holdout is None else HoldoutState.EXPECTED,
        )
    )
    # One role for each participant and task: the creator has its own from the start. Nothing is locked for it.
    tx.put_member(
        Member(task, caller, Role.TASK_CREATOR, MembershipState.ACTIVE, None, create_time=tx.now, removed=True)
    )
    record_verdict(tx, verdict)
    tx.append(TaskCreated(task, caller, config))
    return CreatedTask(tx.task(task) or created, verdict)
