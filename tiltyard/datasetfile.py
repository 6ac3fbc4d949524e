"""The file of a dataset, written from pieces that need not be in memory together."""

import json
import math
import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tiltyard.datasources import Array, DatasetError, raw
from tiltyard.tensorfile import MAX_HEADER_BYTES

LABELS_KEY = "labels"

# The file's dtypes in numpy's words. BF16 has none.
NUMPY_OF = {
    "BOOL": "?", "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "I32": "<i4", "I64": "<i8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
FILE_DTYPE = {np.dtype(numpy): name for name, numpy in NUMPY_OF.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written, its rows in pieces of this dtype."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    parts: Iterable[Array]

    @property
    def size_bytes(self) -> int:
        """Bytes of all pieces together."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, x: Tensor, y: Tensor, *, labels: Sequence[int | str] | None = None) -> None:
    """Write a dataset's file, which appears whole or not at all. The same rows give the same bytes.

    Raises OSError, DatasetError for what a reader would refuse, and whatever the pieces raise.
    """
    if len(x.shape) < 2:
        raise DatasetError(f"x must have the shape (rows, ...features), has {x.shape}")
    if not x.shape[0]:
        raise DatasetError("a dataset needs at least one row")
    if not x.size_bytes:
        raise DatasetError(f"the rows of x are empty, their shape is {x.shape[1:]}")
    header: dict[str, object] = {} if labels is None else {"__metadata__": {LABELS_KEY: json.dumps(list(labels))}}
    position = 0
    for name, tensor in (("y", y), ("x", x)):
        header[name] = {
            "dtype": FILE_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size_bytes],
        }
        position += tensor.size_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES:
        raise DatasetError(f"the names of {len(labels or ())} labels take over {MAX_HEADER_BYTES} bytes")
    _write_whole(path, chain([len(encoded).to_bytes(8, "little"), encoded], map(raw, chain(y.parts, x.parts))))


def _write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _opened(temporary) as file:
        try:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            if not temporary.exists():
                # With a folder's descriptor, which it ignores, os.link follows the link that /proc has.
                os.link(f"/proc/self/fd/{file.fileno()}", temporary, src_dir_fd=file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _opened(temporary: Path) -> BinaryIO:
    """A file without a name, which goes with the process; a named one where there are no others."""
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):
            return os.fdopen(os.open(temporary.parent, os.O_TMPFILE | os.O_WRONLY, 0o600), "wb")
    return os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")
