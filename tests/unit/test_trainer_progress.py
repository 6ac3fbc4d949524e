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


def test_going_back_to_a_checkpoint_drops_what_came_after_it() -> None:
    history = History(point(step) for step in (1, 2, 3, 4, 5))
    history.add(point(3))
    assert [kept.step for kept in history.points] == [1, 2, 3]
    assert history.newest == point(3)


def test_points_survive_their_json() -> None:
    assert Progress.from_json(point(7).to_json()) == point(7)
