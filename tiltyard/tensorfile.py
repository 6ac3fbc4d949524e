"""The header of a safetensors file, read without trusting it and without reading the tensors.

Format: 8 bytes of little-endian length, that many bytes of JSON, then the tensors' bytes without a gap
(https://github.com/huggingface/safetensors, "Format").
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# The largest spec's tensors take a seventh of it; a stranger's of 16 MiB held up whoever read it for seconds.
MAX_HEADER_BYTES = 2 * 1024 * 1024
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 8

# Bytes of one element.
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

Read = Callable[[int, int], bytes]
"""`read(offset, n)` gives n bytes of the file from offset on, fewer only at its end."""


class TensorFileError(ValueError):
    """The bytes are no safetensors file."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its safetensors dtype, shape, and where its bytes lie, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFileHeader:
    """What a safetensors file says of itself."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(read: Read, total_bytes: int) -> TensorFileHeader:
    """Read and check the header of a file of `total_bytes` bytes; it takes up to 30 times its bytes of memory.

    Tensors must cover the data without gap or overlap and agree with their dtype and shape.
    Raises TensorFileError with a sentence for the file's author.
    """
    if total_bytes < 10:
        raise TensorFileError(f"{total_bytes} bytes are too few for a safetensors file")
    header_bytes = int.from_bytes(_exactly(read, 0, 8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise TensorFileError(f"a header of {header_bytes} bytes is over the limit of {MAX_HEADER_BYTES}")
    data_start = 8 + header_bytes
    if data_start > total_bytes:
        raise TensorFileError(f"the header says {header_bytes} bytes, but the file has {total_bytes}")
    entries = _parse_json(_exactly(read, 8, header_bytes))
    metadata = _metadata(entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise TensorFileError(f"{len(entries)} tensors are over the limit of {MAX_TENSORS}")
    tensors = {name: _entry(name, value, data_start) for name, value in entries.items()}
    position = data_start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise TensorFileError(f"tensor {name[:80]!r} leaves a gap or overlaps another at byte {position}")
        position = entry.end
    if position != total_bytes:
        raise TensorFileError(f"the tensors end at byte {position}, but the file has {total_bytes}")
    return TensorFileHeader(tensors=tensors, metadata=metadata)


def _exactly(read: Read, offset: int, n: int) -> bytes:
    found = read(offset, n)
    if len(found) != n:
        raise TensorFileError("the file ends inside its header")
    return found


def _parse_json(raw: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise TensorFileError("the header has a name twice")
        return found

    def refuse(constant: str) -> object:
        raise TensorFileError(f"the header holds {constant}")

    if not raw.startswith(b"{"):
        raise TensorFileError("the header does not begin with '{'")
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except TensorFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"the header is not JSON: {type(error).__name__}") from error
    if not isinstance(parsed, dict):
        raise TensorFileError("the header is not a JSON object")
    return parsed


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise TensorFileError("__metadata__ must map names to texts")
    return value


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"tensor {name[:80]!r} must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise TensorFileError(f"tensor {name[:80]!r} has an unknown dtype")
    if not _natural_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise TensorFileError(f"tensor {name[:80]!r} has a bad shape")
    if not _natural_numbers(offsets) or len(offsets) != 2:
        raise TensorFileError(f"tensor {name[:80]!r} has bad data_offsets")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise TensorFileError(f"tensor {name[:80]!r} has {end - start} bytes, which its shape and dtype do not make")
    return TensorEntry(dtype=dtype, shape=tuple(shape), start=data_start + start, end=data_start + end)


def _natural_numbers(value: object) -> bool:
    # A bool is an int to Python, but not to the format.
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
