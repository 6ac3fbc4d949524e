"""Every row of the state table of a submission, over the real store, with a clock that is moved by hand."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from services.registry import rounds
from services.registry.referee import structure
from services.registry.states import (
    EvaluationVerdict,
    HoldoutState,
    MembershipState,
    RejectionReason,
    Role,
    RoundState,
    SubmissionState,
    TaskState,
)
from services.registry.task_config import DatasetDigest
from services.runtime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from tests.support.registry_fakes import FakeDraw, FakeSelection, SettableClock
from tests.support.registry_world import (
    HOLDOUT,
    NODES,
    TASK,
    VALIDATORS,
    MemoryFiles,
    World,
    model_bytes,
    open_database,
    task_config,
)
from tiltyard.commitments import holdout_anchor

MODEL = model_bytes("a")
MINUTE_S, HOUR_S = 60, 3600


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    clock = SettableClock()
    database = open_database(tmp_path, clock)
    yield World(database, clock, FakeSelection(clock), MemoryFiles())
    await database.close()


async def evaluating(world: World, *, validators: int = 6, content: bytes = MODEL, **config: Any) -> int:
    """A submission whose first validators have just been drawn."""
    await world.open_task(validators=validators, config=task_config(**config))
    number = await world.submit(NODES[0], content)
    await world.turn()
    assert (await world.submission(number)).state is SubmissionState.EVALUATING
    return number


async def rejection(world: World, number: int) -> RejectionReason | None:
    submission = await world.submission(number)
    assert submission.state is SubmissionState.REJECTED
    assert submission.deadline is None
    assert submission.end_time is not None
    return submission.reason


async def verdicts(world: World, number: int, round_: int = 1) -> dict[str, EvaluationVerdict | None]:
    found = await world.store.read(lambda tx: tx.evaluations(TASK, number, round_))
    return {evaluation.validator: evaluation.verdict for evaluation in found}


def settled(world: World, number: int, round_: int = 1) -> dict[str, bool]:
    """Whether each pick was refunded."""
    draw = f"{TASK}-{number}-{round_}"
    return {validator: refund for (of, validator), refund in world.selection.settlements.items() if of == draw}


# COMMITTED


async def test_a_commitment_that_is_not_revealed_in_time_expires(world: World) -> None:
    await world.open_task()
    number = await world.commit(NODES[0], MODEL)
    await world.upload(NODES[0], number, MODEL)
    world.clock.advance(seconds=HOUR_S - 1)
    await world.turn()
    assert (await world.submission(number)).state is SubmissionState.COMMITTED
    world.clock.advance(seconds=1)
    with pytest.raises(FailedPrecondition, match="REVEAL_EXPIRED"):
        await world.reveal(NODES[0], number, MODEL)
    await world.turn()
    assert await rejection(world, number) is RejectionReason.REVEAL_EXPIRED
    with pytest.raises(FailedPrecondition, match="REVEAL_EXPIRED"):
        await world.reveal(NODES[0], number, MODEL)


async def test_expired_commitments_count_against_the_daily_limit_until_they_are_a_day_old(world: World) -> None:
    await world.open_task()
    for index in range(3):
        await world.commit(NODES[0], model_bytes(str(index)))
        world.clock.advance(seconds=HOUR_S)
        await world.turn()
    with pytest.raises(ResourceExhausted, match="DAILY_LIMIT") as refused:
        await world.commit(NODES[0], MODEL)
    assert refused.value.retry_after_s == 21 * HOUR_S
    await world.commit(NODES[1], MODEL)
    world.clock.advance(seconds=21 * HOUR_S - 1)
    with pytest.raises(ResourceExhausted) as refused:
        await world.commit(NODES[0], MODEL)
    assert refused.value.retry_after_s == 1
    world.clock.advance(seconds=1)
    await world.commit(NODES[0], MODEL)


# REVEALED


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (model_bytes("big", shapes={"head.weight": [2, 2], "head.bias": [2000]}), RejectionReason.TOO_LARGE),
        (b"not a safetensors file", RejectionReason.BAD_FORMAT),
        (MODEL[:-1], RejectionReason.BAD_FORMAT),
        (model_bytes("wide", shapes={"head.weight": [2, 3], "head.bias": [2]}), RejectionReason.SHAPE_MISMATCH),
        (model_bytes("less", shapes={"head.weight": [2, 2]}), RejectionReason.SHAPE_MISMATCH),
    ],
    ids=["too large", "no format", "truncated", "wide", "a tensor is missing"],
)
async def test_a_file_of_the_wrong_structure_is_rejected_before_any_draw(
    world: World, content: bytes, reason: RejectionReason
) -> None:
    await world.open_task()
    number = await world.submit(NODES[0], content)
    assert (await world.submission(number)).deadline == world.clock() + timedelta(minutes=1)
    await world.turn()
    assert await rejection(world, number) is reason
    assert (await world.submission(number)).detail
    assert world.selection.draws == {}


async def test_a_file_of_another_size_than_revealed_is_a_digest_mismatch(world: World) -> None:
    await world.open_task()
    number = await world.submit(NODES[0], MODEL)
    world.files.contents[(await world.submission(number)).model_digest.hex()] = MODEL + b"more"
    await world.turn()
    assert await rejection(world, number) is RejectionReason.DIGEST_MISMATCH


async def test_a_file_that_cannot_be_read_for_a_minute_is_the_platforms_fault(world: World) -> None:
    await world.open_task()
    number = await world.submit(NODES[0], MODEL)
    world.files.contents.clear()
    with pytest.raises(ExceptionGroup):
        await world.structure.check()
    assert (await world.submission(number)).state is SubmissionState.REVEALED
    world.clock.advance(seconds=MINUTE_S)
    await world.turn()
    assert await rejection(world, number) is RejectionReason.VALIDATORS_UNAVAILABLE


async def test_a_file_that_the_check_stumbles_over_does_not_stay_for_good(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(structure, "check_model_file", stumble)
    await world.open_task()
    number = await world.submit(NODES[0], MODEL)
    with pytest.raises(ExceptionGroup):
        await world.structure.check()
    world.clock.advance(seconds=MINUTE_S)
    await world.turn()
    assert await rejection(world, number) is RejectionReason.VALIDATORS_UNAVAILABLE
    assert (await world.submission(number)).detail == "the registry could not read the model: MemoryError"


async def test_one_unreadable_file_does_not_hold_up_the_others(world: World) -> None:
    await world.open_task()
    await world.submit(NODES[0], MODEL)
    second = await world.submit(NODES[1], model_bytes("b"))
    del world.files.contents[(await world.submission(1)).model_digest.hex()]
    with pytest.raises(ExceptionGroup):
        await world.structure.check()
    assert (await world.submission(second)).structure_checked


async def test_a_draw_waits_for_enough_validators_and_says_so(world: World) -> None:
    await world.open_task(validators=2)
    number = await world.submit(NODES[0], MODEL)
    await world.turn()
    waiting = await world.submission(number)
    assert waiting.state is SubmissionState.REVEALED
    assert waiting.detail == "too few owner groups are eligible"
    assert waiting.deadline == world.clock() + timedelta(hours=24)
    await world.join(VALIDATORS[2], Role.VALIDATOR)
    await world.turn()
    drawn = await world.submission(number)
    assert drawn.state is SubmissionState.EVALUATING
    assert drawn.detail == ""
    assert drawn.deadline == world.clock() + timedelta(hours=2)
    assert await world.states(number) == ["OFFERED"] * 3


async def test_a_draw_that_was_refused_is_asked_for_again_after_some_seconds(world: World) -> None:
    await world.open_task(validators=2)
    await world.submit(NODES[0], MODEL)
    asked: list[str] = []
    world.selection.before = asked.append
    for _ in range(5):
        await world.turn()
    assert asked.count("draw_validators") == 1
    world.clock.advance(seconds=3)
    await world.turn()
    assert asked.count("draw_validators") == 2


async def test_without_validators_until_the_draws_deadline_the_platform_is_to_blame(world: World) -> None:
    await world.open_task(validators=2)
    for index in range(3):
        await world.submit(NODES[0], model_bytes(str(index)))
    await world.turn()
    world.clock.advance(seconds=24 * HOUR_S - 1)
    with pytest.raises(ResourceExhausted):
        await world.commit(NODES[0], MODEL)
    await world.turn()
    assert (await world.submission(1)).state is SubmissionState.REVEALED
    world.clock.advance(seconds=1)
    await world.turn()
    assert await rejection(world, 1) is RejectionReason.VALIDATORS_UNAVAILABLE
    assert (await world.round(1)).state is RoundState.CONCLUDED
    # It does not count against the daily limit, and the same model may come again.
    again = await world.submit(NODES[0], model_bytes("0"))
    assert (await world.submission(again)).state is SubmissionState.REVEALED


async def test_while_the_selector_is_away_submissions_wait(world: World) -> None:
    await world.open_task()
    number = await world.submit(NODES[0], MODEL)
    await world.structure.check()
    world.selection.unavailable = True
    with pytest.raises(ExceptionGroup) as failure:
        await world.draws.draw()
    assert failure.group_contains(Unavailable)
    world.clock.advance(seconds=24 * HOUR_S)
    await world.draws.draw()
    assert await rejection(world, number) is RejectionReason.VALIDATORS_UNAVAILABLE


async def test_what_the_selector_refuses_for_good_is_given_up_in_time(world: World) -> None:
    await world.open_task()
    number = await world.submit(NODES[0], MODEL)
    await world.structure.check()
    # The registry's state is that of an older backup: the selector has drawn for another submission of this name.
    world.selection.draws[f"{TASK}-{number}-1"] = FakeDraw((), TASK, "", 1, (), [])
    with pytest.raises(ExceptionGroup) as failure:
        await world.draws.draw()
    assert failure.group_contains(AlreadyExists)
    world.clock.advance(seconds=24 * HOUR_S)
    await world.draws.draw()
    assert await rejection(world, number) is RejectionReason.VALIDATORS_UNAVAILABLE


async def test_paused_validators_and_those_who_left_are_not_drawn(world: World) -> None:
    await world.open_task(validators=5)
    await world.join(VALIDATORS[0], Role.VALIDATOR, state=MembershipState.PAUSED)
    await world.join(VALIDATORS[1], Role.VALIDATOR, state=MembershipState.LEFT)
    number = await world.submit(NODES[0], MODEL)
    await world.turn()
    drawn = {duty.participant for duty in await world.duties(number)}
    assert drawn == {validator.id for validator in VALIDATORS[2:5]}


# EVALUATING


async def test_an_honest_submission_is_scored_and_every_step_is_in_the_log(world: World) -> None:
    number = await evaluating(world)
    await world.judge(number, 900, 900, 900)
    scored = await world.submission(number)
    assert scored.state is SubmissionState.SCORED
    assert (scored.deadline, scored.end_time) == (None, world.clock())
    score = scored.scores[1]
    assert (score.outcome, score.correct, score.total, score.outliers) == ("SCORED", 900, 1000, ())
    assert len(score.evaluations) == 3
    assert set((await verdicts(world, number)).values()) == {EvaluationVerdict.AGREED}
    assert list(settled(world, number).values()) == [False] * 3
    assert await world.leaf_kinds() == [
        "submission_committed",
        "submission_revealed",
        "draw",
        "submission_changed",
        *["assignment_changed"] * 3,
        *["assignment_changed", "evaluation_sealed"] * 3,
        *["evaluation_opened"] * 3,
        "score_concluded",
        "submission_changed",
    ]


async def test_who_does_not_accept_in_time_is_charged_and_the_next_reserve_is_asked(world: World) -> None:
    number = await evaluating(world)
    first, second, third = await world.duties(number)
    await world.accept(first)
    await world.accept(second)
    world.clock.advance(seconds=MINUTE_S)
    await world.turn()
    assert await world.states(number) == ["ACCEPTED", "ACCEPTED", "EXPIRED", "OFFERED"]
    assert settled(world, number) == {third.participant: False}
    with pytest.raises(FailedPrecondition, match="ASSIGNMENT_ENDED"):
        await world.accept(third)


async def test_a_lease_that_is_not_renewed_passes_to_a_reserve(world: World) -> None:
    number = await evaluating(world)
    duties = await world.duties(number)
    tokens = [await world.accept(duty) for duty in duties]
    for _ in range(3):
        world.clock.advance(seconds=MINUTE_S)
        await world.turn()
        for duty, token in list(zip(duties, tokens, strict=True))[1:]:
            await world.assignments.renew(duty.participant, duty, token=token)
    assert await world.states(number) == ["EXPIRED", "ACCEPTED", "ACCEPTED", "EXPIRED", "OFFERED"]
    with pytest.raises(FailedPrecondition, match="LEASE_LOST"):
        await world.seal(duties[0], await world.report(duties[0], 900), token=tokens[0])


async def test_who_declines_is_charged_and_replaced_at_once_in_the_same_order(world: World) -> None:
    number = await evaluating(world)
    duties = await world.duties(number)
    await world.decline(duties[0])
    token = await world.accept(duties[1])
    await world.decline(duties[1], token=token)
    await world.turn()
    assert await world.states(number) == ["DECLINED", "DECLINED", "OFFERED", "OFFERED", "OFFERED"]
    assert settled(world, number) == {duties[0].participant: False, duties[1].participant: False}
    order = world.selection.draws[f"{TASK}-{number}-1"].order
    assert [duty.participant for duty in await world.duties(number)] == list(order[:5])


async def test_a_quorum_at_the_sealing_deadline_is_enough(world: World) -> None:
    number = await evaluating(world, validators=3)
    duties = await world.duties(number)
    reports = [await world.evaluate(duty, 900) for duty in duties[:2]]
    await world.accept(duties[2])
    token = (await world.store.read(lambda tx: tx.assignment(TASK, number, 1, duties[2].participant))).lease_token
    while (await world.round(number)).deadline > world.clock() + timedelta(minutes=1):
        world.clock.advance(seconds=MINUTE_S)
        await world.assignments.renew(duties[2].participant, duties[2], token=token)
        await world.turn()
    assert await world.states(number) == ["SEALED", "SEALED", "ACCEPTED"]
    world.clock.advance(seconds=MINUTE_S)
    await world.turn()
    assert await world.states(number) == ["SEALED", "SEALED", "EXPIRED"]
    for duty, report in zip(duties, reports, strict=False):
        await world.open(duty, report)
    await world.turn()
    assert (await world.submission(number)).scores[1].evaluations == tuple(d.participant for d in duties[:2])


async def test_too_few_seals_at_the_sealing_deadline(world: World) -> None:
    number = await evaluating(world, validators=12)
    duties = await world.duties(number)
    await world.evaluate(duties[0], 900)
    world.clock.advance(seconds=HOUR_S)
    await world.turn()
    assert await rejection(world, number) is RejectionReason.VALIDATORS_UNAVAILABLE
    assert await world.states(number) == ["RELEASED", "EXPIRED", "EXPIRED"]
    assert settled(world, number) == {duty.participant: duty == duties[0] for duty in duties}


async def test_without_reserves_and_too_few_left_it_ends_at_once(world: World) -> None:
    number = await evaluating(world, validators=3)
    duties = await world.duties(number)
    await world.decline(duties[0])
    await world.turn()
    assert (await world.submission(number)).state is SubmissionState.EVALUATING
    assert (await world.round(number)).exhausted
    await world.decline(duties[1])
    await world.turn()
    assert await rejection(world, number) is RejectionReason.VALIDATORS_UNAVAILABLE
    assert await world.states(number) == ["DECLINED", "DECLINED", "RELEASED"]
    assert settled(world, number)[duties[2].participant] is True


async def test_without_reserves_a_quorum_opens_without_waiting(world: World) -> None:
    number = await evaluating(world, validators=3)
    duties = await world.duties(number)
    await world.decline(duties[0])
    await world.turn()
    reports = [await world.evaluate(duty, 900) for duty in duties[1:]]
    await world.turn()
    assert (await world.round(number)).state is RoundState.OPENING
    for duty, report in zip(duties[1:], reports, strict=True):
        await world.open(duty, report)
    await world.turn()
    assert (await world.submission(number)).state is SubmissionState.SCORED


async def test_a_seal_that_is_never_opened_expires_and_a_quorum_is_enough(world: World) -> None:
    number = await evaluating(world)
    duties = await world.duties(number)
    reports = [await world.evaluate(duty, 900) for duty in duties]
    await world.turn()
    for duty, report in list(zip(duties, reports, strict=True))[:2]:
        await world.open(duty, report)
    await world.turn()
    assert (await world.submission(number)).state is SubmissionState.EVALUATING
    world.clock.advance(seconds=HOUR_S)
    with pytest.raises(FailedPrecondition, match="OPENING_EXPIRED"):
        await world.open(duties[2], reports[2])
    await world.turn()
    assert (await world.submission(number)).state is SubmissionState.SCORED
    assert await world.states(number) == ["OPENED", "OPENED", "EXPIRED"]
    found = await verdicts(world, number)
    assert found[duties[2].participant] is EvaluationVerdict.UNOPENED
    with pytest.raises(FailedPrecondition, match="OPENING_EXPIRED"):
        await world.open(duties[2], reports[2])


async def test_too_few_opened_reports_call_in_reserves_and_stay_hidden(world: World) -> None:
    number = await evaluating(world)
    duties = await world.duties(number)
    reports = [await world.evaluate(duty, 900) for duty in duties]
    await world.turn()
    await world.open(duties[0], reports[0])
    world.clock.advance(seconds=HOUR_S)
    await world.turn()
    assert await world.states(number) == ["OPENED", "EXPIRED", "EXPIRED", "OFFERED", "OFFERED"]
    assert (await world.round(number)).state is RoundState.SEALING
    assert "evaluation_opened" not in await world.leaf_kinds()
    hidden = (await world.evaluations.get(duties[1].participant, duties[0])).evaluation
    assert hidden.report is None
    await world.judge(number, 900, 900)
    scored = await world.submission(number)
    assert scored.state is SubmissionState.SCORED
    assert len(scored.scores[1].evaluations) == 3
    assert (await world.leaf_kinds()).count("evaluation_opened") == 3
    shown = (await world.evaluations.get(duties[1].participant, duties[0])).evaluation
    assert shown.report is not None


async def test_too_few_opened_reports_and_no_reserves(world: World) -> None:
    number = await evaluating(world, validators=3)
    duties = await world.duties(number)
    reports = [await world.evaluate(duty, 900) for duty in duties]
    await world.turn()
    await world.open(duties[0], reports[0])
    world.clock.advance(seconds=HOUR_S)
    await world.turn()
    assert await rejection(world, number) is RejectionReason.VALIDATORS_UNAVAILABLE
    # What was opened is laid open even so, and its validator has done the duty.
    assert (await world.leaf_kinds()).count("evaluation_opened") == 1
    assert settled(world, number) == {duty.participant: False for duty in duties}


async def test_a_dispute_calls_in_reserves_once_and_then_names_the_outlier(world: World) -> None:
    number = await evaluating(world, validators=12)
    first = await world.duties(number)
    await world.judge(number, 900, 500, 900)
    assert (await world.submission(number)).state is SubmissionState.EVALUATING
    assert (await world.states(number)).count("OFFERED") == 7
    assert "evaluation_opened" not in await world.leaf_kinds()
    await world.judge(number, *[900] * 6, 400)
    scored = await world.submission(number)
    assert scored.state is SubmissionState.SCORED
    duties = await world.duties(number)
    assert scored.scores[1].correct == 900
    assert scored.scores[1].outliers == (first[1].participant, duties[9].participant)
    found = await verdicts(world, number)
    assert found[first[1].participant] is EvaluationVerdict.OUTLIER
    assert found[first[0].participant] is EvaluationVerdict.AGREED
    assert settled(world, number) == {duty.participant: False for duty in duties}


async def test_a_reserve_of_a_dispute_that_declines_is_replaced(world: World) -> None:
    number = await evaluating(world, validators=12)
    await world.judge(number, 900, 500, 900)
    await world.decline((await world.duties(number, "OFFERED"))[0])
    await world.turn()
    assert (await world.states(number)).count("OFFERED") == 7


async def test_a_dispute_takes_as_many_reserves_as_remain(world: World) -> None:
    number = await evaluating(world, validators=4)
    await world.judge(number, 900, 500, 900)
    assert (await world.states(number)).count("OFFERED") == 1
    await world.judge(number, 500)
    assert await rejection(world, number) is RejectionReason.AMBIGUOUS
    assert (await world.submission(number)).scores[1].outcome == "AMBIGUOUS"
    assert set((await verdicts(world, number)).values()) == {None}


async def test_a_dispute_without_reserves_is_concluded_at_once(world: World) -> None:
    number = await evaluating(world, validators=3)
    await world.judge(number, 900, "CRASHED", 900)
    scored = await world.submission(number)
    assert scored.state is SubmissionState.SCORED
    assert len(scored.scores[1].outliers) == 1


async def test_counts_within_the_tasks_tolerance_are_no_dispute(world: World) -> None:
    number = await evaluating(world, tolerance=2)
    await world.judge(number, 898, 900, 902)
    assert (await world.submission(number)).scores[1].correct == 900


@pytest.mark.parametrize(
    "fault", ["NAN_OUTPUT", "BAD_FORMAT", "SHAPE_MISMATCH", "TOO_SLOW", "OUT_OF_MEMORY", "CRASHED"]
)
async def test_a_majority_of_one_fault_rejects(world: World, fault: str) -> None:
    number = await evaluating(world, validators=3)
    await world.judge(number, fault, fault, 900)
    assert await rejection(world, number) is RejectionReason[fault]
    score = (await world.submission(number)).scores[1]
    assert (score.outcome, score.fault, len(score.outliers)) == ("FAULT", fault, 1)


async def test_a_nodes_own_endpoint_never_reaches_the_quorum(world: World) -> None:
    number = await evaluating(world, allow_node_endpoint=True)
    duties = await world.duties(number)
    reports = [await world.evaluate(duty, 1000, node_endpoint=True) for duty in duties[:2]]
    reports.append(await world.evaluate(duties[2], 900))
    await world.turn()
    for duty, report in zip(duties, reports, strict=True):
        await world.open(duty, report)
    await world.turn()
    assert (await world.states(number))[3:] == ["OFFERED", "OFFERED"]
    await world.judge(number, 900, 900)
    score = (await world.submission(number)).scores[1]
    assert score.correct == 900
    assert not set(score.evaluations) & {duty.participant for duty in duties[:2]}


async def test_a_report_of_a_nodes_endpoint_is_refused_where_the_task_does_not_allow_it(world: World) -> None:
    number = await evaluating(world)
    duties = await world.duties(number)
    reports = [await world.evaluate(duty, 900, node_endpoint=index == 0) for index, duty in enumerate(duties)]
    await world.turn()
    with pytest.raises(InvalidArgument, match="node_endpoint"):
        await world.open(duties[0], reports[0])


# Copies


async def test_a_later_commit_of_the_same_model_is_a_copy(world: World) -> None:
    await world.open_task()
    original = await world.submit(NODES[0], MODEL)
    copy = await world.submit(NODES[1], MODEL)
    assert await rejection(world, copy) is RejectionReason.COPY
    assert (await world.submission(copy)).original == original
    await world.turn()
    assert (await world.submission(original)).state is SubmissionState.EVALUATING


async def test_an_earlier_commit_that_is_revealed_later_owns_the_model_even_when_the_copy_is_scored(
    world: World,
) -> None:
    await world.open_task()
    original = await world.commit(NODES[0], MODEL)
    copy = await world.submit(NODES[1], MODEL)
    await world.turn()
    await world.judge(copy, 900, 900, 900)
    assert (await world.submission(copy)).state is SubmissionState.SCORED
    await world.upload(NODES[0], original, MODEL)
    await world.reveal(NODES[0], original, MODEL)
    assert await rejection(world, copy) is RejectionReason.COPY
    assert (await world.submission(copy)).original == original
    assert (await world.submission(copy)).scores[1].correct == 900
    assert (await world.submission(original)).state is SubmissionState.REVEALED


async def test_a_copy_under_evaluation_releases_its_validators_with_refund(world: World) -> None:
    await world.open_task()
    original = await world.commit(NODES[0], MODEL)
    copy = await world.submit(NODES[1], MODEL)
    await world.turn()
    duties = await world.duties(copy)
    await world.accept(duties[0])
    await world.evaluate(duties[1], 900)
    await world.upload(NODES[0], original, MODEL)
    await world.reveal(NODES[0], original, MODEL)
    assert await world.states(copy) == ["RELEASED"] * 3
    await world.turn()
    assert settled(world, copy) == {duty.participant: True for duty in duties}
    with pytest.raises(FailedPrecondition, match="ASSIGNMENT_ENDED"):
        await world.accept(duties[2])


async def test_the_same_model_twice_by_one_node_is_a_copy_too(world: World) -> None:
    await world.open_task()
    first = await world.submit(NODES[0], MODEL)
    again = await world.submit(NODES[0], MODEL)
    assert (await world.submission(again)).original == first


async def test_knowing_a_digest_is_not_having_the_model(world: World) -> None:
    await world.open_task()
    await world.submit(NODES[0], MODEL)
    number = await world.commit(NODES[1], MODEL)
    with pytest.raises(FailedPrecondition, match="MODEL_NOT_UPLOADED"):
        await world.reveal(NODES[1], number, MODEL)


# Cancellation


async def cancel(world: World) -> None:
    """What cancelling a task does to its submissions."""

    def reject_all(tx: Any) -> None:
        for submission in tx.submissions(TASK):
            if submission.state is not SubmissionState.REJECTED:
                rounds.reject(tx, submission, RejectionReason.TASK_CANCELLED)

    await world.store.write(reject_all)
    await world.change_task(state=TaskState.CANCELLED)


async def test_cancellation_rejects_in_every_state_and_refunds(world: World) -> None:
    await world.open_task()
    scored = await world.submit(NODES[0], MODEL)
    await world.turn()
    await world.judge(scored, 900, 900, 900)
    sealed = await world.submit(NODES[1], model_bytes("b"))
    await world.turn()
    duties = await world.duties(sealed)
    await world.evaluate(duties[0], 900)
    committed = await world.commit(NODES[2], model_bytes("c"))
    await cancel(world)
    await world.turn()
    for number in (scored, sealed, committed):
        assert await rejection(world, number) is RejectionReason.TASK_CANCELLED
    assert await world.states(scored) == ["OPENED"] * 3
    assert await world.states(sealed) == ["RELEASED"] * 3
    assert settled(world, sealed) == {duty.participant: True for duty in duties}
    assert await world.store.read(lambda tx: tx.rounds_unconcluded()) == []


async def test_a_draw_that_comes_back_after_the_cancellation_is_recorded_and_refunded(world: World) -> None:
    await world.open_task()
    number = await world.submit(NODES[0], MODEL)
    await world.structure.check()
    drawn = world.selection.draw_validators

    async def draw_and_cancel(**question: Any) -> Any:
        answer = await drawn(**question)
        await cancel(world)
        return answer

    world.selection.draw_validators = draw_and_cancel  # type: ignore[method-assign]
    await world.turn()
    assert await rejection(world, number) is RejectionReason.TASK_CANCELLED
    assert await world.states(number) == ["RELEASED"] * 3
    assert list(settled(world, number).values()) == [True] * 3


# The holdout's round


async def closed_with_holdout(world: World, **config: Any) -> int:
    number = await evaluating(world, **config)
    await world.judge(number, 900, 900, 900)
    await world.change_task(
        state=TaskState.CLOSED, holdout=HoldoutState.ACCEPTED, holdout_rows=500, holdout_leaf=b"h" * 32
    )
    await world.turn()
    return number


async def test_the_holdout_is_judged_as_round_2_while_the_submission_stays_scored(world: World) -> None:
    number = await closed_with_holdout(world)
    assert (await world.submission(number)).state is SubmissionState.SCORED
    assert (await world.submission(number)).deadline is None
    assert await world.states(number, 2) == ["OFFERED"] * 3
    anchor = world.selection.draws[f"{TASK}-{number}-2"].asked[0]
    assert anchor == holdout_anchor(holdout_leaf=b"h" * 32, submission=f"tasks/{TASK}/submissions/{number}")
    duty = (await world.duties(number, round_=2))[0]
    lease = await world.assignments.accept(duty.participant, duty, holder=bytes(32))
    assert lease.order.dataset == DatasetDigest(HOLDOUT, 6000)
    # The same validator may be drawn in both rounds: the two duties are apart.
    await world.accept(duty)
    report = await world.report(duty, 450)
    await world.seal(duty, report, token=lease.assignment.lease_token)
    others = (await world.duties(number, round_=2))[1:]
    reports = [report, *[await world.evaluate(other, 450) for other in others]]
    await world.turn()
    for of, opened in zip([duty, *others], reports, strict=True):
        await world.open(of, opened)
    await world.turn()
    scored = await world.submission(number)
    assert scored.state is SubmissionState.SCORED
    assert [(s.round, s.correct, s.total) for s in scored.scores.values()] == [(1, 900, 1000), (2, 450, 500)]
    assert (await world.round(number, 2)).state is RoundState.CONCLUDED
    assert sorted(scored.draws) == [1, 2]


async def test_a_fault_in_round_2_leaves_the_score_of_round_1(world: World) -> None:
    number = await closed_with_holdout(world)
    await world.judge(number, "TOO_SLOW", "TOO_SLOW", "TOO_SLOW", round_=2)
    scored = await world.submission(number)
    assert scored.state is SubmissionState.SCORED
    assert (scored.scores[1].correct, scored.scores[2].fault) == (900, "TOO_SLOW")


async def test_round_2_without_validators_leaves_the_score_of_round_1(world: World) -> None:
    number = await closed_with_holdout(world)
    world.clock.advance(seconds=HOUR_S)
    await world.turn()
    scored = await world.submission(number)
    assert scored.state is SubmissionState.SCORED
    assert sorted(scored.scores) == [1]
    assert (await world.round(number, 2)).state is RoundState.CONCLUDED
    assert (await world.leaf_kinds())[-1] == "submission_changed"


async def test_a_submission_that_is_scored_after_the_holdout_came_gets_its_round_2(world: World) -> None:
    number = await evaluating(world)
    await world.change_task(
        state=TaskState.CLOSED, holdout=HoldoutState.ACCEPTED, holdout_rows=500, holdout_leaf=b"h" * 32
    )
    await world.turn()
    assert await world.store.read(lambda tx: tx.round(TASK, number, 2)) is None
    await world.judge(number, 900, 900, 900)
    assert (await world.round(number, 2)).state is RoundState.SEALING


async def test_a_copy_that_comes_to_light_in_round_2_ends_it(world: World) -> None:
    await world.open_task()
    original = await world.commit(NODES[0], MODEL)
    copy = await world.submit(NODES[1], MODEL)
    await world.turn()
    await world.judge(copy, 900, 900, 900)
    await world.change_task(
        state=TaskState.CLOSED, holdout=HoldoutState.ACCEPTED, holdout_rows=500, holdout_leaf=b"h" * 32
    )
    await world.turn()
    await world.upload(NODES[0], original, MODEL)
    await world.reveal(NODES[0], original, MODEL)
    await world.turn()
    assert await rejection(world, copy) is RejectionReason.COPY
    assert await world.states(copy, 2) == ["RELEASED"] * 3
