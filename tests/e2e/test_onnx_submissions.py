"""ONNX models in real, confined model servers: right counts for good ones, a named fault for each bad one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from services.modelserver.spawn import READY_TIMEOUT_S, Child, Limits, Nursery, NurseryDown
from services.validator.assignments import Order
from services.validator.children import NurseryAttempts
from services.validator.evaluation import Job, ServerLost, find
from services.validator.runs import Fault, Progress
from tiltyard.counting import Tally
from tiltyard.models import build
from tiltyard.models.onnxmodel import OnnxNetwork
from tiltyard.modelspec import Mlp, ModelSpec, Onnx

SPEC = ModelSpec((8, 8), 10, Onnx(), input_scale=1 / 255)
X = np.random.default_rng(0).integers(0, 256, (5000, 8, 8), dtype=np.uint8)
Y = np.random.default_rng(1).integers(0, 10, 5000)


def model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", None])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def perceptron() -> tuple[bytes, torch.nn.Module]:
    """The same network for both runtimes."""
    network = build(ModelSpec((8, 8), 10, Mlp((32,)), input_scale=1 / 255), seed=0).eval()
    weights = {name.replace(".", "_"): tensor.numpy() for name, tensor in network.state_dict().items()}
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Gemm", ["f", "hidden_0_weight", "hidden_0_bias"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "head_weight", "head_bias"], ["y"], transB=1),
    ]
    return model(nodes, weights), network


def flat_product(weights: np.ndarray) -> bytes:
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    return model(nodes, {"w": weights.astype(np.float32)})


def greedy() -> bytes:
    """Few weights, and gigabytes between its layers."""
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Tile", ["f", "times"], ["t"]),
        helper.make_node("ReduceSum", ["t", "axis"], ["s"], keepdims=1),
        helper.make_node("MatMul", ["s", "w"], ["y"]),
    ]
    weights = {"times": np.array([1, 3500]), "axis": np.array([1]), "w": np.ones((1, 10), np.float32)}
    return model(nodes, weights)


def endless() -> bytes:
    """Goes round a quintillion times."""
    state = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("a", "b")]
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Sin", ["a"], ["b"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            state[0],
        ],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, []), state[1]],
    )
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["h"]),
        helper.make_node("Loop", ["rounds", "", "h"], ["y"], body=body),
    ]
    return model(nodes, {"rounds": np.array(1 << 60), "w": np.ones((64, 10), np.float32)})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "d"
    save_file({"x": X, "y": Y}, path)
    return path


@pytest.fixture
async def attempts(tmp_path: Path) -> AsyncIterator[NurseryAttempts]:
    async with Nursery() as nursery:
        made = NurseryAttempts(nursery, folder=tmp_path / "children", threads=0, concurrency=1)
        yield made
        made.close()


def job(tmp_path: Path, dataset: Path, content: bytes, *, max_cpu_s: float = 60) -> Job:
    path = tmp_path / "submitted"
    path.write_bytes(content)
    order = Order(
        dataset_digest="",
        dataset_bytes=0,
        model_digest="",
        model_bytes=0,
        spec=SPEC,
        max_cpu_s=max_cpu_s,
        max_memory_bytes=1 << 29,
    )
    return Job(order, dataset, path)


async def test_counts_equal_those_of_the_same_network_in_torch(
    attempts: NurseryAttempts, dataset: Path, tmp_path: Path
) -> None:
    content, network = perceptron()
    finding = await find(job(tmp_path, dataset, content), attempts, Progress())
    tally = Tally()
    with torch.inference_mode():
        tally.add(network(torch.from_numpy(X)).numpy(), Y)
    assert finding.counts is not None
    assert (finding.counts.correct, finding.counts.total) == (tally.counts().correct, len(Y))
    assert finding.prediction_blocks == tally.prediction_blocks()


@pytest.mark.parametrize(
    ("content", "fault", "text"),
    [
        (flat_product(np.full((64, 10), np.nan)), Fault.NAN_OUTPUT, "row 0"),
        # The file leaves the number of outputs open; the answer does not.
        (flat_product(np.ones((64, 9))), Fault.SHAPE_MISMATCH, "9"),
        # More numbers than a message holds.
        (flat_product(np.ones((64, 5000))), Fault.SHAPE_MISMATCH, "[4096, 5000]"),
        (flat_product(np.ones((63, 10))), Fault.BAD_FORMAT, "does not load"),
        (greedy(), Fault.OUT_OF_MEMORY, "memory"),
        (endless(), Fault.TOO_SLOW, "CPU"),
        (b"no graph", Fault.BAD_FORMAT, ""),
    ],
)
async def test_each_bad_graph_has_its_fault(
    attempts: NurseryAttempts, dataset: Path, tmp_path: Path, content: bytes, fault: Fault, text: str
) -> None:
    finding = await find(job(tmp_path, dataset, content, max_cpu_s=3), attempts, Progress())
    assert (finding.fault, finding.counts) == (fault, None), finding.detail
    assert text in finding.detail


async def test_a_model_that_fits_on_one_core_fits_on_many(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    # 400 MB between its layers for each batch of 4096 rows, of the 512 MB that it may have.
    weights = {
        name: rng.normal(size=size).astype(np.float32) for name, size in (("w", (64, 25_000)), ("v", (25_000, 10)))
    }
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    data = tmp_path / "d"
    save_file({"x": np.tile(X, (4, 1, 1))[:16_384], "y": np.tile(Y, 4)[:16_384]}, data)
    wide = job(tmp_path, data, model(nodes, weights))
    findings = []
    for cores in (1, 4):
        async with Nursery() as nursery:
            made = NurseryAttempts(nursery, folder=tmp_path / "children", threads=cores, concurrency=1)
            findings.append(await find(wide, made, Progress()))
            made.close()
    assert findings[0].counts is not None, findings[0].detail
    assert findings[0].counts == findings[1].counts


class LoadsForLong(Nursery):
    """A nursery whose children are not ready when `spawn` asks; how long it would wait is told in the error."""

    async def spawn(self, folder: Path, limits: Limits, *, timeout_s: float = READY_TIMEOUT_S) -> Child:
        raise NurseryDown(f"a child did not serve within {timeout_s:g} s")


@pytest.mark.parametrize(("max_cpu_s", "waited"), [(5, "120 s"), (600, "1200 s")])
async def test_a_load_is_waited_for_until_the_limit_of_cpu_time_ends_it(
    dataset: Path, tmp_path: Path, max_cpu_s: float, waited: str
) -> None:
    made = NurseryAttempts(LoadsForLong(), folder=tmp_path / "children", threads=1, concurrency=1)
    with pytest.raises(ServerLost, match=waited):
        await made.attempt(job(tmp_path, dataset, perceptron()[0], max_cpu_s=max_cpu_s), Progress())
    made.close()


def test_products_of_small_integers_are_exact_on_every_processor(tmp_path: Path) -> None:
    path = tmp_path / "m"
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Cast", ["f"], ["u"], to=TensorProto.UINT8),
        helper.make_node("MatMulInteger", ["u", "w"], ["i"]),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
    ]
    path.write_bytes(model(nodes, {"w": np.full((64, 10), 127, np.int8)}))
    network, _ = OnnxNetwork.load(ModelSpec((8, 8), 10, Onnx()), path, max_bytes=1 << 20, max_parameters=1 << 20)
    answered = network(torch.full((3, 8, 8), 255, dtype=torch.uint8))
    # Two such products are over the range of 16 bits, to which some processors would clamp them.
    assert (answered == 64 * 255 * 127).all()
    # The one that runs this test may be none of them.
    entry = network._session.get_session_options().get_session_config_entry("session.x64quantprecision")
    assert entry == "1"
