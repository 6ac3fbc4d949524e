"""The training loop: it learns, it repeats itself to the bit, and it stops where it must."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from services.trainer.config import LossKind, OptimizerKind, ScheduleKind, TrainingConfig
from services.trainer.descent.batches import Batches, split
from services.trainer.descent.checkpoints import Checkpoint
from services.trainer.descent.descent import Descent
from services.trainer.descent.meter import Diverged
from services.trainer.descent.objectives import objective
from services.trainer.descent.rows import Rows
from services.trainer.progress import Progress
from services.trainer.schedule import Plan, default_epochs
from services.trainer.trainings import DEFAULT_LABEL_SMOOTHING
from tiltyard.models import build
from tiltyard.modelspec import Convnet, Linear, Mlp, ModelSpec

DIGITS = load_digits()
X = DIGITS.images.astype(np.uint8)
Y = DIGITS.target.astype(np.int64)
SPEC = ModelSpec((8, 8), 10, Mlp((64,)), 1 / 16)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def digits(rows: int = 400, *, in_memory: bool | None = None) -> Rows:
    return Rows(X[:rows], Y[:rows], loss=LossKind.CROSS_ENTROPY, outputs=10, device="cpu", in_memory=in_memory)


def descent(config: TrainingConfig, rows: Rows | None = None, spec: ModelSpec = SPEC) -> Descent:
    return Descent(spec=spec, loss=LossKind.CROSS_ENTROPY, config=config, rows=rows or digits())


def trained(config: TrainingConfig, rows: Rows | None = None, spec: ModelSpec = SPEC) -> Descent:
    run = descent(config, rows, spec)
    assert run.run(report=lambda _: None)
    return run


def run_one_update(run: Descent) -> tuple[bool, Checkpoint]:
    """Stopped at its first report: whether it was the last update, and the state then."""
    ended = run.run(report=lambda _: run.stop(), clock=ticking(1.0))
    return ended, run.state()


def weights(run: Descent) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in run.module.state_dict().values())


def ticking(step_s: float) -> Callable[[], float]:
    """A clock that moves on by `step_s` each time it is read."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += step_s
        return now

    return clock


@pytest.mark.parametrize(
    ("architecture", "least"),
    [
        pytest.param(Mlp((64,)), 0.97, id="mlp"),
        pytest.param(Convnet((16, 32)), 0.985, id="convnet", marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_defaults_train_a_small_dataset_well(architecture: Mlp | Convnet, least: float) -> None:
    accuracies = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(X))
        test, train = order[: len(X) // 3], order[len(X) // 3 :]
        rows = Rows(X[train], Y[train], loss=LossKind.CROSS_ENTROPY, outputs=10, device="cpu")
        config = TrainingConfig(seed=seed, label_smoothing=DEFAULT_LABEL_SMOOTHING)
        config = replace(config, epochs=default_epochs(len(train), config))
        run = trained(config, rows, replace(SPEC, architecture=architecture))
        run.module.eval()
        answers = run.module(torch.from_numpy(X[test])).argmax(1).numpy()
        accuracies.append(float((answers == Y[test]).mean()))
    assert np.mean(accuracies) >= least


@pytest.mark.parametrize(
    "config",
    [
        TrainingConfig(epochs=4, seed=3),
        TrainingConfig(epochs=4, optimizer=OptimizerKind.SGD, learning_rate=0.05, accumulation=3, batch_size=50),
        TrainingConfig(epochs=6, patience=2, max_gradient_norm=1.0, label_smoothing=0.1, augment=True),
    ],
    ids=["adamw", "sgd-accumulated", "patience-augmented"],
)
@pytest.mark.parametrize("spec", [replace(SPEC, architecture=Mlp((32, 32), dropout=0.3)), SPEC], ids=["dropout", "mlp"])
def test_a_descent_resumed_anywhere_ends_with_the_same_bits(config: TrainingConfig, spec: ModelSpec) -> None:
    whole = trained(config, spec=spec)
    assert weights(trained(config, spec=spec)) == weights(whole)
    broken = descent(config, spec=spec)
    stops = 0
    while True:
        stops += 1
        ended, state = run_one_update(broken)
        if ended:
            break
        torch.manual_seed(12345)  # what another process would begin with
        broken = descent(config, spec=spec)
        broken.restore(state)
    assert stops > 5
    assert weights(broken) == weights(whole)
    assert broken.holdout == whole.holdout


def test_a_run_goes_on_with_a_gpu_that_its_node_has_been_given_meanwhile() -> None:
    _, state = run_one_update(descent(TrainingConfig(epochs=4)))
    later = descent(TrainingConfig(epochs=4))
    later.device = torch.device("cuda")
    later.restore(state)
    assert later.step == state.facts["step"] > 0


def test_another_seed_gives_other_weights() -> None:
    assert weights(trained(TrainingConfig(epochs=1, seed=1))) != weights(trained(TrainingConfig(epochs=1, seed=2)))


def on_the_digits(loss: LossKind, *, in_memory: bool) -> Rows:
    y = np.eye(10, dtype=np.float32)[Y] if loss is LossKind.MSE else Y
    return Rows(X[:400], y[:400], loss=loss, outputs=10, device="cpu", in_memory=in_memory)


@pytest.mark.parametrize("loss", [LossKind.CROSS_ENTROPY, LossKind.BINARY_CROSS_ENTROPY, LossKind.MSE])
def test_rows_read_from_disk_train_like_rows_in_memory(loss: LossKind) -> None:
    ends = []
    for in_memory in (False, True):
        rows = on_the_digits(loss, in_memory=in_memory)
        run = Descent(spec=SPEC, loss=loss, config=TrainingConfig(epochs=2), rows=rows)
        assert run.run(report=lambda _: None)
        ends.append(weights(run))
    assert ends[0] == ends[1]


def test_labels_of_many_classes_are_kept_whole() -> None:
    y = np.arange(400) * 3
    rows = Rows(X[:400], y, loss=LossKind.CROSS_ENTROPY, outputs=1200, device="cpu")
    _, taken = rows.take(torch.tensor([0, 399, 100]))
    assert (taken.dtype, taken.tolist()) == (torch.int64, [0, 1197, 300])


def test_the_order_of_rows_is_for_good() -> None:
    """A run that was begun long ago goes on with the order that it has: another one would need a version."""
    held_out, train = split(1000, share=0.2, seed=5)[::-1]
    x = np.arange(1000, dtype=np.float32).reshape(1000, 1)
    rows = Rows(x, np.zeros((1000, 1), np.float32), loss=LossKind.MSE, outputs=1, device="cpu")
    order = [x.flatten() for x, _ in Batches(rows, train, size=64, seed=5).of_epoch(3, 0)]
    found = torch.cat([held_out, torch.cat(order)]).to(torch.int64).numpy().tobytes()
    assert hashlib.sha256(found).hexdigest()[:16] == "235ae3fdf1ebc917"


PLAIN = TrainingConfig(epochs=3, batch_size=100, holdout_share=0.0, schedule=ScheduleKind.CONSTANT, warmup=0.0)
PLAIN_SGD = replace(PLAIN, optimizer=OptimizerKind.SGD, learning_rate=0.05, weight_decay=0.0, momentum=0.0)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(PLAIN, id="adamw"),
        pytest.param(replace(PLAIN, weight_decay=1.0), id="adamw with decay"),
        pytest.param(PLAIN_SGD, id="sgd"),
        pytest.param(replace(PLAIN_SGD, momentum=0.9), id="momentum"),
        pytest.param(replace(PLAIN_SGD, weight_decay=0.1), id="sgd with decay"),
        pytest.param(replace(PLAIN_SGD, max_gradient_norm=0.1), id="clipped"),
        pytest.param(replace(PLAIN_SGD, label_smoothing=0.2), id="smoothed"),
        pytest.param(replace(PLAIN_SGD, schedule=ScheduleKind.COSINE, warmup=0.5), id="cosine after warm-up"),
    ],
)
def test_the_loop_does_what_the_plain_loop_does(config: TrainingConfig) -> None:
    """One update after another by torch's own unfused optimiser and the same batches, to rounding."""
    rows = digits(250)
    run = descent(config, rows)
    batches: list[tuple[Tensor, Tensor]] = []
    for epoch in range(3):
        batches += run.batches.of_epoch(epoch, 0)
    assert [len(y) for _, y in batches] == [100, 100, 50] * 3
    module = build(SPEC, seed=config.seed)
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(module.parameters(), **settings)
        if config.optimizer is OptimizerKind.ADAMW
        else torch.optim.SGD(module.parameters(), momentum=config.momentum, **settings)
    )
    # 9 updates: 4 warm up, then the cosine.
    cosine = [(k + 1) / 4 for k in range(4)] + [0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(5)]
    for update, (x, y) in enumerate(batches):
        if config.schedule is ScheduleKind.COSINE:
            optimizer.param_groups[0]["lr"] = config.learning_rate * cosine[update]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y, label_smoothing=config.label_smoothing).backward()
        if config.max_gradient_norm:
            gradients = [each.grad for each in module.parameters() if each.grad is not None]
            norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
            assert norm > config.max_gradient_norm  # there is something to clip
            for gradient in gradients:
                gradient *= config.max_gradient_norm / norm
        optimizer.step()
    assert run.run(report=lambda _: None)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(run.module.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_accumulated_steps_follow_the_mean_of_all_their_rows() -> None:
    config = TrainingConfig(
        epochs=3, batch_size=120, holdout_share=0.0, optimizer=OptimizerKind.SGD, learning_rate=0.05, weight_decay=0.0
    )
    # 250 rows: 120, 120 and 10 in one update.
    one = trained(replace(config, batch_size=250), digits(250))
    many = trained(replace(config, accumulation=3), digits(250))
    for name, tensor in one.module.state_dict().items():
        torch.testing.assert_close(many.module.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_each_epoch_has_every_training_row_once_and_no_held_out_one() -> None:
    x = np.arange(1000, dtype=np.float32).reshape(1000, 1)
    rows = Rows(x, np.zeros((1000, 1), np.float32), loss=LossKind.MSE, outputs=1, device="cpu")
    run = Descent(
        spec=ModelSpec((1,), 1, Linear()),
        loss=LossKind.MSE,
        config=TrainingConfig(batch_size=64, holdout_share=0.2),
        rows=rows,
    )
    epochs = [torch.cat([x for x, _ in run.batches.of_epoch(epoch, 0)]).flatten().tolist() for epoch in range(2)]
    train, held_out = split(1000, share=0.2, seed=0)
    assert sorted(epochs[0]) == sorted(epochs[1]) == train.tolist()
    assert epochs[0] != epochs[1]
    assert len(held_out) == 200
    assert set(held_out.tolist()).isdisjoint(train.tolist())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step() -> None:
    config = TrainingConfig(epochs=50, learning_rate=100.0, optimizer=OptimizerKind.SGD, warmup=0.0, seed=1)
    rows = Rows(
        X[:200].astype(np.float32) * 1e6,
        Y[:200].astype(np.float32),
        loss=LossKind.MSE,
        outputs=1,
        device="cpu",
    )
    run = Descent(spec=ModelSpec((8, 8), 1, Linear()), loss=LossKind.MSE, config=config, rows=rows)
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step (\d+)") as caught:
        run.run(report=lambda _: None)
    step = int(str(caught.value).split("step ")[1].split(":")[0])
    # The step named is the first: one step less, and the losses are finite.
    shorter = Descent(spec=ModelSpec((8, 8), 1, Linear()), loss=LossKind.MSE, config=config, rows=rows)
    losses = []
    for x, y in (batch for epoch in range(50) for batch in shorter.batches.of_epoch(epoch, 0)):
        if len(losses) == step:
            break
        loss = torch.nn.functional.mse_loss(shorter.module(x), y)
        loss.backward()
        shorter._optimizer.param_groups[0]["lr"] = shorter.plan.learning_rate(len(losses))
        shorter._optimizer.step()
        shorter._optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses[:-1]).all()
    assert not np.isfinite(losses[-1])


def test_a_regression_finds_its_line() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(500, 3)).astype(np.float32)
    y = x @ np.array([[1.0, 0.0], [-2.0, 0.5], [0.25, 3.0]], np.float32) + 0.5
    rows = Rows(x, y, loss=LossKind.MSE, outputs=2, device="cpu")
    run = Descent(
        spec=ModelSpec((3,), 2, Linear()),
        loss=LossKind.MSE,
        config=TrainingConfig(epochs=60, learning_rate=0.05, weight_decay=0.0),
        rows=rows,
    )
    assert run.run(report=lambda _: None)
    assert run.holdout is not None
    assert run.holdout.loss < 1e-3
    torch.testing.assert_close(run.module.state_dict()["head.bias"], torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)


def test_patience_ends_early_and_keeps_the_best_weights() -> None:
    generator = np.random.default_rng(0)
    # Labels by chance: nothing can be learned of the held-out rows.
    rows = Rows(X[:300], generator.integers(0, 10, 300), loss=LossKind.CROSS_ENTROPY, outputs=10, device="cpu")
    points: list[Progress] = []
    run = descent(TrainingConfig(epochs=500, patience=3), rows)
    assert run.run(report=points.append, clock=ticking(1.0))
    assert run.step < run.plan.total_steps / 5
    assert run.holdout is not None
    assert run.holdout.correct == max(point.holdout_correct for point in points)
    assert run.holdout == run.evaluate(run.module)


def test_reports_come_by_the_clock_and_with_the_last_step() -> None:
    points: list[Progress] = []
    run = descent(TrainingConfig(epochs=20))
    # 6 steps of 64 rows an epoch, each 30 ms long: every fourth is due.
    assert run.run(report=points.append, clock=ticking(0.03))
    assert len(points) < 120 / 3
    assert points[-1].step == points[-1].total_steps == 120
    assert points[-1].eta_s == 0
    assert points[-1].holdout_total == 40
    assert all(np.isfinite(point.loss) for point in points)


def test_checkpoints_come_by_the_clock() -> None:
    steps: list[int] = []
    run = descent(TrainingConfig(epochs=20, checkpoint_interval_s=1))
    assert run.run(report=lambda _: None, checkpoint=lambda: steps.append(run.step), clock=ticking(0.05))
    assert 3 <= len(steps) <= 120 * 0.05 + 1
    assert steps == sorted(set(steps))


def test_checkpoints_come_by_steps_too_between_two_updates() -> None:
    steps: list[int] = []
    config = TrainingConfig(epochs=20, checkpoint_interval_steps=7, accumulation=3)
    run = descent(config)  # 6 steps an epoch, 2 updates
    assert run.run(report=lambda _: None, checkpoint=lambda: steps.append(run.step), clock=lambda: 0.0)
    assert steps == list(range(9, 121, 9))


def test_the_learning_rate_warms_up_and_comes_down_to_zero() -> None:
    plan = Plan(rows=640, config=TrainingConfig(epochs=20, batch_size=64, warmup=0.1, learning_rate=1.0))
    rates = [plan.learning_rate(update) for update in range(plan.total_updates)]
    assert plan.total_updates == 200
    assert rates[:20] == pytest.approx([(update + 1) / 20 for update in range(20)])
    assert rates[20] == 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] < 1e-3


def test_an_image_is_shifted_by_a_pixel_at_most() -> None:
    from services.trainer.descent.augmentation import shifted

    x = torch.zeros(200, 8, 8, dtype=torch.uint8)
    x[:, 4, 4] = 7
    torch.manual_seed(0)
    moved = shifted(x)
    assert moved.shape == x.shape
    assert moved.dtype == x.dtype
    places = {tuple(place) for place in moved.nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert int(moved.sum()) == 1400


def test_smoothing_is_part_of_the_objective_but_not_of_the_held_out_loss() -> None:
    logits, labels = torch.tensor([[4.0, 0.0]]), torch.tensor([0])
    assert objective(LossKind.CROSS_ENTROPY, 0.2)(logits, labels) > objective(LossKind.CROSS_ENTROPY, 0.0)(
        logits, labels
    )


def test_a_convnet_trains_on_rows_of_uint16() -> None:
    rows = Rows(X[:200].astype(np.uint16), Y[:200], loss=LossKind.CROSS_ENTROPY, outputs=10, device="cpu")
    run = trained(TrainingConfig(epochs=10), rows, replace(SPEC, architecture=Convnet((8,))))
    assert run.holdout is not None
    assert run.holdout.correct > run.holdout.total / 2
