"""The structure of an ONNX file, read without trusting it, without running it, and without loading its weights.

Format: one protobuf message ModelProto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3). Only what is checked
is read; weights are stepped over.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tiltyard.modelspec import FaultCode, ModelFault, ModelSpec, Onnx
from tiltyard.tensorfile import MAX_DIMENSIONS, Read

# The newest operator set that the model server runs: onnxruntime 1.20, https://onnxruntime.ai/docs/reference/compatibility.
NEWEST_OPSET = 21
OLDEST_OPSET = 7
MAX_NODES = 20_000
MAX_FIELDS = 1_000_000
MAX_NESTING = 4
MAX_TEXT_BYTES = 4096

# Operators of everybody's: the ONNX project's own.
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")

# Operators whose answer is drawn anew each time: two validators would not count alike, and honest ones be outliers.
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

_FLOAT = 1
_BOOL = 9
# Bytes of one element by TensorProto.DataType; a string has none. Those of less than a byte are refused.
_ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_WINDOW_BYTES = 64 * 1024


@dataclass(frozen=True)
class OnnxStructure:
    """What a checked file holds: its parameters (elements of weights and constants), nodes, and operator set."""

    parameters: int
    nodes: int
    opset: int


def check_onnx(read: Read, total_bytes: int, spec: ModelSpec, *, max_bytes: int, max_parameters: int) -> OnnxStructure:
    """Check that a file of `total_bytes` bytes is a self-contained ONNX model that fits `spec`.

    It must have one float32 input [n, ...input_shape] and one float32 output [n, outputs], n open. Raises ModelFault:
    TOO_LARGE over `max_bytes`, `max_parameters` or the bounds of this module; BAD_FORMAT for what is no ONNX file, for
    external data, operators of other domains or that draw at random (a Dropout whose third input is more than a
    constant False among them), local functions and training graphs;
    SHAPE_MISMATCH for other inputs and outputs.
    """
    if total_bytes > max_bytes:
        raise ModelFault(FaultCode.TOO_LARGE, f"{total_bytes} bytes are over the limit of {max_bytes}")
    architecture = spec.architecture
    if not isinstance(architecture, Onnx):
        raise ModelFault(FaultCode.BAD_FORMAT, "the task's model is no ONNX model")
    survey = _Survey(_Reader(read, total_bytes))
    survey.model(0, total_bytes)
    if survey.told:
        # In a second pass, since a weight may come after the node that takes it.
        makers = _Survey(_Reader(read, total_bytes), wanted=frozenset(survey.told))
        makers.model(0, total_bytes)
        if not all(makers.is_false.get(name) for name in survey.told):
            # Its third input says whether it trains.
            raise _bad("a Dropout that can be told to train draws at random")
    newest = architecture.max_opset or NEWEST_OPSET
    if survey.opset is None or not OLDEST_OPSET <= survey.opset <= newest:
        raise _bad(f"operator set {survey.opset} is not within {OLDEST_OPSET} to {newest}")
    if survey.parameters > max_parameters:
        raise ModelFault(FaultCode.TOO_LARGE, f"{survey.parameters} parameters are over the limit of {max_parameters}")
    inputs = [value for value in survey.inputs if value.name not in survey.weights]
    _fits("input", inputs, spec.input_shape)
    _fits("output", survey.outputs, (spec.outputs,))
    return OnnxStructure(survey.parameters, survey.nodes, survey.opset)


@dataclass(frozen=True)
class _Value:
    """An input or output of the graph; a dimension that is open is None."""

    name: str
    dtype: int = 0
    shape: tuple[int | None, ...] | None = None


def _fits(what: str, values: list[_Value], row_shape: tuple[int, ...]) -> None:
    wanted = ", ".join(["n", *map(str, row_shape)])
    if len(values) != 1:
        raise ModelFault(FaultCode.SHAPE_MISMATCH, f"the graph has {len(values)} {what}s, not one")
    (value,) = values
    if value.dtype != _FLOAT:
        raise ModelFault(FaultCode.SHAPE_MISMATCH, f"the {what} has the element type {value.dtype}, not 1 (float32)")
    if value.shape is None or len(value.shape) != 1 + len(row_shape) or value.shape[0] is not None:
        raise ModelFault(
            FaultCode.SHAPE_MISMATCH, f"the {what} has the shape {value.shape}, not [{wanted}] with n open"
        )
    # A dimension that the file leaves open is seen when the model runs.
    if any(found not in (None, expected) for found, expected in zip(value.shape[1:], row_shape, strict=True)):
        raise ModelFault(FaultCode.SHAPE_MISMATCH, f"the {what} has the shape {value.shape}, not [{wanted}]")


class _Field(NamedTuple):
    """One field of a message: its value when it is a number, else where its bytes lie."""

    number: int
    value: int
    start: int
    end: int
    is_bytes: bool


class _Reader:
    """Fields of messages in a file, read through a window so that no more than that is in memory."""

    def __init__(self, read: Read, total_bytes: int) -> None:
        self._read = read
        self._total = total_bytes
        self._window = b""
        self._window_start = 0
        self._fields = 0

    def fields(self, start: int, end: int) -> Iterator[_Field]:
        position = start
        while position < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise ModelFault(FaultCode.TOO_LARGE, f"the file has more than {MAX_FIELDS} fields")
            tag, position = self._varint(position, end)
            number, wire_type = tag >> 3, tag & 7
            value, first, is_bytes = 0, position, wire_type == 2
            if wire_type == 0:
                value, position = self._varint(position, end)
            elif wire_type == 2:
                size, first = self._varint(position, end)
                position = first + size
            elif wire_type in (1, 5):
                position += 8 if wire_type == 1 else 4
            else:
                raise _bad(f"a field has the wire type {wire_type}")
            if position > end:
                raise _bad("a field reaches past its message")
            yield _Field(number, value, first, position, is_bytes)

    def text(self, found: _Field) -> str:
        size = found.end - found.start
        if not found.is_bytes or size > MAX_TEXT_BYTES:
            raise _bad(f"a name of {size} bytes is over the limit of {MAX_TEXT_BYTES}")
        self._load(found.start, size)
        offset = found.start - self._window_start
        try:
            return self._window[offset : offset + size].decode()
        except UnicodeDecodeError as error:
            raise _bad("a name is no UTF-8") from error

    def byte(self, found: _Field) -> int:
        """The first byte of a field."""
        self._load(found.start, 1)
        return self._window[found.start - self._window_start]

    def numbers(self, found: _Field) -> Iterator[int]:
        """A repeated number, packed or not."""
        if not found.is_bytes:
            yield found.value
            return
        position = found.start
        while position < found.end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise ModelFault(FaultCode.TOO_LARGE, f"the file has more than {MAX_FIELDS} fields")
            value, position = self._varint(position, found.end)
            yield value

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        offset = position - self._window_start
        if position < end and 0 <= offset < len(self._window) and self._window[offset] < 0x80:
            # Most numbers: a file may have a million of them.
            return self._window[offset], position + 1
        self._load(position, min(10, end - position))
        value = shift = 0
        while position < end and shift < 64:
            byte = self._window[position - self._window_start]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
        raise _bad("a number is cut off or too long")

    def _load(self, position: int, size: int) -> None:
        if self._window_start <= position and position + size <= self._window_start + len(self._window):
            return
        wanted = min(max(size, _WINDOW_BYTES), self._total - position)
        self._window = self._read(position, wanted)
        self._window_start = position
        if len(self._window) < size:
            raise _bad("the file ends inside a message")


@dataclass
class _Survey:
    """What has been seen of a file so far.

    `told` are the third inputs of Dropouts. Of each name in `wanted` that something in the file makes, `is_false` says
    whether nothing but a constant False does.
    """

    reader: _Reader
    wanted: frozenset[str] = frozenset()
    opset: int | None = None
    parameters: int = 0
    nodes: int = 0
    told: set[str] = field(default_factory=set)
    is_false: dict[str, bool] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    inputs: list[_Value] = field(default_factory=list)
    outputs: list[_Value] = field(default_factory=list)

    def model(self, start: int, end: int) -> None:
        """ModelProto: graph = 7, opset_import = 8, training_info = 20, functions = 25."""
        graphs = 0
        for found in self.reader.fields(start, end):
            match found.number:
                case 7:
                    graphs += 1
                    self._graph(found, depth=0)
                case 8:
                    self._operator_set(found)
                case 20:
                    raise _bad("the file holds a training graph")
                case 25:
                    raise _bad("the file defines functions of its own")
        if graphs != 1:
            raise _bad(f"the file holds {graphs} graphs, not one")

    def _operator_set(self, message: _Field) -> None:
        domain, version = "", 0
        for found in self.reader.fields(message.start, _message_end(message)):
            match found.number:
                case 1:
                    domain = self.reader.text(found)
                case 2:
                    version = found.value
        _known(domain)
        if domain in ("", "ai.onnx"):
            if self.opset is not None:
                raise _bad("the file imports the operators of ONNX twice")
            self.opset = version

    def _graph(self, message: _Field, *, depth: int) -> None:
        """GraphProto: node = 1, initializer = 5, input = 11, output = 12, sparse_initializer = 15."""
        if depth > MAX_NESTING:
            raise ModelFault(FaultCode.TOO_LARGE, f"graphs lie within graphs more than {MAX_NESTING} deep")
        for found in self.reader.fields(message.start, _message_end(message)):
            match found.number:
                case 1:
                    self._node(found, depth)
                case 5:
                    name, is_false = self._tensor(found)
                    self._made(name, is_false=is_false)
                    if depth == 0:
                        self.weights.add(name)
                case 11 | 12 if depth == 0:
                    (self.inputs if found.number == 11 else self.outputs).append(self._value(found))
                case 11 if self.wanted:
                    self._made(self._value(found).name, is_false=False)
                case 15:
                    raise _bad("sparse weights are not taken")

    def _node(self, message: _Field, depth: int) -> None:
        """NodeProto: input = 1, output = 2, op_type = 4, attribute = 5, domain = 7."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise ModelFault(FaultCode.TOO_LARGE, f"the graph has more than {MAX_NODES} nodes")
        operator, inputs, third = "", 0, None
        outputs: list[str] = []
        values: list[bool] = []
        for found in self.reader.fields(message.start, _message_end(message)):
            match found.number:
                case 1 if found.is_bytes:
                    inputs += 1
                    if inputs == 3 and found.end > found.start:
                        third = found
                case 2 if self.wanted:
                    outputs.append(self.reader.text(found))
                case 4:
                    operator = self.reader.text(found)
                case 5:
                    values += self._attribute(found, depth)
                case 7:
                    _known(self.reader.text(found))
        if operator in _RANDOM:
            raise _bad(f"the operator {operator} draws at random")
        if operator == "Dropout" and third is not None:
            self.told.add(self.reader.text(third))
        for name in outputs:
            self._made(name, is_false=operator == "Constant" and values == [True])

    def _made(self, name: str, *, is_false: bool) -> None:
        if name in self.wanted:
            self.is_false[name] = is_false and self.is_false.get(name, True)

    def _attribute(self, message: _Field, depth: int) -> list[bool]:
        """AttributeProto: t = 5, g = 6, floats = 7, ints = 8, tensors = 10, graphs = 11, sparse tensors 22 and 23.

        Returns of each tensor in it whether it is a single False.
        """
        values = []
        for found in self.reader.fields(message.start, _message_end(message)):
            match found.number:
                case 5 | 10:
                    values.append(self._tensor(found)[1])
                case 6 | 11:
                    self._graph(found, depth=depth + 1)
                case 7:
                    self.parameters += (found.end - found.start) // 4 if found.is_bytes else 1
                case 8:
                    self.parameters += found.end - found.start if found.is_bytes else 1
                case 22 | 23:
                    raise _bad("sparse weights are not taken")
        return values

    def _tensor(self, message: _Field) -> tuple[str, bool]:
        """TensorProto: dims = 1, data_type = 2, name = 8, raw_data = 9, external_data = 13, data_location = 14.

        Returns its name, and whether it is a single False (in raw_data or int32_data = 5), where such are wanted.
        """
        name, dtype, raw_bytes = "", 0, None
        shape: list[int] = []
        values: list[int] = []
        for found in self.reader.fields(message.start, _message_end(message)):
            match found.number:
                case 1:
                    shape.extend(self._dimensions(found, most=MAX_DIMENSIONS - len(shape)))
                case 2:
                    dtype = found.value
                case 5 if self.wanted:
                    values += itertools.islice(self.reader.numbers(found), 2)
                case 8:
                    name = self.reader.text(found)
                case 9:
                    raw_bytes = found.end - found.start
                    if self.wanted and raw_bytes == 1:
                        values.append(self.reader.byte(found))
                case 13:
                    raise _bad(f"tensor {name[:80]!r} lies outside the file")
                case 14 if found.value != 0:
                    raise _bad(f"tensor {name[:80]!r} lies outside the file")
        if dtype not in _ELEMENT_BYTES and dtype != 8:
            raise _bad(f"tensor {name[:80]!r} has the element type {dtype}")
        elements = math.prod(shape)
        if raw_bytes is not None and raw_bytes != elements * _ELEMENT_BYTES.get(dtype, 0):
            raise _bad(f"tensor {name[:80]!r} has {raw_bytes} bytes, which its shape and type do not make")
        self.parameters += elements
        return name, dtype == _BOOL and elements == 1 and values == [0]

    def _dimensions(self, found: _Field, *, most: int) -> list[int]:
        dimensions = list(itertools.islice(self.reader.numbers(found), most + 1))
        if len(dimensions) > most:
            raise _too_many_dimensions()
        return dimensions

    def _value(self, message: _Field) -> _Value:
        """ValueInfoProto: name = 1, type = 2; TypeProto: tensor_type = 1."""
        value = _Value("")
        for found in self.reader.fields(message.start, _message_end(message)):
            match found.number:
                case 1:
                    value = _Value(self.reader.text(found), value.dtype, value.shape)
                case 2:
                    for kind in self.reader.fields(found.start, _message_end(found)):
                        if kind.number == 1:
                            dtype, shape = self._tensor_type(kind)
                            value = _Value(value.name, dtype, shape)
        return value

    def _tensor_type(self, message: _Field) -> tuple[int, tuple[int | None, ...] | None]:
        """TypeProto.Tensor: elem_type = 1, shape = 2; TensorShapeProto: dim = 1, of dim_value = 1 or dim_param = 2."""
        dtype, shape = 0, None
        for found in self.reader.fields(message.start, _message_end(message)):
            if found.number == 1:
                dtype = found.value
            elif found.number == 2:
                dimensions: list[int | None] = []
                for dimension in self.reader.fields(found.start, _message_end(found)):
                    if dimension.number == 1:
                        if len(dimensions) == MAX_DIMENSIONS:
                            raise _too_many_dimensions()
                        parts = self.reader.fields(dimension.start, _message_end(dimension))
                        # A dimension of 0 or below is how some exporters write an open one.
                        values = [part.value for part in parts if part.number == 1 and 0 < part.value < 1 << 63]
                        dimensions.append(values[-1] if values else None)
                shape = tuple(dimensions)
        return dtype, shape


def _message_end(found: _Field) -> int:
    if not found.is_bytes:
        raise _bad("a message is missing where the format has one")
    return found.end


def _known(domain: str) -> None:
    if domain not in _DOMAINS:
        raise _bad(f"operators of the domain {domain[:80]!r} are not taken")


def _too_many_dimensions() -> ModelFault:
    return ModelFault(FaultCode.TOO_LARGE, f"a tensor has more than {MAX_DIMENSIONS} dimensions")


def _bad(detail: str) -> ModelFault:
    return ModelFault(FaultCode.BAD_FORMAT, detail)
