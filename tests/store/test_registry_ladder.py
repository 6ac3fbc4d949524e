"""A task with LADDER visibility shows no count before it is closed, and everything afterwards."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.registry.convert.submissions import submission_message
from services.registry.leaderboard import Ranking
from services.registry.states import RejectionReason, ScoreVisibility, SubmissionState, TaskState
from services.registry.task_states import cancel, close
from tests.support.registry_fakes import FakeSelection, SettableClock
from tests.support.registry_world import NODES, TASK, MemoryFiles, World, model_bytes, open_database, task_config
from tiltyard import ladder
from tiltyard.commitments import score_commitment
from tiltyard.type.v1 import log_pb2

STEP_MICROS = 20_000


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    clock = SettableClock()
    database = open_database(tmp_path, clock)
    world = World(database, clock, FakeSelection(clock), MemoryFiles())
    config = task_config(score_visibility=ScoreVisibility.LADDER, ladder_step_micros=STEP_MICROS)
    await world.open_task(config=config)
    yield world
    await database.close()


async def score(world: World, correct: int, *, node: int = 0, reserves: int | None = None) -> int:
    """A submission whose validators count `correct`; with `reserves` one of them does not, and they are called in."""
    number = await world.submit(NODES[node], model_bytes(f"{node} {correct} {world.clock()}"))
    await world.turn()
    if reserves is None:
        await world.judge(number, correct, correct, correct)
    else:
        await world.judge(number, correct, correct, 1)
        await world.judge(number, *[correct] * reserves)
    world.clock.advance(seconds=24 * 3600)
    return number


async def entries(world: World, kind: str) -> list[log_pb2.LogEntry]:
    leaves = await world.store.read(lambda tx: tx.leaves(start=0, limit=10_000))
    read = [log_pb2.LogEntry.FromString(leaf.entry) for leaf in leaves]
    return [entry for entry in read if entry.WhichOneof("entry") == kind]


def places(ranking: Ranking) -> list[tuple[str, int, int, int]]:
    return [(place.participant, place.number, place.correct, place.scored_submissions) for place in ranking.places]


async def test_the_public_best_moves_by_steps_only(world: World) -> None:
    shown = []
    for correct in (903, 919, 921, 900, 959, 960):
        await score(world, correct)
        shown.append(places(await world.leaderboard.get(TASK))[0][1:])
    # In steps of 20 rows: 903 is shown as 900, and moved by more than 920 and 940 + 20 only.
    assert shown == [(1, 900, 1), (1, 900, 2), (3, 920, 3), (3, 920, 4), (5, 960, 5), (5, 960, 6)]


async def test_nothing_but_the_public_best_leaves_the_registry_before_close(world: World) -> None:
    first, second = await score(world, 903), await score(world, 911)
    third = await score(world, 877, node=1, reserves=3)
    assert places(await world.leaderboard.get(TASK)) == [(NODES[0].id, first, 900, 2), (NODES[1].id, third, 880, 1)]
    for number, correct in ((first, 900), (second, None), (third, 880)):
        view = await world.submissions.get(TASK, number)
        assert view.submission.state is SubmissionState.SCORED
        message = submission_message(view)
        assert [each.correct for each in message.scores] == ([] if correct is None else [correct])
        assert message.HasField("score") == (correct is not None)
        for evaluation in await world.evaluations.page(NODES[2].id, TASK, number, after=(0, ""), limit=9):
            assert (evaluation.report, evaluation.finding, evaluation.salt) == (None, None, b"")
            view_of_one = await world.evaluations.get(NODES[2].id, (await world.duties(number))[0], hashes=True)
            assert view_of_one.prediction_hashes == b""
    assert await entries(world, "evaluation_opened") == []
    for entry in await entries(world, "score_concluded"):
        assert len(entry.score_concluded.commitment) == 32
        assert not entry.score_concluded.HasField("score")
        assert not entry.score_concluded.salt
    # Who deviated is named all the same.
    assert len(await entries(world, "validator_fault")) == 1


async def test_close_lays_everything_open_and_the_ladder_can_be_recomputed(world: World) -> None:
    numbers = [await score(world, correct) for correct in (903, 911, 941)]
    committed = [entry.score_concluded for entry in await entries(world, "score_concluded")]
    await world.store.write(lambda tx: close(tx, tx.task(TASK)))  # type: ignore[arg-type]
    assert places(await world.leaderboard.get(TASK)) == [(NODES[0].id, numbers[2], 941, 3)]
    assert [s.correct for s in (await world.submissions.get(TASK, 2)).submission.scores.values()] == [911]
    await world.turn()
    opened = [entry.score_concluded for entry in await entries(world, "score_concluded")][len(committed) :]
    for before, after in zip(committed, opened, strict=True):
        assert after.submission == before.submission
        data = after.score.SerializeToString(deterministic=True)
        assert score_commitment(score=data, salt=after.salt) == before.commitment
    best, steps = None, []
    for after in opened:
        best = ladder.climbed(best, after.score.correct, after.score.total, STEP_MICROS) or best
        steps.append(best)
    assert steps == [45, 45, 47]
    assert len(await entries(world, "evaluation_opened")) == 9
    reader = NODES[2].id
    assert all(e.report for e in await world.evaluations.page(reader, TASK, 1, after=(0, ""), limit=9))
    size = await world.store.read(lambda tx: tx.log_size())
    await world.turn()
    assert await world.store.read(lambda tx: tx.log_size()) == size


async def test_a_task_is_not_final_before_its_scores_are_in_the_log(world: World) -> None:
    await score(world, 903)
    await world.store.write(lambda tx: close(tx, tx.task(TASK)))  # type: ignore[arg-type]
    await world.change_task(config=task_config(score_visibility=ScoreVisibility.LADDER, holdout=None))
    assert await world.turns.rank() == 0
    assert await world.turns.disclose() == 1
    await world.change_task(holdout=(await world.store.read(lambda tx: tx.task(TASK))).holdout)  # type: ignore[union-attr]
    assert await world.turns.rank() == 1
    assert (await world.store.read(lambda tx: tx.task(TASK))).state is TaskState.FINAL  # type: ignore[union-attr]


async def test_a_rejected_submissions_reports_are_hidden_as_long(world: World) -> None:
    number = await world.submit(NODES[0], model_bytes("bad"))
    await world.turn()
    await world.judge(number, "NAN_OUTPUT", "NAN_OUTPUT", "NAN_OUTPUT")
    assert (await world.submission(number)).reason is RejectionReason.NAN_OUTPUT
    assert await entries(world, "evaluation_opened") == []
    assert (await world.submissions.get(TASK, number)).submission.scores == {}
    await world.store.write(lambda tx: close(tx, tx.task(TASK)))  # type: ignore[arg-type]
    await world.turn()
    assert len(await entries(world, "evaluation_opened")) == 3
    assert [entry.score_concluded.HasField("score") for entry in await entries(world, "score_concluded")] == [
        False,
        True,
    ]


async def test_cancellation_lays_open_what_was_hidden_and_what_is_under_way(world: World) -> None:
    scored = await score(world, 903)
    running = await world.submit(NODES[1], model_bytes("b"))
    await world.turn()
    duties = await world.duties(running)
    reports = [await world.evaluate(duty, 800) for duty in duties]
    await world.turn()
    await world.open(duties[0], reports[0])
    await world.store.write(lambda tx: cancel(tx, tx.task(TASK), reason="over"))  # type: ignore[arg-type]
    assert len(await entries(world, "evaluation_opened")) == 4
    assert len(await entries(world, "score_concluded")) == 2
    for number in (scored, running):
        assert (await world.submission(number)).reason is RejectionReason.TASK_CANCELLED
        assert not (await world.submission(number)).hidden


async def test_a_copy_that_comes_to_light_does_not_hand_the_ladder_back(world: World) -> None:
    original = await world.commit(NODES[1], model_bytes("late"))
    copy = await world.submit(NODES[0], model_bytes("late"))
    await world.turn()
    await world.judge(copy, 951, 951, 951)
    await world.upload(NODES[1], original, model_bytes("late"))
    await world.reveal(NODES[1], original, model_bytes("late"))
    assert (await world.submission(copy)).reason is RejectionReason.COPY
    assert places(await world.leaderboard.get(TASK)) == []
    # 960 was shown: what follows has to beat it.
    number = await score(world, 970)
    assert (await world.submission(number)).public_best is None
