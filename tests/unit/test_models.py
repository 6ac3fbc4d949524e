"""Torch modules of a spec: their tensors are the spec's, weights go in and out, and they learn."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tiltyard.models import Network, build, load_model, load_weights, save_weights
from tiltyard.modelspec import (
    Activation,
    Convnet,
    FaultCode,
    Linear,
    Mlp,
    ModelFault,
    ModelSpec,
    Onnx,
    Resnet,
    Transformer,
    check_safetensors,
    count_parameters,
    flops,
    tensor_shapes,
    to_json,
    validate,
)

SPECS = [
    ModelSpec((5,), 3, Linear()),
    ModelSpec((3, 4, 4), 2, Mlp((7, 6), Activation.SILU, 0.5)),
    ModelSpec((1, 1), 2, Convnet((4, 8))),
    ModelSpec((1, 7), 2, Convnet((2, 3), 5, (9,), Activation.TANH)),
    ModelSpec((3, 33, 18), 10, Convnet((4, 8, 8), 3, (), Activation.GELU, 0.2)),
    ModelSpec((1, 1), 2, Resnet((1, 1), 2)),
    ModelSpec((3, 9, 14), 5, Resnet((2, 1, 1), 4)),
    ModelSpec((64, 65), 3, Resnet((1, 2), 2, bottleneck=True)),
    ModelSpec((7,), 3, Transformer(16, 12, 2, 3, 20, 0.1)),
    ModelSpec((1,), 2, Transformer(16, 8, 1, 8)),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_tensors_are_those_of_the_spec(spec: ModelSpec) -> None:
    module = build(spec, seed=1)
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == tensor_shapes(spec)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert validate(spec, max_parameters=count_parameters(spec)) == []
    assert count_parameters(spec) == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_operations_known_before_building_are_those_that_torch_counts(spec: ModelSpec) -> None:
    module, rows = build(spec, seed=1).eval(), torch.ones(3, *spec.input_shape)
    # Only here does torch's counter know what attention costs on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        module(rows)
    assert 3 * flops(spec) == counter.get_total_flops()


def test_a_token_outside_the_vocabulary_counts_as_its_nearest() -> None:
    module = build(ModelSpec((3,), 2, Transformer(5, 8, 1, 2)), seed=1).eval()
    assert torch.equal(module(torch.tensor([[-7, 2, 99]])), module(torch.tensor([[0, 2, 4]])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_also_one_that_no_integer_holds(dtype: torch.dtype) -> None:
    module = build(ModelSpec((3,), 2, Transformer(70_000, 8, 1, 2)), seed=1).eval()
    rows = torch.tensor([[-math.inf, 2.9, 1e30]], dtype=dtype)
    assert torch.equal(module(rows), module(torch.tensor([[0, 2, 69_999]])))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.int64, torch.uint16])
def test_every_dtype_gives_the_same_logits_and_stays_as_it_was(spec: ModelSpec, dtype: torch.dtype) -> None:
    module = build(spec, seed=1).eval()
    rows = torch.randint(0, 16, (4, *spec.input_shape), generator=torch.Generator().manual_seed(0))
    given = rows.to(dtype)
    with torch.inference_mode():
        logits = module(given)
        torch.testing.assert_close(logits, module(rows.float()), rtol=0, atol=0)
    assert logits.shape == (4, spec.outputs)
    assert torch.equal(given.long(), rows)


def test_scale_and_offset_are_inside_the_model() -> None:
    plain = build(ModelSpec((5,), 3, Linear()), seed=1)
    scaled = build(ModelSpec((5,), 3, Linear(), 1 / 16, -0.5), seed=1)
    rows = torch.arange(10, dtype=torch.uint8).reshape(2, 5)
    assert torch.equal(scaled(rows), plain(rows.float() * (1 / 16) - 0.5))
    assert torch.equal(scaled(rows), scaled(rows.float()))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_spec_and_seed_fix_every_bit_and_leave_the_global_state_alone(spec: ModelSpec) -> None:
    before = torch.random.get_rng_state()
    one, same, other = build(spec, seed=7), build(spec, seed=7), build(spec, seed=8)
    assert torch.equal(torch.random.get_rng_state(), before)
    for left, right in zip(one.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(build(spec, seed=None).head.weight, build(spec, seed=None).head.weight)


WITHOUT_VECTORS = """
import hashlib, json, sys, torch
from tiltyard.models import build
from tiltyard.modelspec import from_json
print(torch.backends.cpu.get_cpu_capability())
for raw in json.loads(sys.argv[1]):
    weights = b"".join(tensor.numpy().tobytes() for tensor in build(from_json(raw), seed=7).state_dict().values())
    print(hashlib.sha256(weights).hexdigest())
"""


def test_fresh_weights_are_the_same_on_processors_without_vector_instructions() -> None:
    command = [sys.executable, "-c", WITHOUT_VECTORS, json.dumps([to_json(spec) for spec in SPECS])]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    capability, *expected = done.stdout.split()
    assert capability == "DEFAULT"
    for spec, digest in zip(SPECS, expected, strict=True):
        weights = b"".join(tensor.numpy().tobytes() for tensor in build(spec, seed=7).state_dict().values())
        assert hashlib.sha256(weights).hexdigest() == digest


def test_fresh_weights_fill_their_bounds() -> None:
    module = build(ModelSpec((64,), 10, Transformer(5000, 64, 1, 4)), seed=1)
    for weight, bound in ((module.layers[0].widen.weight, 1 / 8), (module.tokens.weight, 3**0.5 * 0.02)):
        assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert weight.mean().item() == pytest.approx(0, abs=bound / 50)
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


def test_an_onnx_graph_is_no_module_of_ours() -> None:
    with pytest.raises(ValueError, match="onnx"):
        build(ModelSpec((3, 8, 8), 2, Onnx()), seed=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_weights_go_out_and_come_back(spec: ModelSpec, tmp_path: Path) -> None:
    module, path = build(spec, seed=3).eval(), tmp_path / "model.safetensors"
    save_weights(module, path)
    first = path.read_bytes()
    save_weights(module, path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]
    check_safetensors(lambda offset, n: first[offset : offset + n], len(first), spec, max_bytes=len(first))
    rows = torch.ones(2, *spec.input_shape)
    again = build(spec, seed=4).eval()
    load_weights(again, path)
    assert torch.equal(again(rows), module(rows))
    assert torch.equal(load_model(spec, path)(rows), module(rows))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Layers this small gain nothing from a second thread, and lose much to it where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file(tensors, path)
    return path


def test_half_precision_weights_are_loaded_as_float32(tmp_path: Path) -> None:
    module = build(SPECS[0], seed=1)
    halves = {name: tensor.bfloat16() for name, tensor in module.state_dict().items()}
    loaded = load_model(SPECS[0], _saved(tmp_path / "w", halves))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.head.weight, halves["head.weight"].float())


def test_weights_that_do_not_fit_leave_the_module_alone(tmp_path: Path) -> None:
    module = build(SPECS[0], seed=1)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    good = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    path = tmp_path / "w"
    wrong = {
        FaultCode.SHAPE_MISMATCH: [
            {"head.weight": good["head.weight"]},
            {**good, "more": torch.zeros(1)},
            {**good, "head.bias": torch.zeros(4)},
        ],
        FaultCode.BAD_FORMAT: [{**good, "head.bias": torch.zeros(3, dtype=torch.int64)}],
    }
    for code, cases in wrong.items():
        for tensors in cases:
            with pytest.raises(ModelFault) as caught:
                load_weights(module, _saved(path, tensors))
            assert caught.value.code is code
    for raw in (b"", b"\x80\x04not a tensor file", json.dumps({}).encode()):
        path.write_bytes(raw)
        with pytest.raises(ModelFault) as caught:
            load_weights(module, path)
        assert caught.value.code is FaultCode.BAD_FORMAT
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def _trained(spec: ModelSpec, x: torch.Tensor, y: torch.Tensor, *, epochs: int) -> Network:
    module = build(spec, seed=0).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
            optimizer.step()
    return module.eval()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("architecture", "least"),
    [(Linear(), 0.93), (Mlp((64,)), 0.95), (Convnet((16, 32)), 0.97), (Resnet((1, 1), 8), 0.95)],
    ids=str,
)
def test_each_architecture_learns_the_digits(architecture: Linear | Mlp | Convnet | Resnet, least: float) -> None:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(digits.images, dtype=torch.uint8)[order], torch.tensor(digits.target)[order]
    module = _trained(ModelSpec((8, 8), 10, architecture, 1 / 16), x[:1400], y[:1400], epochs=15)
    assert (module(x[1400:]).argmax(1) == y[1400:]).float().mean().item() > least


@pytest.mark.usefixtures("one_thread")
def test_an_encoder_learns_what_only_the_order_of_tokens_tells() -> None:
    x = torch.randint(1, 6, (1000, 6), generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > x[:, 5]).long()
    module = _trained(ModelSpec((6,), 2, Transformer(6, 16, 1, 2)), x[:800], y[:800], epochs=20)
    assert (module(x[800:]).argmax(1) == y[800:]).float().mean().item() > 0.93
