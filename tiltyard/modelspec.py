"""What a task's model is, as data: its architecture, its tensors, its size, and whether a weights file fits it."""

import math
import struct
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from enum import StrEnum
from typing import TypeGuard

from tiltyard.tensorfile import Read, TensorFileError, read_header

MAX_INPUT_ELEMENTS = 1 << 20
MAX_OUTPUTS = 1 << 16
MAX_DIMENSION = 1 << 16
MAX_LAYERS = 16
MAX_WIDTH = 1 << 16
MAX_CHANNELS = 1 << 12
MAX_BLOCKS = 12
KERNEL_SIZES = (1, 3, 5, 7, 9, 11)
MAX_STAGES = 4
MAX_STAGE_BLOCKS = 64
MAX_TOKENS = 1 << 13
MAX_VOCABULARY = 1 << 20
MAX_ENCODER_LAYERS = 64
MAX_HEADS = 256
MAX_SCALE = 1e6
MAX_OPSET = 1000
# More values of a list are not looked at: a stranger's may have a million, whose product alone takes minutes.
_MOST_LISTED = MAX_LAYERS

# After the last block of a convnet its maps are averaged down to at most this many rows and columns, so that the
# head's size does not grow with the image.
POOLED_SIDE = 4

# From this many rows and columns on a resnet begins as for ImageNet: a 7x7 convolution and a pooling, both halving.
# Smaller images would be gone after the stages, so theirs is a 3x3 convolution at the same size, as for CIFAR.
RESNET_LARGE_SIDE = 64
BOTTLENECK_EXPANSION = 4


class Activation(StrEnum):
    """The function between two layers."""

    RELU = "relu"
    GELU = "gelu"
    TANH = "tanh"
    SILU = "silu"


@dataclass(frozen=True)
class Linear:
    """One linear layer over the flattened input: logistic or linear regression."""


@dataclass(frozen=True)
class Mlp:
    """Linear layers of the given widths over the flattened input, each followed by the activation and dropout."""

    hidden: tuple[int, ...]
    activation: Activation = Activation.RELU
    dropout: float = 0.0


@dataclass(frozen=True)
class Convnet:
    """Blocks of convolution, one-group GroupNorm, activation and 2x2 max pooling, one for each entry of `channels`.

    Then average pooling to at most 4x4, linear layers of the widths in `hidden`, and the head.
    """

    channels: tuple[int, ...]
    kernel_size: int = 3
    hidden: tuple[int, ...] = ()
    activation: Activation = Activation.RELU
    dropout: float = 0.0


@dataclass(frozen=True)
class Resnet:
    """Residual blocks (He et al. 2016) in stages, each after the first halving the image and doubling the channels.

    A basic block is two 3x3 convolutions, a bottleneck 1x1, 3x3 and 1x1 with four times the channels at its end. Every
    convolution is followed by one-group GroupNorm; the last maps are averaged over the whole image before the head.
    """

    blocks: tuple[int, ...]
    width: int
    bottleneck: bool = False


@dataclass(frozen=True)
class Transformer:
    """An encoder (Vaswani et al. 2017, normalised before each part) over rows of token ids, averaged before the head.

    Positions are learned. An id outside the vocabulary counts as its nearest. `feed_forward` 0 means 4 * width.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    feed_forward: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "feed_forward", self.feed_forward or 4 * self.width)


@dataclass(frozen=True)
class Onnx:
    """Any ONNX graph whose input and output fit, of an operator set up to `max_opset` (0: the newest that is taken).

    `tiltyard.onnxfile` checks one; its parameters are counted in the file, since the spec does not fix them.
    """

    max_opset: int = 0


Architecture = Linear | Mlp | Convnet | Resnet | Transformer | Onnx

_KINDS: dict[str, type[Architecture]] = {
    "linear": Linear,
    "mlp": Mlp,
    "convnet": Convnet,
    "resnet": Resnet,
    "transformer": Transformer,
    "onnx": Onnx,
}
KIND_OF = {architecture: kind for kind, architecture in _KINDS.items()}


@dataclass(frozen=True)
class ModelSpec:
    """f(x) = network(float32(x) * input_scale + input_offset).

    `input_shape` is the shape of one row: features or token ids `(d,)`, an image `(c, h, w)`, or `(h, w)` for one
    channel. `outputs` is the number of classes, or of targets in a regression. Scale and offset are rounded to float32,
    which is what crosses the wire and what the model computes with.
    """

    input_shape: tuple[int, ...]
    outputs: int
    architecture: Architecture
    input_scale: float = field(default=1.0)
    input_offset: float = field(default=0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_scale", _float32(self.input_scale))
        object.__setattr__(self, "input_offset", _float32(self.input_offset))


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a spec: the field's path in `tiltyard.type.v1.ModelSpec`, and a sentence."""

    field: str
    description: str


class FaultCode(StrEnum):
    """What can be wrong with a weights file before it is run."""

    TOO_LARGE = "TOO_LARGE"
    BAD_FORMAT = "BAD_FORMAT"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"


class ModelFault(Exception):
    """A weights file that is not of its spec; the fault is its author's."""

    def __init__(self, code: FaultCode, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


def image_shape(spec: ModelSpec) -> tuple[int, int, int]:
    """Channels, rows and columns of one input of a convnet or resnet."""
    if len(spec.input_shape) == 2:
        return (1, *spec.input_shape)
    channels, rows, columns = spec.input_shape
    return channels, rows, columns


def pooled_kernel(side: int) -> int:
    """How many rows (or columns) of the last map one cell of the pooled map averages."""
    return -(-side // POOLED_SIDE)


@dataclass(frozen=True)
class ConvolutionShape:
    """One convolution of a residual block: its name in the block, channels, square kernel and stride."""

    name: str
    inputs: int
    outputs: int
    kernel_size: int
    stride: int = 1


def resnet_is_large(spec: ModelSpec) -> bool:
    """Whether a resnet begins by making its images four times smaller on each side."""
    return min(image_shape(spec)[1:]) >= RESNET_LARGE_SIDE


def resnet_blocks(resnet: Resnet) -> list[tuple[str, list[ConvolutionShape], ConvolutionShape | None]]:
    """Each block's name, its convolutions in order, and the one on its shortcut where the shapes differ."""
    blocks: list[tuple[str, list[ConvolutionShape], ConvolutionShape | None]] = []
    inputs = resnet.width
    for stage, count in enumerate(resnet.blocks):
        width = resnet.width << stage
        outputs = width * BOTTLENECK_EXPANSION if resnet.bottleneck else width
        for index in range(count):
            stride = 2 if stage and not index else 1
            if resnet.bottleneck:
                steps = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
            else:
                steps = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
            convolutions = [ConvolutionShape(f"convolutions.{place}", *step) for place, step in enumerate(steps)]
            same = inputs == outputs and stride == 1
            shortcut = None if same else ConvolutionShape("shortcut", inputs, outputs, 1, stride)
            blocks.append((f"stages.{stage}.{index}", convolutions, shortcut))
            inputs = outputs
    return blocks


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of the weights file, in the network's order: torch's `state_dict` names.

    Raises ValueError for an ONNX graph, whose own file fixes its tensors.
    """
    return {name: shape for name, shape, _ in _layers(spec)}


def count_parameters(spec: ModelSpec) -> int:
    """Number of trained numbers."""
    return sum(math.prod(shape) for _, shape, _ in _layers(spec))


def flops(spec: ModelSpec) -> int:
    """Floating-point operations of the matrix products and convolutions of one row; a multiply-add counts as two."""
    products = sum(2 * math.prod(shape) * positions for _, shape, positions in _layers(spec))
    match spec.architecture:
        case Transformer(layers=layers, width=width):
            # Every token with every token, twice: which to attend to, and what is taken from it.
            tokens = spec.input_shape[0]
            return products + layers * 2 * 2 * tokens * tokens * width
    return products


def _layers(spec: ModelSpec) -> list[tuple[str, tuple[int, ...], int]]:
    """Each tensor's name, shape, and at how many positions its numbers are multiplied (0: not a product)."""
    layers: list[tuple[str, tuple[int, ...], int]] = []

    def dense(name: str, inputs: int, outputs: int) -> None:
        dense_at(name, inputs, outputs, positions=1)

    def dense_at(name: str, inputs: int, outputs: int, *, positions: int) -> None:
        layers.append((f"{name}.weight", (outputs, inputs), positions))
        layers.append((f"{name}.bias", (outputs,), 0))

    def norm(name: str, channels: int) -> None:
        layers.append((f"{name}.weight", (channels,), 0))
        layers.append((f"{name}.bias", (channels,), 0))

    def stack(inputs: int, widths: Sequence[int]) -> None:
        for index, width in enumerate(widths):
            dense(f"hidden.{index}", inputs, width)
            inputs = width
        dense("head", inputs, spec.outputs)

    match spec.architecture:
        case Linear():
            stack(math.prod(spec.input_shape), ())
        case Mlp(hidden=hidden):
            stack(math.prod(spec.input_shape), hidden)
        case Convnet(channels=channels, kernel_size=k, hidden=hidden):
            inputs, rows, columns = image_shape(spec)
            for index, outputs in enumerate(channels):
                layers.append((f"blocks.{index}.convolution.weight", (outputs, inputs, k, k), rows * columns))
                layers.append((f"blocks.{index}.convolution.bias", (outputs,), 0))
                norm(f"blocks.{index}.norm", outputs)
                inputs, rows, columns = outputs, -(-rows // 2), -(-columns // 2)
            cells = -(-rows // pooled_kernel(rows)) * -(-columns // pooled_kernel(columns))
            stack(inputs * cells, hidden)
        case Resnet() as resnet:
            channels_in, rows, columns = image_shape(spec)
            side = 3
            if resnet_is_large(spec):
                side, rows, columns = 7, -(-rows // 2), -(-columns // 2)
            layers.append(("stem.weight", (resnet.width, channels_in, side, side), rows * columns))
            norm("stem_norm", resnet.width)
            if resnet_is_large(spec):
                rows, columns = -(-rows // 2), -(-columns // 2)
            inputs = resnet.width
            for name, convolutions, shortcut in resnet_blocks(resnet):
                for place, each in enumerate(convolutions):
                    rows, columns = -(-rows // each.stride), -(-columns // each.stride)
                    shape = (each.outputs, each.inputs, each.kernel_size, each.kernel_size)
                    layers.append((f"{name}.convolutions.{place}.weight", shape, rows * columns))
                    inputs = each.outputs
                for place, each in enumerate(convolutions):
                    norm(f"{name}.norms.{place}", each.outputs)
                if shortcut is not None:
                    shape = (shortcut.outputs, shortcut.inputs, 1, 1)
                    layers.append((f"{name}.shortcut.weight", shape, rows * columns))
                    norm(f"{name}.shortcut_norm", shortcut.outputs)
            dense("head", inputs, spec.outputs)
        case Transformer(vocabulary=vocabulary, width=width, feed_forward=feed_forward) as transformer:
            tokens = spec.input_shape[0]
            layers.append(("tokens.weight", (vocabulary, width), 0))
            layers.append(("positions.weight", (tokens, width), 0))
            for index in range(transformer.layers):
                norm(f"layers.{index}.attention_norm", width)
                dense_at(f"layers.{index}.query_key_value", width, 3 * width, positions=tokens)
                dense_at(f"layers.{index}.attended", width, width, positions=tokens)
                norm(f"layers.{index}.feed_forward_norm", width)
                dense_at(f"layers.{index}.widen", width, feed_forward, positions=tokens)
                dense_at(f"layers.{index}.narrow", feed_forward, width, positions=tokens)
            norm("norm", width)
            dense("head", width, spec.outputs)
        case Onnx():
            raise ValueError("an onnx spec fixes no tensors")
    return layers


def validate(spec: ModelSpec, *, max_parameters: int) -> list[Violation]:
    """Everything wrong with a spec; an empty list means that it can be built and trained."""
    found: list[Violation] = []

    def check(good: bool, path: str, description: str) -> None:
        if not good:
            found.append(Violation(path, description))

    def each(path: str, values: Sequence[int], low: int, high: int) -> None:
        for index, value in enumerate(values[:_MOST_LISTED]):
            check(low <= value <= high, f"{path}[{index}]", f"must be {low} to {high}, is {value}")

    shape = spec.input_shape
    check(1 <= len(shape) <= 3, "input_shape", "must be (features), (rows, columns) or (channels, rows, columns)")
    each("input_shape", shape, 1, MAX_DIMENSION)
    elements = math.prod(shape[:_MOST_LISTED])
    check(elements <= MAX_INPUT_ELEMENTS, "input_shape", f"a row may have at most {MAX_INPUT_ELEMENTS} values")
    check(1 <= spec.outputs <= MAX_OUTPUTS, "outputs", f"must be 1 to {MAX_OUTPUTS}, is {spec.outputs}")
    check(0 < abs(spec.input_scale) <= MAX_SCALE, "input_scale", f"must be finite, not 0 and at most {MAX_SCALE:g}")
    check(abs(spec.input_offset) <= MAX_SCALE, "input_offset", f"must be finite and at most {MAX_SCALE:g}")
    architecture = spec.architecture
    kind = KIND_OF[type(architecture)]
    match architecture:
        case Linear():
            pass
        case Mlp(hidden=hidden, dropout=dropout):
            check(1 <= len(hidden) <= MAX_LAYERS, "mlp.hidden", f"must name 1 to {MAX_LAYERS} widths")
            each("mlp.hidden", hidden, 1, MAX_WIDTH)
            check(0 <= dropout < 1, "mlp.dropout", f"must be at least 0 and below 1, is {dropout}")
        case Convnet(channels=channels, kernel_size=kernel_size, hidden=hidden, dropout=dropout):
            check(
                len(shape) in (2, 3), "input_shape", "a convnet needs images: (rows, columns) with or without channels"
            )
            check(1 <= len(channels) <= MAX_BLOCKS, "convnet.channels", f"must name 1 to {MAX_BLOCKS} widths")
            # One number alone cannot be normalised, so a block has two channels at least.
            each("convnet.channels", channels, 2, MAX_CHANNELS)
            check(
                kernel_size in KERNEL_SIZES, "convnet.kernel_size", f"must be one of {KERNEL_SIZES}, is {kernel_size}"
            )
            check(len(hidden) <= MAX_LAYERS, "convnet.hidden", f"must name at most {MAX_LAYERS} widths")
            each("convnet.hidden", hidden, 1, MAX_WIDTH)
            check(0 <= dropout < 1, "convnet.dropout", f"must be at least 0 and below 1, is {dropout}")
        case Resnet(blocks=blocks, width=width):
            check(
                len(shape) in (2, 3), "input_shape", "a resnet needs images: (rows, columns) with or without channels"
            )
            check(1 <= len(blocks) <= MAX_STAGES, "resnet.blocks", f"must name 1 to {MAX_STAGES} stages")
            each("resnet.blocks", blocks, 1, MAX_STAGE_BLOCKS)
            check(2 <= width <= MAX_CHANNELS, "resnet.width", f"must be 2 to {MAX_CHANNELS}, is {width}")
        case Transformer(vocabulary=vocabulary, width=width, heads=heads, dropout=dropout) as transformer:
            check(len(shape) == 1, "input_shape", "a transformer needs rows of token ids: (tokens)")
            check(elements <= MAX_TOKENS, "input_shape", f"a transformer's row has at most {MAX_TOKENS} tokens")
            check(spec.input_scale == 1, "input_scale", "must be left out: token ids are not scaled")
            check(spec.input_offset == 0, "input_offset", "must be left out: token ids are not shifted")
            for name, value, low, high in (
                ("vocabulary", vocabulary, 1, MAX_VOCABULARY),
                ("width", width, 2, MAX_WIDTH),
                ("layers", transformer.layers, 1, MAX_ENCODER_LAYERS),
                ("heads", heads, 1, MAX_HEADS),
                ("feed_forward", transformer.feed_forward, 1, MAX_WIDTH),
            ):
                check(low <= value <= high, f"transformer.{name}", f"must be {low} to {high}, is {value}")
            whole = heads < 1 or width % heads == 0
            check(whole, "transformer.width", f"must be a multiple of the {heads} heads, is {width}")
            check(0 <= dropout < 1, "transformer.dropout", f"must be at least 0 and below 1, is {dropout}")
        case Onnx(max_opset=max_opset):
            check(0 <= max_opset <= MAX_OPSET, "onnx.max_opset", f"must be 0 to {MAX_OPSET}, is {max_opset}")
    if not found and not isinstance(architecture, Onnx):
        size = count_parameters(spec)
        check(size <= max_parameters, kind, f"has {size} parameters, over the limit of {max_parameters}")
    return found


def to_json(spec: ModelSpec) -> dict[str, object]:
    """The spec as a JSON object; `from_json` gives back an equal spec."""
    architecture: dict[str, object] = {"kind": KIND_OF[type(spec.architecture)]}
    for name, value in vars(spec.architecture).items():
        architecture[name] = (
            list(value) if isinstance(value, tuple) else str(value) if isinstance(value, str) else value
        )
    return {
        "input_shape": list(spec.input_shape),
        "outputs": spec.outputs,
        "input_scale": spec.input_scale,
        "input_offset": spec.input_offset,
        "architecture": architecture,
    }


def from_json(value: object) -> ModelSpec:
    """The spec of a JSON object of `to_json`'s form. Raises ValueError naming a missing, unknown or mistyped key."""
    fields = _object("spec", value, {"input_shape", "outputs", "architecture"}, {"input_scale", "input_offset"})
    raw = fields["architecture"]
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"architecture.kind must be one of {', '.join(_KINDS)}")
    known = _KINDS[kind].__dataclass_fields__
    given = _object("architecture", raw, {"kind"}, set(known))
    arguments = {name: _argument(f"architecture.{name}", value) for name, value in given.items() if name != "kind"}
    for name, argument in known.items():
        if argument.default is MISSING and name not in arguments:
            raise ValueError(f"architecture lacks {name}")
    return ModelSpec(
        input_shape=_integers("input_shape", fields["input_shape"]),
        outputs=_integer("outputs", fields["outputs"]),
        architecture=_KINDS[kind](**arguments),  # type: ignore[arg-type]  # _argument checked them by name
        input_scale=_number("input_scale", fields.get("input_scale", 1.0)),
        input_offset=_number("input_offset", fields.get("input_offset", 0.0)),
    )


def check_safetensors(read: Read, total_bytes: int, spec: ModelSpec, *, max_bytes: int) -> None:
    """Check that a safetensors file of `total_bytes` bytes holds exactly the tensors of `spec`; reads its header only.

    Raises ModelFault: TOO_LARGE over `max_bytes`; BAD_FORMAT for what is no safetensors file or holds another dtype
    than F32, F16 and BF16; SHAPE_MISMATCH for tensors missing, unknown or of another shape.
    """
    if total_bytes > max_bytes:
        raise ModelFault(FaultCode.TOO_LARGE, f"{total_bytes} bytes are over the limit of {max_bytes}")
    try:
        header = read_header(read, total_bytes)
    except TensorFileError as error:
        raise ModelFault(FaultCode.BAD_FORMAT, str(error)) from error
    for name, entry in header.tensors.items():
        if entry.dtype not in ("F32", "F16", "BF16"):
            raise ModelFault(FaultCode.BAD_FORMAT, f"tensor {name[:80]!r} is {entry.dtype}, not F32, F16 or BF16")
    compare_shapes({name: entry.shape for name, entry in header.tensors.items()}, tensor_shapes(spec))


def compare_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelFault(SHAPE_MISMATCH) naming the first tensor that is missing, unknown or of another shape."""
    for name, shape in expected.items():
        if name not in found:
            raise ModelFault(FaultCode.SHAPE_MISMATCH, f"tensor {name!r} is missing")
        if found[name] != shape:
            raise ModelFault(FaultCode.SHAPE_MISMATCH, f"tensor {name!r} has shape {found[name]}, not {shape}")
    for name in found:
        if name not in expected:
            raise ModelFault(FaultCode.SHAPE_MISMATCH, f"tensor {name[:80]!r} is not in the spec")


def _float32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _object(path: str, value: object, required: set[str], optional: set[str]) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be an object")
    if missing := required - set(value):
        raise ValueError(f"{path} lacks {sorted(missing)[0]}")
    if unknown := set(value) - required - optional:
        raise ValueError(f"{path} has the unknown key {sorted(map(str, unknown))[0]!r}")
    return value


def _integer(path: str, value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{path} must be an integer")
    return value


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def _integers(path: str, value: object) -> tuple[int, ...]:
    if not _is_list(value):
        raise ValueError(f"{path} must be a list of integers")
    return tuple(_integer(f"{path}[{index}]", item) for index, item in enumerate(value))


def _number(path: str, value: object) -> float:
    if type(value) is not int and type(value) is not float:
        raise ValueError(f"{path} must be a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{path} is over the range of a float") from error


def _argument(path: str, value: object) -> object:
    match path.rpartition(".")[2]:
        case "hidden" | "channels" | "blocks":
            return _integers(path, value)
        case "activation":
            try:
                return Activation(str(value))
            except ValueError as error:
                raise ValueError(f"{path} must be one of {', '.join(Activation)}") from error
        case "dropout":
            return _number(path, value)
        case "bottleneck":
            if not isinstance(value, bool):
                raise ValueError(f"{path} must be true or false")
            return value
        case _:
            return _integer(path, value)
