"""Steps that need the selector: draw the validators of a round, call in reserves, settle what a duty has cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from services.registry.entries import DrawMade, SubmissionChanged
from services.registry.listing import Condition, Listing
from services.registry.records import Assignment, Draw, Round, Submission, Task
from services.registry.referee.docket import Docket, RoundKey, key_of
from services.registry.referee.turns import each, traced
from services.registry.rounds import (
    FIRST_ROUND,
    HOLDOUT_ROUND,
    give_up,
    headcount,
    offer,
    start_round,
    submission_of,
    task_of,
)
from services.registry.selection import Selection
from services.registry.states import HoldoutState, MembershipState, Role, RoundState, SubmissionState, TaskState
from services.registry.transaction import Reading, Store, Writing
from services.runtime.errors import ArenaError, FailedPrecondition, NotFound
from services.runtime.names import format_submission
from tiltyard.commitments import holdout_anchor

# A draw that was refused is asked for again after so long, each time twice as long, or when validators come or go.
RETRY_AFTER = timedelta(seconds=3)
_LONGEST_RETRY = timedelta(minutes=1)
_SETTLED_A_TURN = 200
_INACTIVE_VALIDATORS = Listing(
    (Condition("role", "=", Role.VALIDATOR), Condition("state", "!=", MembershipState.ACTIVE))
)


@dataclass(frozen=True)
class _Waiting:
    """A round to be drawn, with what the selector is asked with."""

    round: Round
    task: Task
    submission: Submission
    anchor: bytes
    paused: frozenset[str]


@dataclass(frozen=True)
class _Refusal:
    """A draw that was refused: when to ask again, and how many validators there were."""

    round: Round
    again_at: datetime
    validators: int


@dataclass(frozen=True)
class _Short:
    """A round that lacks `missing` validators."""

    round: Round
    missing: int
    paused: frozenset[str]


class Draws:
    """Asks the selector outside of any transaction and writes what it said in one.

    Every question is idempotent, so that one whose answer was lost is asked again.
    """

    def __init__(self, store: Store, selection: Selection, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._selection = selection
        self._clock = clock
        self._undrawn = Docket(RoundState.WAITING, lambda tx, round_, now: True)
        self._short = Docket(RoundState.SEALING, lambda tx, round_, now: _missing(tx, round_, now) > 0)
        # Losing this costs one more question.
        self._refused: dict[RoundKey, _Refusal] = {}
        self._pauses: dict[RoundKey, timedelta] = {}

    async def start_rounds_of_holdout(self) -> int:
        """Every SCORED submission of a closed task with an accepted holdout gets its round 2."""
        if not await self._store.finds(lambda tx: tx.tasks_in(TaskState.CLOSED)):
            return 0
        if not await self._store.read(_without_holdout_round):
            return 0

        def start(tx: Writing) -> int:
            found = _without_holdout_round(tx)
            for task, submission in found:
                start_round(tx, submission, task, HOLDOUT_ROUND)
            return len(found)

        return await self._store.write(start)

    async def draw(self) -> int:
        """Rounds that wait are drawn, and offered to the first k; those that waited for too long are given up."""
        now = self._clock()
        if not self._refused and not await self._store.finds(lambda tx: self._undrawn.news(tx, now)):
            return 0
        waiting = await self._store.read(lambda tx: self._to_draw(tx, now))
        return await each(waiting, self._draw_one, undone=lambda undrawn: self._undrawn.put_back(undrawn.round))

    def _to_draw(self, tx: Reading, now: datetime) -> list[_Waiting]:
        for key, refusal in list(self._refused.items()):
            if now >= refusal.again_at or tx.active_validators(refusal.round.task) != refusal.validators:
                self._undrawn.put_back(refusal.round)
                del self._refused[key]
        return _waiting(tx, [round_ for round_ in self._undrawn.look(tx, now) if self._is_to_ask(tx, round_, now)])

    def _is_to_ask(self, tx: Reading, seen: Round, now: datetime) -> bool:
        key = key_of(seen)
        round_ = tx.round(*key)
        if round_ is None or round_.state is not RoundState.WAITING:
            self._pauses.pop(key, None)
            return False
        # Its own refusal touches a round too: that is no reason to ask again.
        return key not in self._refused or now >= round_.deadline

    async def _draw_one(self, waiting: _Waiting) -> int:
        with traced("draw", waiting.round):
            return await self._ask_for(waiting)

    async def _ask_for(self, waiting: _Waiting) -> int:
        round_, submission = waiting.round, waiting.submission
        now = self._clock()
        overdue = now >= round_.deadline
        try:
            drawn = await self._selection.draw_validators(
                task=round_.task,
                number=round_.number,
                round_=round_.round,
                anchor=waiting.anchor,
                salt=submission.salt,
                validators=waiting.task.config.validators_per_submission,
                submitter=submission.participant,
                paused=waiting.paused,
            )
        except ArenaError as error:
            # Whatever it is that the selector says, no round waits for longer than its task allows.
            if error.reason not in ("NOT_ENOUGH_VALIDATORS", "QUOTA_USED_UP") and not overdue:
                raise
            self._refuse(waiting, now)
            message = error.message
            return await self._store.write(lambda tx: _wait_or_give_up(tx, round_, message))
        self._pauses.pop(key_of(round_), None)
        return await self._store.write(lambda tx: _record_draw(tx, round_, drawn))

    def _refuse(self, waiting: _Waiting, now: datetime) -> None:
        key = key_of(waiting.round)
        if now >= waiting.round.deadline:
            self._pauses.pop(key, None)
            return
        pause = min(2 * self._pauses[key], _LONGEST_RETRY) if key in self._pauses else RETRY_AFTER
        self._pauses[key] = pause
        self._refused[key] = _Refusal(waiting.round, now + pause, waiting.task.validators)

    async def call_reserves(self) -> int:
        """Rounds with fewer validators at work than they want take the next of their draw's order."""
        now = self._clock()

        def find(tx: Reading) -> list[_Short]:
            rounds = self._short.look(tx, now)
            return [_Short(round_, _missing(tx, round_, now), _paused(tx, round_.task)) for round_ in rounds]

        if not await self._store.finds(lambda tx: self._short.news(tx, now)):
            return 0
        short = [found for found in await self._store.read(find) if found.missing > 0]
        return await each(short, self._call_one, undone=lambda found: self._short.put_back(found.round))

    async def _call_one(self, short: _Short) -> int:
        with traced("call reserves", short.round):
            return await self._extend(short)

    async def _extend(self, short: _Short) -> int:
        round_ = short.round
        if not round_.unsure:
            # The round may be concluded before the answer comes, and the process may die.
            await self._store.write(lambda tx: _note_asked(tx, round_))
        try:
            drawn = await self._selection.extend_draw(
                round_.draw, picks=round_.picks + short.missing, paused=short.paused
            )
        except FailedPrecondition as error:
            if error.reason != "ORDER_EXHAUSTED":
                raise
            # The last reserves may have been taken by a question whose answer was lost: look how the draw stands.
            drawn = await self._selection.extend_draw(round_.draw, picks=round_.picks, paused=short.paused)
        if len(drawn.order) <= round_.picks:
            return await self._store.write(lambda tx: _note_exhausted(tx, round_))
        return await self._store.write(lambda tx: _record_extension(tx, round_, drawn))

    async def find_unheard(self) -> int:
        """Rounds that were concluded while the selector was asked: whom it drew then is released, and so refunded."""
        if not await self._store.finds(lambda tx: tx.rounds_unsure(limit=1)):
            return 0
        unsure = await self._store.read(lambda tx: tx.rounds_unsure(limit=_SETTLED_A_TURN))
        return await each(unsure, self._look_up)

    async def _look_up(self, round_: Round) -> int:
        with traced("look up", round_):
            drawn = await self._selection.find_draw(task=round_.task, number=round_.number, round_=round_.round)
        return await self._store.write(lambda tx: _record_unheard(tx, round_, drawn))

    async def settle(self) -> int:
        """Duties that have ended are charged or refunded at the selector."""
        settled: list[Assignment] = []

        async def settle_one(owed: tuple[Assignment, str]) -> int:
            assignment, draw = owed
            with traced("settle", assignment):
                try:
                    await self._selection.settle(draw, assignment.validator, refund=assignment.refund)
                except (FailedPrecondition, NotFound) as error:
                    # The selector's book is the truth, also one of before or after a restored backup; asking again
                    # would not change it, and keep others waiting.
                    if error.reason not in ("ALREADY_SETTLED", "DRAW_NOT_FOUND", "PICK_NOT_FOUND"):
                        raise
            settled.append(assignment)
            return 1

        if not await self._store.finds(lambda tx: tx.assignments_unsettled(limit=1)):
            return 0
        owed = await self._store.read(_owed)
        try:
            return await each(owed, settle_one)
        finally:
            if settled:
                await self._store.write(lambda tx: _note_settled(tx, settled))


def _without_holdout_round(tx: Reading) -> list[tuple[Task, Submission]]:
    return [
        (task, submission)
        for task in tx.tasks_in(TaskState.CLOSED)
        if task.holdout is HoldoutState.ACCEPTED
        for submission in tx.submissions_without_round(task.id, HOLDOUT_ROUND)
    ]


def _paused(tx: Reading, task: str) -> frozenset[str]:
    # Who has left stays in the selector's pool until the last duty has ended, but takes no new ones. Who is still
    # joining may be there already, and could not accept.
    away = (MembershipState.PAUSED, MembershipState.LEFT, MembershipState.PENDING)
    inactive = tx.members(task, _INACTIVE_VALIDATORS)
    return frozenset(member.participant for _, member in inactive if member.state in away)


def _waiting(tx: Reading, rounds: Sequence[Round]) -> list[_Waiting]:
    paused: dict[str, frozenset[str]] = {}
    found = []
    for round_ in rounds:
        task, submission = task_of(tx, round_), submission_of(tx, round_)
        if round_.round == FIRST_ROUND:
            anchor = submission.reveal_leaf
        else:
            name = format_submission(submission.task, submission.number)
            anchor = holdout_anchor(holdout_leaf=task.holdout_leaf, submission=name)
        if task.id not in paused:
            paused[task.id] = _paused(tx, task.id)
        found.append(_Waiting(round_, task, submission, anchor, paused[task.id]))
    return found


def _wait_or_give_up(tx: Writing, seen: Round, detail: str) -> int:
    round_ = tx.round(seen.task, seen.number, seen.round)
    if round_ is None or round_.state is not RoundState.WAITING:
        return 0
    if tx.now >= round_.deadline:
        give_up(tx, round_, detail)
        return 1
    if round_.detail != detail:
        tx.put_round(replace(round_, detail=detail))
        if round_.round == FIRST_ROUND:
            tx.put_submission(replace(submission_of(tx, round_), detail=detail))
    return 0


def _record_draw(tx: Writing, seen: Round, drawn: Draw) -> int:
    round_ = tx.round(seen.task, seen.number, seen.round)
    if round_ is None or round_.draw:
        return 0
    task, submission = task_of(tx, round_), submission_of(tx, round_)
    tx.put_draw_receipt(drawn.id, drawn.receipt)
    tx.append(DrawMade(drawn.receipt))
    submission = replace(submission, draws={**submission.draws, round_.round: drawn.id})
    begun = replace(round_, draw=drawn.id, detail="")
    if round_.state is RoundState.WAITING:
        schedule = task.config.schedule
        begun = replace(begun, state=RoundState.SEALING, deadline=tx.now + schedule.evaluation_time)
        if round_.round == FIRST_ROUND:
            submission = replace(
                submission,
                state=SubmissionState.EVALUATING,
                detail="",
                deadline=begun.deadline + schedule.evaluation_time,
            )
            tx.append(SubmissionChanged(task=task.id, number=submission.number, state=submission.state))
    tx.put_submission(submission)
    offer(tx, begun, drawn.order, deadline=tx.now + task.config.schedule.accept_time)
    tx.put_round(replace(begun, picks=len(drawn.order), unsure=False))
    return 1


def _missing(tx: Reading, round_: Round, now: datetime) -> int:
    """How many validators a round lacks; none where there is nobody left, or no time."""
    if round_.state is not RoundState.SEALING or round_.exhausted or now >= round_.deadline:
        return 0
    return max(0, round_.wanted - sum(headcount(tx, round_)))


def _note_exhausted(tx: Writing, seen: Round) -> int:
    round_ = tx.round(seen.task, seen.number, seen.round)
    if round_ is None or round_.state is RoundState.CONCLUDED or round_.exhausted:
        return 0
    exhausted = "no reserves are left in the draw's order"
    tx.put_round(replace(round_, exhausted=True, unsure=False, detail=exhausted))
    return 1


def _note_asked(tx: Writing, seen: Round) -> None:
    round_ = tx.round(seen.task, seen.number, seen.round)
    if round_ is not None and round_.state is not RoundState.CONCLUDED:
        tx.put_round(replace(round_, unsure=True))


def _record_unheard(tx: Writing, seen: Round, drawn: Draw | None) -> int:
    recorded = 0
    if drawn is not None:
        recorded = (_record_extension if seen.draw else _record_draw)(tx, seen, drawn)
    round_ = tx.round(seen.task, seen.number, seen.round)
    if round_ is None or not round_.unsure:
        return recorded
    tx.put_round(replace(round_, unsure=False))
    return 1


def _record_extension(tx: Writing, seen: Round, drawn: Draw) -> int:
    round_ = tx.round(seen.task, seen.number, seen.round)
    if round_ is None or len(drawn.order) <= round_.picks:
        return 0
    tx.put_draw_receipt(drawn.id, drawn.receipt)
    tx.append(DrawMade(drawn.receipt))
    offer(tx, round_, drawn.order, deadline=tx.now + task_of(tx, round_).config.schedule.accept_time)
    tx.put_round(replace(round_, picks=len(drawn.order), unsure=False))
    return 1


def _owed(tx: Reading) -> list[tuple[Assignment, str]]:
    owed = []
    for assignment in tx.assignments_unsettled(limit=_SETTLED_A_TURN):
        round_ = tx.round(assignment.task, assignment.number, assignment.round)
        if round_ is not None:
            owed.append((assignment, round_.draw))
    return owed


def _note_settled(tx: Writing, settled: list[Assignment]) -> None:
    for seen in settled:
        assignment = tx.assignment(seen.task, seen.number, seen.round, seen.validator)
        if assignment is not None and not assignment.settled:
            tx.put_assignment(replace(assignment, settled=True))
