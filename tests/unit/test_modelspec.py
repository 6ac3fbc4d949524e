"""Specs as data: sizes, bounds, the JSON form, the message, and the check of a weights file."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltyard import modelspec, wire
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
    from_json,
    tensor_shapes,
    to_json,
    validate,
)

MLP = ModelSpec((8, 8), 10, Mlp((32,)), 1 / 16)
CONVNET = ModelSpec((3, 32, 20), 5, Convnet((8, 16), 3, (12,), Activation.GELU, 0.1), 1 / 255, -0.5)


def test_sizes_of_an_mlp_are_the_textbook_ones() -> None:
    assert tensor_shapes(MLP) == {
        "hidden.0.weight": (32, 64),
        "hidden.0.bias": (32,),
        "head.weight": (10, 32),
        "head.bias": (10,),
    }
    assert count_parameters(MLP) == 64 * 32 + 32 + 32 * 10 + 10
    assert flops(MLP) == 2 * (64 * 32 + 32 * 10)


def test_sizes_of_a_convnet() -> None:
    shapes = tensor_shapes(CONVNET)
    assert shapes["blocks.0.convolution.weight"] == (8, 3, 3, 3)
    # 32x20 halves to 16x10 and 8x5; pooling takes 8 rows two by two and 5 columns two by two, rounding up.
    assert shapes["hidden.0.weight"] == (12, 16 * 4 * 3)
    assert flops(CONVNET) == 2 * (8 * 27 * 640 + 16 * 8 * 9 * 160 + 12 * 192 + 5 * 12)


def test_a_large_resnet_is_the_published_one_but_for_its_norms() -> None:
    # torchvision's resnet50 has 25,557,032 numbers with BatchNorm's scale and shift, which GroupNorm has too.
    spec = ModelSpec((3, 224, 224), 1000, Resnet((3, 4, 6, 3), 64, bottleneck=True))
    assert count_parameters(spec) == 25_557_032
    # 4.1 GFLOPs of multiply-adds is its published figure.
    assert 4.0e9 < flops(spec) / 2 < 4.2e9
    assert count_parameters(ModelSpec((3, 224, 224), 1000, Resnet((2, 2, 2, 2), 64))) == 11_689_512


def test_an_encoder_layer_has_twelve_times_its_width_squared() -> None:
    spec = ModelSpec((16,), 2, Transformer(100, 64, 3, 4))
    layer = 12 * 64 * 64 + 13 * 64
    assert count_parameters(spec) == 100 * 64 + 16 * 64 + 3 * layer + 2 * 64 + 2 * 64 + 2
    assert flops(spec) == 3 * (2 * 16 * 12 * 64 * 64 + 4 * 16 * 16 * 64) + 2 * 64 * 2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"input_shape": ()}, "input_shape"),
        ({"input_shape": (0, 8)}, "input_shape[0]"),
        ({"input_shape": (2, 2, 2, 2)}, "input_shape"),
        ({"input_shape": (4096, 4096)}, "input_shape"),
        ({"outputs": 0}, "outputs"),
        ({"input_scale": 0.0}, "input_scale"),
        ({"input_scale": math.nan}, "input_scale"),
        ({"input_scale": 1e300}, "input_scale"),
        ({"input_offset": math.inf}, "input_offset"),
        ({"architecture": Mlp(())}, "mlp.hidden"),
        ({"architecture": Mlp((8, -1))}, "mlp.hidden[1]"),
        ({"architecture": Mlp((8,), dropout=1.0)}, "mlp.dropout"),
        ({"architecture": Mlp((8,), dropout=math.nan)}, "mlp.dropout"),
        ({"architecture": Mlp((60_000, 60_000))}, "mlp"),
        ({"architecture": Convnet(())}, "convnet.channels"),
        ({"architecture": Convnet((1,))}, "convnet.channels[0]"),
        ({"architecture": Convnet((8,), kernel_size=2)}, "convnet.kernel_size"),
        ({"architecture": Convnet((8,)), "input_shape": (64,)}, "input_shape"),
        ({"architecture": Resnet((), 8)}, "resnet.blocks"),
        ({"architecture": Resnet((1, 0), 8)}, "resnet.blocks[1]"),
        ({"architecture": Resnet((1,), 1)}, "resnet.width"),
        ({"architecture": Resnet((1,), 8), "input_shape": (64,)}, "input_shape"),
        ({"architecture": Resnet((8, 8, 8, 8), 512)}, "resnet"),
        ({"architecture": Transformer(9, 8, 1, 2)}, "input_shape"),
        ({"architecture": Transformer(9, 8, 1, 2), "input_shape": (4,)}, "input_scale"),
        ({"architecture": Transformer(9, 8, 1, 3), "input_shape": (4,)}, "transformer.width"),
        ({"architecture": Transformer(9, 8, 1, 0), "input_shape": (4,)}, "transformer.heads"),
        ({"architecture": Transformer(0, 8, 1, 2), "input_shape": (4,)}, "transformer.vocabulary"),
        ({"architecture": Transformer(9, 8, 65, 2), "input_shape": (4,)}, "transformer.layers"),
        ({"architecture": Transformer(9, 8, 1, 2, dropout=1.0), "input_shape": (4,)}, "transformer.dropout"),
        ({"architecture": Transformer(9, 8, 1, 2), "input_shape": (8193,)}, "input_shape"),
        ({"architecture": Onnx(-1)}, "onnx.max_opset"),
    ],
)
def test_bounds_name_the_field(change: dict[str, object], field: str) -> None:
    bad = dataclasses.replace(MLP, **change)  # type: ignore[arg-type]
    assert field in [violation.field for violation in validate(bad, max_parameters=1_000_000)]


@pytest.mark.parametrize(
    "change",
    [
        {"input_shape": (2**31 - 1,) * 500_000},
        {"architecture": Mlp((0,) * 500_000)},
        {"architecture": Transformer(9, 8, 1, 2), "input_shape": (2**31 - 1,) * 500_000},
    ],
)
def test_a_list_of_any_length_is_refused_in_few_words(change: dict[str, object]) -> None:
    bad = dataclasses.replace(MLP, **change)  # type: ignore[arg-type]
    assert len(validate(bad, max_parameters=1_000_000)) < 40


def test_the_limit_of_parameters_is_inclusive() -> None:
    size = count_parameters(MLP)
    assert validate(MLP, max_parameters=size) == []
    assert [v.field for v in validate(MLP, max_parameters=size - 1)] == ["mlp"]


specs = st.builds(
    ModelSpec,
    input_shape=st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple),
    outputs=st.integers(1, 9),
    architecture=st.one_of(
        st.just(Linear()),
        st.builds(
            Mlp,
            st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
            st.sampled_from(Activation),
            st.floats(0, 0.9),
        ),
        st.builds(
            Convnet,
            st.lists(st.integers(2, 9), min_size=1, max_size=3).map(tuple),
            st.sampled_from(modelspec.KERNEL_SIZES),
            st.lists(st.integers(1, 9), max_size=2).map(tuple),
            st.sampled_from(Activation),
            st.floats(0, 0.9),
        ),
        st.just(Resnet((2, 2), 64, True)),
        st.just(Transformer(100, 64, 2, 4, 128, 0.1)),
        st.just(Onnx(17)),
    ),
    input_scale=st.floats(1e-3, 1e3),
    input_offset=st.floats(-1e3, 1e3),
)


@given(specs)
def test_json_and_the_message_give_back_an_equal_spec(spec: ModelSpec) -> None:
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec
    assert wire.model_spec_from_proto(wire.model_spec_to_proto(spec)) == spec


def test_zero_values_of_the_message_mean_what_it_says() -> None:
    message = wire.model_pb2.ModelSpec(input_shape=[8, 8], outputs=10, convnet=wire.model_pb2.Convnet(channels=[8]))
    assert wire.model_spec_from_proto(message) == ModelSpec((8, 8), 10, Convnet((8,), 3, (), Activation.RELU), 1.0)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (wire.model_pb2.ModelSpec(outputs=2), "architecture"),
        (wire.model_pb2.ModelSpec(mlp=wire.model_pb2.Mlp(activation=99)), "mlp.activation"),  # type: ignore[arg-type]
    ],
)
def test_a_message_without_a_known_architecture_is_refused(message: wire.model_pb2.ModelSpec, field: str) -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.model_spec_from_proto(message)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("outputs", 1.5, "outputs"),
        ("outputs", True, "outputs"),
        ("input_shape", "8", "input_shape"),
        ("input_scale", 10**400, "input_scale"),
        ("extra", 1, "extra"),
        ("architecture", {"kind": "perceptron"}, "kind"),
        ("architecture", {"kind": "mlp"}, "hidden"),
        ("architecture", {"kind": "mlp", "hidden": [8], "width": 3}, "width"),
        ("architecture", {"kind": "mlp", "hidden": [8], "activation": "step"}, "activation"),
        ("architecture", {"kind": "mlp", "hidden": [8], "dropout": "0.1"}, "dropout"),
    ],
)
def test_json_is_read_strictly(path: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_json({**to_json(MLP), path: value})


def _file(entries: dict[str, object], data: int, *, header: bytes | None = None) -> bytes:
    encoded = header if header is not None else json.dumps(entries).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(data)


def _weights(dtype: str = "F32", size: int = 4) -> tuple[dict[str, dict[str, object]], int]:
    entries: dict[str, dict[str, object]] = {}
    position = 0
    for name, shape in tensor_shapes(MLP).items():
        end = position + math.prod(shape) * size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return entries, position


def _check(raw: bytes, *, max_bytes: int = 1 << 20) -> None:
    check_safetensors(lambda offset, n: raw[offset : offset + n], len(raw), MLP, max_bytes=max_bytes)


@pytest.mark.parametrize(("dtype", "size"), [("F32", 4), ("F16", 2), ("BF16", 2)])
def test_a_file_of_the_spec_passes_and_only_its_header_is_read(dtype: str, size: int) -> None:
    raw = _file(*_weights(dtype, size))
    header_end = 8 + int.from_bytes(raw[:8], "little")
    check_safetensors(lambda offset, n: raw[:header_end][offset : offset + n], len(raw), MLP, max_bytes=len(raw))


def test_a_file_over_the_limit_is_not_even_read() -> None:
    def read(offset: int, n: int) -> bytes:
        raise AssertionError("read")

    with pytest.raises(ModelFault) as caught:
        check_safetensors(read, 1001, MLP, max_bytes=1000)
    assert caught.value.code is FaultCode.TOO_LARGE


def _broken() -> dict[str, bytes]:
    entries, data = _weights()
    first = entries["hidden.0.weight"]
    start, end = 0, 64 * 32 * 4
    return {
        "empty": b"",
        "short": b"12345",
        "header beyond the file": (1 << 20).to_bytes(8, "little") + b"{}",
        "header over 16 MiB": (1 << 60).to_bytes(8, "little") + b"{}",
        "no json": _file({}, 0, header=b"{nonsense"),
        "a list": _file({}, 0, header=b"[]    "),
        "deep": _file({}, 0, header=b'{"a":' + b"[" * 200_000),
        "not utf-8": _file({}, 0, header=b'{"\xff":1}'),
        "nan": _file({}, 0, header=b'{"a":NaN}'),
        "huge number": _file({}, 0, header=b'{"a":' + b"9" * 5000 + b"}"),
        "a name twice": _file({}, 0, header=b'{"a":1,"a":1}'),
        "metadata no texts": _file({"__metadata__": {"a": 1}}, 0),
        "truncated": _file(entries, data - 1),
        "bytes left over": _file(entries, data + 1),
        "gap": _file({**entries, "hidden.0.weight": {**first, "data_offsets": [4, 4 + end]}}, data),
        "overlap": _file({**entries, "head.bias": {**entries["head.bias"], "data_offsets": [0, 40]}}, data),
        "gap after a long name": _file({"n" * 100_000: {**first, "data_offsets": [4, 4 + end]}}, data),
        "negative": _file({**entries, "hidden.0.weight": {**first, "data_offsets": [-4, end - 4]}}, data),
        "wrong length": _file({**entries, "hidden.0.weight": {**first, "data_offsets": [start, end - 4]}}, data),
        "shape of truths": _file({**entries, "hidden.0.weight": {**first, "shape": [True, 2048]}}, data),
        "unknown dtype": _file({**entries, "hidden.0.weight": {**first, "dtype": "F12"}}, data),
        "unknown key": _file({**entries, "hidden.0.weight": {**first, "code": "rm"}}, data),
        "integers": _file(*_weights("I32")),
    }


@pytest.mark.parametrize("raw", _broken().values(), ids=_broken().keys())
def test_what_is_no_weights_file_is_bad_format(raw: bytes) -> None:
    with pytest.raises(ModelFault) as caught:
        _check(raw)
    assert caught.value.code is FaultCode.BAD_FORMAT
    # It is kept in the record log for good.
    assert len(caught.value.detail) < 500


def test_a_header_longer_than_any_specs_is_not_parsed() -> None:
    read: list[int] = []
    raw = _file({}, 0, header=b'{"a":[' + b"[]," * (1 << 20) + b"[]]}")

    def reading(offset: int, n: int) -> bytes:
        read.append(n)
        return raw[offset : offset + n]

    with pytest.raises(ModelFault, match="header of 3145738 bytes is over the limit") as caught:
        check_safetensors(reading, len(raw), MLP, max_bytes=1 << 30)
    assert (caught.value.code, sum(read)) == (FaultCode.BAD_FORMAT, 8)


def test_other_tensors_than_the_specs_are_a_shape_mismatch() -> None:
    def encoded(entries: dict[str, dict[str, object]]) -> bytes:
        position, moved = 0, {}
        for name, entry in entries.items():
            end = position + 4 * math.prod(entry["shape"])  # type: ignore[arg-type]
            moved[name] = {**entry, "data_offsets": [position, end]}
            position = end
        return _file(dict(moved), position)

    entries, _ = _weights()
    missing = {name: entry for name, entry in entries.items() if name != "head.bias"}
    extra = {**entries, "backdoor": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    other = {**entries, "head.bias": {**entries["head.bias"], "shape": [11]}}
    for wrong, said in ((missing, "missing"), (extra, "backdoor"), (other, "head.bias")):
        with pytest.raises(ModelFault, match=said) as caught:
            _check(encoded(wrong))
        assert caught.value.code is FaultCode.SHAPE_MISMATCH


@given(st.binary(max_size=200), st.integers(0, 120))
def test_no_bytes_make_the_check_raise_anything_else(noise: bytes, at: int) -> None:
    raw = _file(*_weights())
    with pytest.raises(ModelFault):
        _check(raw[:at] + noise + b"\x01" + raw[at + len(noise) + 2 :])
