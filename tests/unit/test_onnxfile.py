"""ONNX files checked without running them; the `onnx` package writes them and says what is good."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tiltyard.modelfile import check_model_file
from tiltyard.modelspec import FaultCode, Mlp, ModelFault, ModelSpec, Onnx, validate
from tiltyard.onnxfile import MAX_NESTING, OnnxStructure, check_onnx

SPEC = ModelSpec((4, 2), 3, Onnx())


def graph(*, width: int = 5) -> onnx.ModelProto:
    """Flatten, a hidden layer, a head."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(size=(8, width)).astype(np.float32), "w"),
        numpy_helper.from_array(rng.normal(size=(width, 3)).astype(np.float32), "v"),
    ]
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    whole = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        weights,
    )
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def check(content: bytes, spec: ModelSpec = SPEC, *, max_bytes: int = 1 << 20, max_parameters: int = 1000):
    return check_onnx(
        lambda offset, n: content[offset : offset + n],
        len(content),
        spec,
        max_bytes=max_bytes,
        max_parameters=max_parameters,
    )


def test_parameters_and_nodes_are_counted_without_running_it() -> None:
    model = graph()
    onnx.checker.check_model(model)
    assert check(model.SerializeToString()) == OnnxStructure(parameters=8 * 5 + 5 * 3, nodes=4, opset=17)


def test_weights_are_stepped_over() -> None:
    content = graph(width=1 << 16).SerializeToString()
    read = []

    def reading(offset: int, n: int) -> bytes:
        read.append(n)
        return content[offset : offset + n]

    check_onnx(reading, len(content), SPEC, max_bytes=len(content), max_parameters=1 << 20)
    assert sum(read) < 300_000 < len(content)


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"


def external_constant(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="c", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def nested(depth: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        inner = helper.make_graph([], "leaf", [], [])
        for level in range(depth):
            node = helper.make_node("If", ["c"], [f"o{level}"], then_branch=inner, else_branch=inner)
            inner = helper.make_graph([node], f"g{level}", [], [])
        model.graph.node.extend(inner.node)

    return change


def own_function(model: onnx.ModelProto) -> None:
    model.functions.append(helper.make_function("", "F", [], [], [], [helper.make_opsetid("", 17)]))


def training(model: onnx.ModelProto) -> None:
    model.training_info.add().algorithm.name = "t"


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().dims.append(4)


def swell(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.TensorProto(name="z", data_type=1, dims=[1 << 40]))


def many_dimensions(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.TensorProto(name="z", data_type=1, dims=[2**63 - 1] * 100_000))


def input_of_many_dimensions(model: onnx.ModelProto) -> None:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *[4] * 100_000]))


def operator(name: str, inputs: list[str]) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        inner = helper.make_graph([helper.make_node(name, inputs, ["r2"])], "inner", [], [])
        model.graph.node.append(helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner))

    return change


def two_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("x2", TensorProto.FLOAT, ["n", 1]))


def bytes_in(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def fixed_rows(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 16


def other_rows(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5


def other_outputs(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (external, FaultCode.BAD_FORMAT, "'w' lies outside the file"),
        (external_constant, FaultCode.BAD_FORMAT, "'c' lies outside the file"),
        (lambda m: setattr(m.graph.node[0], "domain", "com.evil"), FaultCode.BAD_FORMAT, "domain 'com.evil'"),
        (lambda m: m.opset_import.append(helper.make_opsetid("com.evil", 1)), FaultCode.BAD_FORMAT, "com.evil"),
        (own_function, FaultCode.BAD_FORMAT, "functions of its own"),
        (training, FaultCode.BAD_FORMAT, "training graph"),
        (sparse, FaultCode.BAD_FORMAT, "sparse"),
        (nested(MAX_NESTING + 1), FaultCode.TOO_LARGE, "deep"),
        (swell, FaultCode.TOO_LARGE, "over the limit of 1000"),
        (many_dimensions, FaultCode.TOO_LARGE, "more than 8 dimensions"),
        (input_of_many_dimensions, FaultCode.TOO_LARGE, "more than 8 dimensions"),
        (operator("RandomUniformLike", ["r"]), FaultCode.BAD_FORMAT, "RandomUniformLike draws at random"),
        (operator("Bernoulli", ["r"]), FaultCode.BAD_FORMAT, "Bernoulli draws at random"),
        (operator("Dropout", ["r", "", "t"]), FaultCode.BAD_FORMAT, "told to train"),
        (lambda m: setattr(m.opset_import[0], "version", 999), FaultCode.BAD_FORMAT, "operator set 999"),
        (lambda m: m.ClearField("opset_import"), FaultCode.BAD_FORMAT, "operator set None"),
        (lambda m: m.ClearField("graph"), FaultCode.BAD_FORMAT, "0 graphs"),
        (lambda m: setattr(m.graph.initializer[0], "raw_data", b"123"), FaultCode.BAD_FORMAT, "3 bytes"),
        (two_inputs, FaultCode.SHAPE_MISMATCH, "2 inputs"),
        (bytes_in, FaultCode.SHAPE_MISMATCH, "element type 2"),
        (fixed_rows, FaultCode.SHAPE_MISMATCH, "n open"),
        (other_rows, FaultCode.SHAPE_MISMATCH, r"\[n, 4, 2\]"),
        (other_outputs, FaultCode.SHAPE_MISMATCH, r"\[n, 3\]"),
    ],
)
def test_what_is_refused_is_named(change: Callable[[onnx.ModelProto], None], code: FaultCode, text: str) -> None:
    model = graph()
    change(model)
    with pytest.raises(ModelFault, match=text) as caught:
        check(model.SerializeToString())
    assert caught.value.code is code


def test_a_dropout_that_only_passes_on_is_taken() -> None:
    model = graph()
    operator("Dropout", ["r", "ratio", ""])(model)
    assert check(model.SerializeToString()).nodes == 4 + 3


def told_by(*makers: onnx.NodeProto | onnx.TensorProto) -> onnx.ModelProto:
    """A Dropout between the layers whose third input `t` is what these make."""
    model = graph()
    del model.graph.node[3]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "ratio"))
    for maker in makers:
        (model.graph.initializer if isinstance(maker, onnx.TensorProto) else model.graph.node).append(maker)
    model.graph.node.append(helper.make_node("Dropout", ["r", "ratio", "t"], ["d"]))
    model.graph.node.append(helper.make_node("MatMul", ["d", "v"], ["y"]))
    return model


def constant(value: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["t"], value=value)


RAW_FALSE = numpy_helper.from_array(np.array(False), "t")
TYPED_FALSE = helper.make_tensor("t", TensorProto.BOOL, [], [False])


@pytest.mark.parametrize(
    "maker", [RAW_FALSE, TYPED_FALSE, constant(RAW_FALSE), constant(TYPED_FALSE)], ids=["raw", "typed", "node", "both"]
)
def test_a_dropout_that_is_told_not_to_train_is_taken(maker: onnx.NodeProto | onnx.TensorProto) -> None:
    model = told_by(maker)
    onnx.checker.check_model(model)
    assert check(model.SerializeToString()).opset == 17


def inner_input() -> onnx.NodeProto:
    """A loop whose body has an input of that name."""
    body = helper.make_graph([], "body", [helper.make_tensor_value_info("t", TensorProto.BOOL, [])], [])
    return helper.make_node("Loop", ["", ""], ["o"], body=body)


@pytest.mark.parametrize(
    "makers",
    [
        [numpy_helper.from_array(np.array(True), "t")],
        [helper.make_tensor("t", TensorProto.BOOL, [], [True])],
        [constant(numpy_helper.from_array(np.array(True)))],
        [numpy_helper.from_array(np.array([False, True]), "t")],
        [numpy_helper.from_array(np.array([], bool), "t")],
        [numpy_helper.from_array(np.array(0, np.uint8), "t")],
        [helper.make_node("Cast", ["r"], ["t"], to=TensorProto.BOOL)],
        [helper.make_node("Not", ["f"], ["t"], value=RAW_FALSE)],
        [RAW_FALSE, numpy_helper.from_array(np.array(True), "t")],
        [numpy_helper.from_array(np.array(True), "t"), RAW_FALSE],
        [RAW_FALSE, helper.make_node("Cast", ["r"], ["t"], to=TensorProto.BOOL)],
        [RAW_FALSE, inner_input()],
        [],
    ],
)
def test_a_dropout_that_may_be_told_to_train_is_refused(makers: list[onnx.NodeProto | onnx.TensorProto]) -> None:
    with pytest.raises(ModelFault, match="told to train"):
        check(told_by(*makers).SerializeToString())


def test_graphs_within_graphs_are_taken_up_to_a_depth_and_counted() -> None:
    model = graph()
    nested(2)(model)
    assert check(model.SerializeToString()).nodes == 4 + 1 + 2


def test_a_weight_that_is_also_listed_as_an_input_is_none() -> None:
    model = graph()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 5]))
    assert check(model.SerializeToString()).nodes == 4


def test_limits_of_the_task_hold() -> None:
    content = graph().SerializeToString()
    with pytest.raises(ModelFault, match="TOO_LARGE"):
        check(content, max_bytes=len(content) - 1)
    with pytest.raises(ModelFault, match="TOO_LARGE"):
        check(content, max_parameters=54)
    with pytest.raises(ModelFault, match="not within 7 to 16"):
        check(content, ModelSpec((4, 2), 3, Onnx(max_opset=16)))


@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_spoiled_bytes_are_a_fault_or_good_and_never_an_error(position: int, spoil: bytes) -> None:
    content = bytearray(graph().SerializeToString())
    position %= len(content)
    content[position : position + len(spoil)] = spoil
    with suppress(ModelFault):
        check(bytes(content))


@given(st.data())
def test_a_truncated_file_is_never_good(data: st.DataObject) -> None:
    content = graph().SerializeToString()
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(ModelFault):
        check(content[:cut])


def test_the_format_follows_from_the_spec() -> None:
    content = graph().SerializeToString()
    limits = {"max_bytes": 1 << 20, "max_parameters": 1000}
    check_model_file(lambda offset, n: content[offset : offset + n], len(content), SPEC, **limits)
    perceptron = ModelSpec((4, 2), 3, Mlp((5,)))
    with pytest.raises(ModelFault, match="BAD_FORMAT"):
        check_model_file(lambda offset, n: content[offset : offset + n], len(content), perceptron, **limits)
    with pytest.raises(ModelFault, match="BAD_FORMAT"):
        check(content, perceptron)


def test_an_onnx_spec_is_good_by_itself() -> None:
    assert validate(SPEC, max_parameters=1) == []
    assert [v.field for v in validate(ModelSpec((4, 2), 3, Onnx(-1)), max_parameters=1)] == ["onnx.max_opset"]
