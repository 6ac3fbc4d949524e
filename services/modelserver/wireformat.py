"""Inference messages taken apart and put together by hand where protobuf would copy the tensors.

The bytes on the wire are the Open Inference Protocol's; `raw_input_contents` and `raw_output_contents` alone are kept
out of protobuf's hands. Encoding: https://protobuf.dev/programming-guides/encoding/.
"""

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.varint import encode_varint

_LENGTH = 2
_RAW_INPUT = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
# Tags of two fields that hold bytes or a message.
_RAW_OUTPUT_TAG = bytes([pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER << 3 | _LENGTH])
_INFER_RESPONSE_TAG = bytes([pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER << 3 | _LENGTH])


@dataclass(frozen=True)
class RawRequest:
    """A request without its tensors (`raw_input_contents` is empty), and the tensors as views of the received bytes."""

    message: pb.ModelInferRequest
    raw: tuple[memoryview, ...]


def parse_request(received: bytes) -> RawRequest:
    """Read a serialised ModelInferRequest. Raises DecodeError for bytes that are none."""
    view = memoryview(received)
    raw: list[memoryview] = []
    rest: list[memoryview] = []
    position, kept = 0, 0
    while position < len(view):
        tag, after = _read_varint(view, position)
        end = _field_end(view, tag & 7, after)
        if tag == _RAW_INPUT << 3 | _LENGTH:
            _, start = _read_varint(view, after)
            raw.append(view[start:end])
            rest.append(view[kept:position])
            kept = end
        position = end
    rest.append(view[kept:])
    return RawRequest(pb.ModelInferRequest.FromString(b"".join(rest)), tuple(raw))


def encode_response(head: pb.ModelInferResponse, tensor: bytes | memoryview) -> bytes:
    """A ModelInferResponse with one raw output beside what `head` holds, serialised."""
    return b"".join((head.SerializeToString(), _RAW_OUTPUT_TAG, encode_varint(len(tensor)), tensor))


def encode_stream_response(head: pb.ModelInferResponse, tensor: bytes | memoryview) -> bytes:
    """A ModelStreamInferResponse with that answer, serialised."""
    front = b"".join((head.SerializeToString(), _RAW_OUTPUT_TAG, encode_varint(len(tensor))))
    return b"".join((_INFER_RESPONSE_TAG, encode_varint(len(front) + len(tensor)), front, tensor))


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(view) and shift < 64:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise DecodeError("a number is cut off or too long")


def _field_end(view: memoryview, wire_type: int, position: int) -> int:
    """Where a field ends whose value begins at `position`."""
    match wire_type:
        case 0:
            _, end = _read_varint(view, position)
        case 1:
            end = position + 8
        case 2:
            size, start = _read_varint(view, position)
            end = start + size
        case 5:
            end = position + 4
        case _:
            raise DecodeError(f"a field has the wire type {wire_type}")
    if end > len(view):
        raise DecodeError("a field is cut off")
    return end
