"""The reference for disputes gives what a validator counts, as a process of its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tiltyard.counting import Metric, Tally
from tiltyard.datasets import write_dataset
from tiltyard.models import build, save_weights
from tiltyard.models.reference import predictions
from tiltyard.modelspec import Mlp, ModelSpec, Onnx
from tiltyard.predictions import block_hashes
from tiltyard.type.v1 import task_pb2
from tiltyard.wire import model_spec_to_proto

ROWS = 700


@pytest.mark.parametrize("metric", [Metric.ACCURACY, Metric.WITHIN_BOUND])
def test_its_blocks_are_those_that_a_tally_hashes(tmp_path: Path, metric: Metric) -> None:
    spec = ModelSpec((6,), 3, Mlp((8,)), input_scale=1 / 255)
    dice = np.random.default_rng(0)
    x = dice.integers(0, 256, (ROWS, 6)).astype(np.uint8)
    within = metric is Metric.WITHIN_BOUND
    y = dice.normal(size=(ROWS, 3)).astype(np.float32) if within else dice.integers(0, 3, ROWS)
    model, data, out = tmp_path / "model.safetensors", tmp_path / "data.safetensors", tmp_path / "predictions"
    network = build(spec, seed=1)
    save_weights(network, model)
    write_dataset(data, x, y)
    config = task_pb2.TaskConfig(models=[model_spec_to_proto(spec)])
    if within:
        config.metric, config.bound = task_pb2.METRIC_WITHIN_BOUND, 1.0
    done = subprocess.run(
        [sys.executable, "-m", "tiltyard.models.reference", str(data), str(model), str(out), "0"],
        input=config.SerializeToString(),
        stdout=subprocess.PIPE,
        check=True,
    )
    assert int(done.stdout.splitlines()[-1]) == ROWS
    tally = Tally(metric, bound=1.0)
    with torch.inference_mode():
        tally.add(network.eval()(torch.from_numpy(x)).numpy(), y)
    assert 0 < tally.counts().correct < ROWS
    assert tuple(block_hashes(out.read_bytes())) == tally.prediction_blocks()


def test_an_onnx_graph_is_recomputed_like_any_model(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    x = np.random.default_rng(1).integers(0, 256, (ROWS, 6)).astype(np.uint8)
    write_dataset(tmp_path / "data", x, np.zeros(ROWS, np.int64))
    config = task_pb2.TaskConfig(models=[model_spec_to_proto(ModelSpec((6,), 3, Onnx()))])
    found = predictions(config, 0, tmp_path / "data", tmp_path / "model.onnx")
    assert np.array_equal(found, (x.astype(np.float32) @ weight).argmax(axis=1))
