"""Losses and ways of running a step: each learns, and none changes what an update is."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from services.trainer.config import LossKind, OptimizerKind, Precision, TrainingConfig
from services.trainer.descent.acceleration import Acceleration, is_out_of_memory
from services.trainer.descent.checkpoints import load_checkpoint, save_checkpoint
from services.trainer.descent.descent import Descent
from services.trainer.descent.objectives import objective
from services.trainer.descent.rows import Rows
from tiltyard.modelspec import Architecture, Convnet, Linear, Mlp, ModelSpec, Resnet, Transformer

DIGITS = load_digits()
X = DIGITS.images[:400].astype(np.uint8)
Y = DIGITS.target[:400].astype(np.int64)
SPEC = ModelSpec((8, 8), 10, Mlp((32,)), 1 / 16)
CONFIG = TrainingConfig(epochs=6, seed=2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def descent(
    config: TrainingConfig = CONFIG,
    *,
    spec: ModelSpec = SPEC,
    loss: LossKind = LossKind.CROSS_ENTROPY,
    y: np.ndarray = Y,
    **more: Any,
) -> Descent:
    rows = Rows(X, y, loss=loss, outputs=spec.outputs, device="cpu")
    return Descent(spec=spec, loss=loss, config=config, rows=rows, **more)


def share_right(run: Descent) -> float:
    assert run.run(report=lambda _: None)
    assert run.holdout is not None
    return run.holdout.correct / run.holdout.total


def assert_same_weights(one: Descent, other: Descent, *, tolerance: float) -> None:
    for name, tensor in one.module.state_dict().items():
        torch.testing.assert_close(other.module.state_dict()[name], tensor, rtol=tolerance, atol=tolerance)


def test_binary_cross_entropy_takes_class_labels() -> None:
    config = replace(CONFIG, epochs=60, learning_rate=0.01)
    assert share_right(descent(config, loss=LossKind.BINARY_CROSS_ENTROPY)) > 0.7
    even = (Y % 2).astype(np.int64)
    assert share_right(descent(config, loss=LossKind.BINARY_CROSS_ENTROPY, y=even, spec=replace(SPEC, outputs=1))) > 0.8


def test_binary_cross_entropy_takes_several_targets_at_once() -> None:
    y = np.stack([Y % 2, Y > 4], axis=1).astype(np.float32)
    run = descent(replace(CONFIG, epochs=20), loss=LossKind.BINARY_CROSS_ENTROPY, y=y, spec=replace(SPEC, outputs=2))
    assert run.run(report=lambda _: None)
    assert run.holdout is not None
    assert run.holdout.correct == 0
    assert run.holdout.loss < 0.5  # a coin's is 0.69


def test_huber_minds_an_outlier_less_than_the_square() -> None:
    answers, targets = torch.tensor([[0.5], [100.0]]), torch.zeros(2, 1)
    assert objective(LossKind.HUBER, 0.0)(answers, targets).item() == pytest.approx((0.125 + 99.5) / 2)
    y = (Y * 0.1).astype(np.float32)
    y[:10] = 1e4
    spec = ModelSpec((8, 8), 1, Linear(), 1 / 16)
    found = {}
    for loss in (LossKind.HUBER, LossKind.MSE):
        run = descent(replace(CONFIG, epochs=40, holdout_share=0.0), loss=loss, y=y, spec=spec)
        assert run.run(report=lambda _: None)
        answers = run.module(torch.from_numpy(X[10:])).detach()[:, 0]
        found[loss] = float((answers - torch.from_numpy(y[10:])).abs().mean())
    assert found[LossKind.HUBER] < found[LossKind.MSE]


def test_a_weight_of_zero_leaves_a_class_out() -> None:
    run = descent(replace(CONFIG, epochs=20, class_weights=(0.0,) + (1.0,) * 9))
    assert run.run(report=lambda _: None)
    answers = run.module(torch.from_numpy(X)).argmax(1).numpy()
    assert (answers == 0).sum() == 0
    assert (answers == Y)[Y > 0].mean() > 0.9


def test_class_weights_multiply_their_rows_of_the_mean() -> None:
    logits, labels = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1])
    each = nn.functional.cross_entropy(logits, labels, reduction="none")
    weighted = objective(LossKind.CROSS_ENTROPY, 0.0, class_weights=torch.tensor([3.0, 0.5]))(logits, labels)
    torch.testing.assert_close(weighted, (each * torch.tensor([3.0, 0.5, 0.5, 3.0, 0.5])).mean())


@pytest.mark.parametrize(
    "architecture", [Mlp((32,)), Convnet((8,)), Resnet((1,), 4), Transformer(17, 8, 1, 2)], ids=str
)
def test_bfloat16_learns_and_the_model_stays_float32(architecture: Architecture) -> None:
    config = replace(CONFIG, epochs=3, precision=Precision.BFLOAT16)
    spec, x = ModelSpec((8, 8), 10, architecture, 1 / 16), X
    if isinstance(architecture, Transformer):
        spec, x = ModelSpec((64,), 10, architecture), X.reshape(-1, 64)
    rows = Rows(x, Y, loss=LossKind.CROSS_ENTROPY, outputs=10, device="cpu")
    run = Descent(spec=spec, loss=LossKind.CROSS_ENTROPY, config=config, rows=rows)
    before = run.evaluate(run.module)
    assert run.run(report=lambda _: None)
    assert before is not None
    assert run.holdout is not None
    assert run.holdout.loss < before.loss
    assert {tensor.dtype for tensor in run.module.state_dict().values()} == {torch.float32}


def test_channels_last_and_compilation_change_no_update_but_by_rounding() -> None:
    spec, config = replace(SPEC, architecture=Convnet((8,))), replace(CONFIG, epochs=2)
    plain = descent(config, spec=spec)
    traced: list[torch.fx.GraphModule] = []

    def trace(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    # torch's own compiler as far as its graph: what is made of that takes half a minute and a C++ compiler.
    compiler = functools.partial(torch.compile, backend=trace)
    fast = descent(config, spec=spec, acceleration=Acceleration(channels_last=True, compiler=compiler))
    weight = fast.module.get_parameter("blocks.0.convolution.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.run(report=lambda _: None)
    assert fast.run(report=lambda _: None)
    # Whole, without a break; at most once more for the epoch's last batch, whose size differs.
    assert 1 <= len(traced) <= 2
    assert_same_weights(plain, fast, tolerance=1e-3)


@pytest.mark.parametrize("optimizer", list(OptimizerKind))
def test_channels_last_goes_on_from_a_file_as_if_it_had_not_stopped(tmp_path: Path, optimizer: OptimizerKind) -> None:
    spec = replace(SPEC, architecture=Convnet((4, 4)))
    config = replace(CONFIG, epochs=1, optimizer=optimizer, momentum=0.9)

    def channels_last() -> Descent:
        return descent(config, spec=spec, acceleration=Acceleration(channels_last=True))

    whole, broken, resumed = channels_last(), channels_last(), channels_last()
    assert whole.run(report=lambda _: None)
    assert not broken.run(report=lambda _: broken.stop())
    save_checkpoint(tmp_path / "c", broken.state())
    found = load_checkpoint(tmp_path / "c")
    assert found is not None
    resumed.restore(found)
    assert resumed.run(report=lambda _: None)
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], tensor)


def test_a_configuration_chooses_the_acceleration() -> None:
    convnet, cuda = replace(SPEC, architecture=Convnet((8,))), torch.device("cuda")
    assert Acceleration.of(CONFIG, convnet, torch.device("cpu")) == Acceleration()
    assert Acceleration.of(CONFIG, convnet, cuda) == Acceleration("cuda", channels_last=True)
    assert Acceleration.of(CONFIG, SPEC, cuda) == Acceleration("cuda")
    asked = Acceleration.of(replace(CONFIG, precision=Precision.BFLOAT16, compile=True), SPEC, cuda)
    assert asked == Acceleration("cuda", bfloat16=True, compiler=torch.compile)


class Scarce:
    """A device that holds so many rows at a time: more, and its allocator raises."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.seen: list[int] = []

    def __call__(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            self.seen.append(len(x))
            if len(x) > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            answer: Tensor = module(x)
            return answer

        return run


@pytest.mark.parametrize("accumulation", [1, 3])
def test_out_of_memory_halves_what_goes_through_at_once_and_says_so(accumulation: int) -> None:
    config = replace(CONFIG, accumulation=accumulation, batch_size=60, class_weights=(2.0,) * 10)
    whole = descent(config)
    scarce, warnings = Scarce(20), list[str]()
    run = descent(config, acceleration=Acceleration(compiler=scarce), warn=warnings.append)
    assert whole.run(report=lambda _: None)
    assert run.run(report=lambda _: None)
    assert scarce.seen[:3] == [60, 30, 15]
    assert max(scarce.seen[2:]) == 15
    assert run.step == whole.step
    assert len(warnings) == 2
    assert "no 60 rows at step 1" in warnings[0]
    assert "in pieces of 15" in warnings[1]
    assert_same_weights(whole, run, tolerance=1e-3)
    # One that resumes does not try what is known not to fit.
    again = Scarce(20)
    resumed = descent(config, acceleration=Acceleration(compiler=again))
    resumed.restore(run.state())
    resumed.step = 0
    assert resumed.run(report=lambda _: None)
    assert max(again.seen) == 15


def test_memory_that_runs_out_in_the_middle_of_an_update_begins_it_anew() -> None:
    config = replace(CONFIG, accumulation=3, batch_size=40)
    whole, scarce = descent(config), Scarce(40)
    run = descent(config, acceleration=Acceleration(compiler=scarce))

    def backward_later(module: nn.Module, _inputs: object, _outputs: object) -> None:
        if len(scarce.seen) == 5:  # the second step of the second update
            scarce.rows = 20
            raise torch.OutOfMemoryError("CUDA out of memory")

    run.module.register_forward_hook(backward_later)
    assert whole.run(report=lambda _: None)
    assert run.run(report=lambda _: None)
    assert scarce.seen[:7] == [40, 40, 40, 40, 40, 20, 20]
    assert run.step == whole.step
    assert_same_weights(whole, run, tolerance=1e-3)


def test_held_out_rows_go_through_in_halves_where_memory_does_not_hold_many() -> None:
    config, warnings = replace(CONFIG, epochs=2, holdout_share=0.5, batch_size=20), list[str]()
    whole, run = descent(config), descent(config, warn=warnings.append)
    seen: list[int] = []

    def scarce(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(len(inputs[0]))
        if seen[-1] > 70:
            raise torch.OutOfMemoryError("CUDA out of memory")

    run.module.register_forward_pre_hook(scarce)
    assert whole.run(report=lambda _: None)
    assert run.run(report=lambda _: None)
    assert whole.holdout is not None
    assert run.holdout is not None
    assert (run.holdout.correct, run.holdout.total) == (whole.holdout.correct, 200)
    assert run.holdout.loss == pytest.approx(whole.holdout.loss, rel=1e-5)
    assert warnings[-1] == "memory does not suffice to evaluate: 64 held-out rows now go at once"
    assert [rows for rows in seen if rows > 20] == [200, 200, 128, 64, 64, 64, 64, 64, 64]
    assert run.module.training


def test_one_row_that_does_not_fit_ends_the_run() -> None:
    run = descent(acceleration=Acceleration(compiler=Scarce(0)))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run.run(report=lambda _: None)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_trains_in_bfloat16_compiled_and_from_disk() -> None:
    spec, config = replace(SPEC, architecture=Convnet((16,))), replace(CONFIG, precision=Precision.BFLOAT16)
    rows = Rows(X, Y, loss=LossKind.CROSS_ENTROPY, outputs=10, device="cuda:0", in_memory=False)
    run = Descent(
        spec=spec,
        loss=LossKind.CROSS_ENTROPY,
        config=replace(config, epochs=20, compile=True),
        rows=rows,
        device="cuda:0",
    )
    assert share_right(run) > 0.7
    assert run.device_memory_bytes() > 0
