"""Questions about rounds, assignments and evaluations."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import func, select

from services.registry.convert.times import micros_of, moment_of
from services.registry.listing import Listing, Place
from services.registry.queries.asking import Asking
from services.registry.records import Assignment, Evaluation, Round, ValidatorFault
from services.registry.rows import (
    ASSIGNMENTS,
    DRAW_RECEIPTS,
    EVALUATIONS,
    PREDICTION_HASHES,
    ROUNDS,
    SUBMISSIONS,
    TASKS,
    VALIDATOR_FAULTS,
)
from services.registry.states import AssignmentState, RoundState, SubmissionState
from services.runtime.engines import Written, given

_R, _A, _E, _F, _S, _T = (kind.c for kind in (ROUNDS, ASSIGNMENTS, EVALUATIONS, VALIDATOR_FAULTS, SUBMISSIONS, TASKS))
_ALL = 2**62
_LEASED = (AssignmentState.OFFERED.name, AssignmentState.ACCEPTED.name)
_UNENDED = (*_LEASED, AssignmentState.SEALED.name)
_ENDED = (
    AssignmentState.OPENED.name,
    AssignmentState.DECLINED.name,
    AssignmentState.EXPIRED.name,
    AssignmentState.RELEASED.name,
)

_TOUCHED = Written(ROUNDS.query().where(_R.state == given("state"), _R.touched > given("after")).order_by(_R.touched))
_ROUNDS_DUE = Written(
    ROUNDS.query().where(_R.state == given("state"), _R.deadline <= given("now")).order_by(_R.deadline)
)
_ASSIGNMENTS_DUE = Written(
    ASSIGNMENTS.query().where(_A.state.in_(_LEASED), _A.deadline <= given("now")).order_by(_A.deadline, _A.sequence)
)
_VALIDATORS_OF = Written(
    select(_A.validator).where(_A.task == given("task"), _A.number == given("number")).order_by(_A.round, _A.position)
)
_STATES_OF = Written(
    select(_A.state).where(_A.task == given("task"), _A.number == given("number"), _A.round == given("round"))
)
_UNSETTLED = Written(
    ASSIGNMENTS.query().where(_A.settled.is_(False), _A.state.in_(_ENDED)).order_by(_A.sequence).limit(given("most"))
)
_UNSETTLED_OF = Written(
    ASSIGNMENTS.query()
    .where(_A.settled.is_(False), _A.state.in_(_ENDED), _A.task == given("task"))
    .order_by(_A.sequence)
    .limit(given("most"))
)
_DRAWN = Written(select(_R.number).where(_R.task == given("task"), _R.draw != "").limit(1))
_UNSURE = Written(
    ROUNDS.query()
    .where(_R.unsure.is_(True), _R.state == RoundState.CONCLUDED.name)
    .order_by(_R.task, _R.number)
    .limit(given("most"))
)
_UNSURE_OF = Written(
    select(_R.number)
    .where(_R.unsure.is_(True), _R.task == given("task"), _R.state == RoundState.CONCLUDED.name)
    .limit(1)
)
_UNSLASHED = Written(
    VALIDATOR_FAULTS.query(_F.position).where(_F.slashed.is_(False)).order_by(_F.position).limit(given("most"))
)
# One by one: each is then the first entry of an index.
_DEADLINES = [
    Written(query)
    for query in (
        select(func.min(_T.deadline)),
        select(func.min(_S.deadline)).where(_S.state == SubmissionState.COMMITTED.name),
        select(func.min(_S.deadline)).where(_S.state == SubmissionState.REVEALED.name, _S.structure_checked.is_(False)),
        *(
            select(func.min(_R.deadline)).where(_R.state == state.name)
            for state in (RoundState.WAITING, RoundState.SEALING, RoundState.OPENING)
        ),
        *(select(func.min(_A.deadline)).where(_A.state == state) for state in _LEASED),
    )
]


class JudgingQuestions(Asking):
    """The part of `transaction.Reading` that is about judging."""

    def round(self, task: str, number: int, round_: int) -> Round | None:
        return self._load(ROUNDS, task, number, round_)

    def rounds_unconcluded(self) -> Sequence[Round]:
        query = ROUNDS.query().where(_R.state != RoundState.CONCLUDED.name)
        return self._records(ROUNDS, query.order_by(_R.deadline, _R.task, _R.number))

    def rounds_touched(self, state: RoundState, *, after: int) -> Sequence[Round]:
        return self._found(ROUNDS, _TOUCHED, state=state.name, after=after)

    def rounds_due(self, state: RoundState, now: datetime) -> Sequence[Round]:
        return self._found(ROUNDS, _ROUNDS_DUE, state=state.name, now=micros_of(now))

    def rounds_unconcluded_in(self, task: str, round_: int) -> bool:
        query = select(_R.number).where(_R.task == task, _R.round == round_)
        return self._one(query.where(_R.state != RoundState.CONCLUDED.name).limit(1)) is not None

    def has_draws(self, task: str) -> bool:
        return bool(self._rows(_DRAWN, task=task))

    def rounds_unsure(self, *, limit: int) -> Sequence[Round]:
        return self._found(ROUNDS, _UNSURE, most=limit)

    def has_unsure_rounds(self, task: str) -> bool:
        return bool(self._rows(_UNSURE_OF, task=task))

    def assignment(self, task: str, number: int, round_: int, validator: str) -> Assignment | None:
        return self._load(ASSIGNMENTS, task, number, round_, validator)

    def assignments(self, task: str, number: int, round_: int | None = None) -> Sequence[Assignment]:
        return self._all(ASSIGNMENTS, order=("round", "position"), task=task, number=number, **_of_round(round_))

    def validators_of(self, task: str, number: int) -> Sequence[str]:
        assigned = self._rows(_VALIDATORS_OF, task=task, number=number)
        return tuple(dict.fromkeys(validator for (validator,) in assigned))

    def assignments_of(self, validator: str, *, after: int, limit: int) -> Sequence[Assignment]:
        query = ASSIGNMENTS.query().where(_A.validator == validator, _A.sequence > after)
        return self._records(ASSIGNMENTS, query.order_by(_A.sequence).limit(limit))

    def assignments_unended_of(self, validator: str) -> Sequence[Assignment]:
        query = ASSIGNMENTS.query().where(_A.validator == validator, _A.state.in_(_UNENDED))
        return self._records(ASSIGNMENTS, query.order_by(_A.sequence))

    def assignments_due(self, now: datetime) -> Sequence[Assignment]:
        return self._found(ASSIGNMENTS, _ASSIGNMENTS_DUE, now=micros_of(now))

    def assignments_running(self, since: datetime) -> Sequence[Assignment]:
        query = ASSIGNMENTS.query().where(_A.state.in_(_UNENDED), _A.deadline > micros_of(since))
        return self._records(ASSIGNMENTS, query.order_by(_A.sequence))

    def assignments_unsettled(self, *, task: str | None = None, limit: int | None = None) -> Sequence[Assignment]:
        most = _ALL if limit is None else limit
        if task is None:
            return self._found(ASSIGNMENTS, _UNSETTLED, most=most)
        return self._found(ASSIGNMENTS, _UNSETTLED_OF, task=task, most=most)

    def assignment_states(self, task: str, number: int, round_: int) -> Sequence[AssignmentState]:
        found = self._rows(_STATES_OF, task=task, number=number, round=round_)
        return [AssignmentState[state] for (state,) in found]

    def evaluation(self, task: str, number: int, round_: int, validator: str) -> Evaluation | None:
        return self._load(EVALUATIONS, task, number, round_, validator)

    def evaluations(self, task: str, number: int, round_: int | None = None) -> Sequence[Evaluation]:
        return self._all(EVALUATIONS, order=("round", "validator"), task=task, number=number, **_of_round(round_))

    def prediction_hashes(self, root: str, blocks: int) -> bytes:
        kept = self._load(PREDICTION_HASHES, root, blocks)
        return b"" if kept is None else kept.hashes

    def validator_faults(
        self, listing: Listing, *, task: str | None = None, validator: str | None = None
    ) -> Sequence[tuple[Place, ValidatorFault]]:
        where = [column == value for column, value in ((_F.task, task), (_F.validator, validator)) if value is not None]
        return self._page(VALIDATOR_FAULTS, listing, *where, number=_F.position)

    def faults_unslashed(self, *, limit: int) -> Sequence[tuple[int, ValidatorFault]]:
        # The position is the last column.
        return [(row[-1], VALIDATOR_FAULTS.record(row)) for row in self._rows(_UNSLASHED, most=limit)]

    def draw_receipt(self, draw: str) -> bytes | None:
        kept = self._load(DRAW_RECEIPTS, draw)
        return None if kept is None else kept.receipt

    def next_deadline(self) -> datetime | None:
        found = [self._rows(question)[0][0] for question in _DEADLINES]
        known = [micros for micros in found if micros is not None]
        return moment_of(min(known)) if known else None


def _of_round(round_: int | None) -> dict[str, int]:
    return {} if round_ is None else {"round": round_}
