"""One assignment's way: lease, fetch, evaluate, seal, open. Wherever it is cut off, it goes on from the run store."""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import structlog

from services.runtime.errors import AlreadyExists, ArenaError, FailedPrecondition
from services.validator.assignments import (
    Assignment,
    AssignmentState,
    DigestMismatch,
    Lease,
    Notary,
    Order,
    Registry,
)
from services.validator.cache import Cache, CacheTooSmall
from services.validator.evaluation import Attempts, CannotEvaluate, Job, NodeServers, find
from services.validator.patience import TRANSIENT, persist
from services.validator.redaction import one_line, published
from services.validator.runs import Finding, Progress, Run, RunState, RunStore, SealedReport
from services.validator.slots import FairSlots
from tiltyard.commitments import SALT_BYTES
from tiltyard.predictions import handed_in

T = TypeVar("T")

_SHORTEST_RENEWAL_S = 0.05
_LONGEST_RENEWAL_S = 60.0
_MAX_REASON_CHARS = 500
# How long after an opening's deadline to ask what became of it, when the registry says nothing by itself.
_OVERDUE_S = 30.0
_DRAINING = "the validator takes no further assignments"

_log = structlog.get_logger("tiltyard.validator")


@dataclass(frozen=True)
class Means:
    """What every duty works with. `lease_holder` is the secret of this state folder."""

    registry: Registry
    notary: Notary
    store: RunStore
    cache: Cache
    attempts: Attempts
    nodes: NodeServers
    leases: FairSlots
    evaluations: FairSlots
    lease_holder: bytes
    clock: Callable[[], datetime]


@dataclass(frozen=True)
class Desk:
    """Whom a duty reports to: `changed` is told of each change of the run."""

    changed: Callable[[], None]
    draining: Callable[[], bool]


class DutyEnded(Exception):
    """The run is over, in this state, for this reason."""

    def __init__(self, state: RunState, detail: str = "") -> None:
        super().__init__(f"{state}: {detail}")
        self.state = state
        self.detail = detail


class Duty:
    """One assignment and the run on it; `run` is None until the lease is held."""

    def __init__(self, assignment: Assignment, run: Run | None, means: Means, desk: Desk) -> None:
        self.run = run
        self.progress = Progress()
        self.waiting = False
        """True while it has neither run nor lease and waits for its turn."""
        self._begun = False
        self._latest = assignment
        self._news = asyncio.Event()
        self._means = means
        self._desk = desk

    @property
    def leased(self) -> bool:
        """Whether it is accepted, by the registry's last word."""
        return self._latest.state is AssignmentState.ACCEPTED

    def hear(self, assignment: Assignment) -> None:
        """The registry's word on this assignment."""
        self._latest = assignment
        self._news.set()

    async def perform(self) -> None:
        """Does the duty to its end. Whatever goes wrong ends this run and no other."""
        try:
            if not await self._has_seal():
                await self._guarded(self._under_lease(), self._until_ended())
            await self._open()
        except DutyEnded as ended:
            await self._end(ended)
        except Exception as error:
            _log.error("a run failed", assignment=self._latest.name, exc_info=error)
            await self._end(DutyEnded(RunState.FAILED, f"internal error: {type(error).__name__}"))

    async def _has_seal(self) -> bool:
        self._raise_if_ended()
        if self._latest.state is not AssignmentState.SEALED:
            return False
        if self.run is None or self.run.sealed is None:
            _fail("the registry has a seal that this state folder knows nothing of")
        if self.run.state is not RunState.SEALED:
            # Cut off between the registry's record of the seal and our own.
            await self._note_sealed()
        return True

    async def _under_lease(self) -> None:
        name, task = self._latest.name, self._latest.task
        self.waiting = self.run is None
        async with self._means.leases.hold(task):
            self.waiting = False
            lease = await self._accept()
            if self.run is None:
                run = Run(assignment=name, task=task, state=RunState.FETCHING, start_time=self._means.clock())
                self.run = await self._begin(run, lease)
                self._desk.changed()
            if self.run.sealed is None:
                await self._guarded(self._evaluate_for_good(lease), self._keep(lease))
            assert self.run.sealed is not None
            await self._seal(self.run.sealed, lease)
            await self._note_sealed()

    async def _accept(self) -> Lease:
        name = self._latest.name
        try:
            return await persist(lambda: self._means.registry.accept(name, self._means.lease_holder), "accept")
        except ArenaError as error:
            if isinstance(error, AlreadyExists):
                _fail(f"another process holds the lease: {error.message}")
            if isinstance(error, FailedPrecondition):
                raise DutyEnded(RunState.RELEASED, error.message) from error
            _fail(f"the lease was refused: {error}", error)

    async def _begin(self, run: Run, lease: Lease) -> Run:
        try:
            return await self._means.store.add(run)
        except ArenaError as error:
            # Without room for this there is none for a model.
            await self._decline(lease, str(error))
            _fail(str(error), error)

    async def _evaluate_for_good(self, lease: Lease) -> None:
        sealed = await self._evaluate(lease)
        # Durable before anybody hears of it: what was sealed can always be opened.
        await persist(lambda: self._save(sealed=sealed), "store a report")

    async def _evaluate(self, lease: Lease) -> SealedReport:
        name = self._latest.name
        try:
            if lease.order is None:
                raise CannotEvaluate(lease.refusal)
            async with self._means.evaluations.hold(self._latest.task):
                if self._desk.draining():
                    # It waited with many others: whoever wants to stop does not work them all off first.
                    raise CannotEvaluate(_DRAINING)
                self._begun = True
                finding = await self._find(lease.order)
            finding = replace(finding, detail=one_line(finding.detail))
            report = self._means.notary.report(name, lease.order, finding)
        except (CannotEvaluate, CacheTooSmall, DigestMismatch, OSError, ArenaError) as error:
            # Not the model's fault: the next reserve may do better, at once.
            await self._decline(lease, str(error))
            _fail(str(error), error)
        except Exception as error:
            await self._decline(lease, f"internal error: {type(error).__name__}")
            raise
        assert self.run is not None
        self.run = replace(self.run, finding=finding, detail=finding.detail)
        self._desk.changed()
        salt = secrets.token_bytes(SALT_BYTES)
        return SealedReport(
            report=report,
            salt=salt,
            seal=self._means.notary.seal(name, report, salt),
            hashes=handed_in(finding.prediction_blocks),
        )

    async def _find(self, order: Order) -> Finding:
        registry, cache = self._means.registry, self._means.cache
        if order.metric is None:
            raise CannotEvaluate("the task's metric is not counted by this validator yet")

        def fetched(digest: str, size_bytes: int) -> contextlib.AbstractAsyncContextManager[Path]:
            def fetch(path: Path) -> Awaitable[None]:
                return persist(lambda: registry.fetch(digest, size_bytes, path), "fetch")

            return cache.hold(digest, size_bytes, fetch)

        async with fetched(order.dataset_digest, order.dataset_bytes) as dataset:
            try:
                async with fetched(order.model_digest, order.model_bytes) as model:
                    self._evaluating()
                    return await find(Job(order, dataset, model), self._means.attempts, self.progress)
            except (CannotEvaluate, CacheTooSmall) as error:
                if not self._means.nodes.may_ask(order):
                    raise
                return await self._ask_node(order, dataset, str(error))

    async def _ask_node(self, order: Order, dataset: Path, reason: str) -> Finding:
        """What the training node's own server answers, since the model cannot be evaluated here for `reason`."""
        self._evaluating()
        try:
            finding = await self._means.nodes.evaluate(order, dataset, self.progress)
        except CannotEvaluate as error:
            raise CannotEvaluate(f"{reason}; {error}") from error
        return replace(finding, detail=f"by the node's own endpoint, since here {reason}")

    def _evaluating(self) -> None:
        assert self.run is not None
        self.run = replace(self.run, state=RunState.EVALUATING)
        self._desk.changed()

    async def _keep(self, lease: Lease) -> NoReturn:
        """Renews the lease at each third of it, until cancelled.

        None outlasts its round: where the round's end comes before this duty's turn, a reserve still has time for it.
        """
        left_s = lease.left_s
        while True:
            await asyncio.sleep(min(max(left_s / 3, _SHORTEST_RENEWAL_S), _LONGEST_RENEWAL_S))
            try:
                left_s = await persist(lambda: self._means.registry.renew(self._latest.name, lease.token), "renew")
            except ArenaError as error:
                _fail(f"the lease was lost: {error.message}", error)
            if not self._begun and (reason := self._reason_to_wait_no_longer(left_s, lease)):
                await self._decline(lease, reason)
                _fail(reason)

    def _reason_to_wait_no_longer(self, left_s: float, lease: Lease) -> str:
        if self._desk.draining():
            return _DRAINING
        return "other evaluations take longer than this one's round lasts" if left_s < lease.left_s / 2 else ""

    async def _seal(self, sealed: SealedReport, lease: Lease) -> None:
        try:
            await persist(lambda: self._means.registry.seal(sealed.seal, lease.token), "seal")
        except ArenaError as error:
            _fail(f"the seal was refused: {error}", error)

    async def _open(self) -> NoReturn:
        sealed = self.run.sealed if self.run is not None else None
        assert sealed is not None
        while True:
            await self._asked_to_open()
            try:
                await persist(lambda: self._means.registry.open(sealed.report, sealed.salt, sealed.hashes), "open")
            except FailedPrecondition as error:
                if error.reason != "NOT_OPENING":
                    _fail(f"the report was refused: {error}", error)
                self._latest = replace(self._latest, opening=False)
                continue
            except ArenaError as error:
                _fail(f"the report was refused: {error}", error)
            raise DutyEnded(RunState.OPENED)

    async def _asked_to_open(self) -> None:
        while True:
            self._raise_if_ended()
            if self._latest.opening:
                return
            try:
                async with asyncio.timeout(self._patience_s()):
                    await self._next_word()
            except TimeoutError:
                await self._ask_after_overdue()

    def _patience_s(self) -> float | None:
        if self._latest.deadline is None:
            return None
        return max((self._latest.deadline - self._means.clock()).total_seconds(), 0) + _OVERDUE_S

    async def _ask_after_overdue(self) -> None:
        before = self._latest
        # After months there are tens of thousands of our own, and a registry that is late has enough to do.
        submission = before.name.partition("/assignments/")[0]
        found = await persist(lambda: self._means.registry.assignments(submission), "list assignments")
        self._latest = next((each for each in found if each.name == before.name), before)
        if self._latest == before and self._desk.draining():
            _fail("the registry did not ask for the report within its own deadline")

    async def _until_ended(self) -> NoReturn:
        while True:
            self._raise_if_ended()
            await self._next_word()

    async def _next_word(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _raise_if_ended(self) -> None:
        match self._latest.state:
            case AssignmentState.OPENED:
                raise DutyEnded(RunState.OPENED)
            case AssignmentState.RELEASED:
                raise DutyEnded(RunState.RELEASED, "the registry needs it no more")
            case AssignmentState.EXPIRED:
                _fail("the assignment expired")
            case AssignmentState.DECLINED:
                _fail("the assignment was given back")

    async def _decline(self, lease: Lease, reason: str) -> None:
        try:
            await self._means.registry.decline(
                self._latest.name, lease.token, published(reason, max_chars=_MAX_REASON_CHARS)
            )
        except ArenaError as error:
            # The lease runs out by itself.
            _log.warning("could not give an assignment back", assignment=self._latest.name, reason=error.reason)

    async def _save(self, **changes: Any) -> None:
        assert self.run is not None
        self.run = replace(self.run, **changes)
        await self._means.store.save(self.run)
        self._desk.changed()

    async def _note_sealed(self) -> None:
        try:
            await self._save(state=RunState.SEALED)
        except TRANSIENT as error:
            # The registry knows it, too, and the report can be opened: no full disk is to stand in its way.
            _log.warning("could not store that a run is sealed", assignment=self._latest.name, reason=error.reason)

    async def _end(self, ended: DutyEnded) -> None:
        if self.run is None:
            _log.warning("no run for an assignment", assignment=self._latest.name, detail=ended.detail)
            return
        # What was found stays readable beside why it came to nothing.
        detail = one_line(ended.detail) or self.run.detail
        sealed = self.run.sealed
        changes = {
            "state": ended.state,
            "detail": detail,
            "end_time": self._means.clock(),
            # Megabytes that the registry has by now, or wants no more; the report stays.
            "sealed": None if sealed is None else replace(sealed, hashes=b""),
        }
        await persist(lambda: self._save(**changes), "store the end of a run")
        _log.info("a run ended", assignment=self._latest.name, state=ended.state.value, detail=detail)

    async def _guarded(self, work: Coroutine[Any, Any, T], guard: Coroutine[Any, Any, NoReturn]) -> T:
        """The result of `work`, unless `guard` raises first; neither is left running."""
        tasks: tuple[asyncio.Task[T], asyncio.Task[NoReturn]] = (asyncio.create_task(work), asyncio.create_task(guard))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                return tasks[0].result()
            return tasks[1].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _fail(detail: str, cause: BaseException | None = None) -> NoReturn:
    raise DutyEnded(RunState.FAILED, detail) from cause
