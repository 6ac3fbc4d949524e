"""The thinned history of a training."""

import itertools

from services.trainer.progress import History, Progress


def point(step: int) -> Progress:
    return Progress(step=step, total_steps=10_000, epoch=1, loss=1 / step, learning_rate=0.1)


def test_a_short_history_is_kept_whole() -> None:
    history = History(point(step) for step in range(1, 100))
    assert [kept.step for kept in history.points] == list(range(1, 100))


def test_a_long_history_is_thinned_evenly_and_keeps_the_newest() -> None:
    history = History()
    for step in range(1, 10_001):
        history.add(point(step))
        assert history.points[-1].step == step
        assert len(history.points) <= 500
    steps = [kept.step for kept in history.points]
    assert len(steps) >= 250
    gaps = {later - earlier for earlier, later in itertools.pairwise(steps[:-1])}
    assert len(gaps) == 1


def test_a_history_that_outlives_restarts_stays_even_over_the_whole_training() -> None:
    history = History()
    for step in range(1, 20_001):
        history.add(point(step))
        if step % 3000 == 0:  # what a service writes down and reads again
            history = History(history.points)
    steps = [kept.step for kept in history.points]
    assert steps[0] == 1
    assert steps[-1] == 20_000
    assert 200 <= len(steps) <= 500
    # A week ago is told as finely as today.
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    assert max(gaps) <= 4 * 20_000 / 500


def test_going_back_to_a_checkpoint_drops_what_came_after_it() -> None:
    history = History(point(step) for step in (1, 2, 3, 4, 5))
    history.add(point(3))
    assert [kept.step for kept in history.points] == [1, 2, 3]
    assert history.newest == point(3)


def test_points_survive_their_json() -> None:
    assert Progress.from_json(point(7).to_json()) == point(7)
