"""The rows of an evaluation dataset, read range by range, so that a file larger than memory is no burden."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from services.validator.evaluation import CannotEvaluate
from tiltyard.tensorfile import DTYPE_BYTES, TensorFileError, TensorFileHeader, read_header

# What the Open Inference Protocol calls the dtypes of a dataset's features.
_OIP_DATATYPE = {
    "BOOL": "BOOL", "U8": "UINT8", "I8": "INT8", "U16": "UINT16", "I16": "INT16", "I32": "INT32", "I64": "INT64",
    "F16": "FP16", "F32": "FP32", "F64": "FP64",
}  # fmt: skip
_LABEL_DTYPE: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "F32": np.dtype("<f4")}


@dataclass(frozen=True)
class EvaluationRows:
    """An open dataset of `total` rows; `row_bytes` of features each, of shape `row_shape`, `datatype` by the OIP.

    Reads with pread and not through a memory map, whose pages would stay resident.
    """

    total: int
    row_shape: tuple[int, ...]
    row_bytes: int
    datatype: str
    _descriptor: int
    _features_start: int
    _labels_start: int
    _label_dtype: np.dtype[Any]
    _label_values: int
    """Values of y in each row: 1, or the targets of a regression with several."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens a dataset. Raises CannotEvaluate for what is none, and OSError."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cls._of(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def _of(cls, descriptor: int) -> Self:
        tensors = _header(descriptor).tensors
        if "x" not in tensors or "y" not in tensors:
            raise CannotEvaluate("the dataset lacks x or y")
        x, y = tensors["x"], tensors["y"]
        if not x.shape or y.shape[:1] != x.shape[:1] or x.shape[0] == 0 or len(y.shape) > 2:
            raise CannotEvaluate(f"x of shape {x.shape} and y of shape {y.shape} are no dataset")
        if y.dtype not in _LABEL_DTYPE:
            raise CannotEvaluate(f"labels are {y.dtype}, neither I64 nor F32")
        if x.dtype not in _OIP_DATATYPE:
            raise CannotEvaluate(f"features are {x.dtype}, which no model server takes")
        return cls(
            total=x.shape[0],
            row_shape=x.shape[1:],
            row_bytes=math.prod(x.shape[1:]) * DTYPE_BYTES[x.dtype],
            datatype=_OIP_DATATYPE[x.dtype],
            _descriptor=descriptor,
            _features_start=x.start,
            _labels_start=y.start,
            _label_dtype=_LABEL_DTYPE[y.dtype],
            _label_values=math.prod(y.shape[1:]),
        )

    def check_shape(self, input_shape: tuple[int, ...]) -> None:
        """Raises CannotEvaluate when the rows are not what a model of this input takes."""
        if self.row_shape != input_shape:
            raise CannotEvaluate(f"rows of the dataset have shape {self.row_shape}, the model's input {input_shape}")

    def features(self, start: int, stop: int) -> bytes:
        """Rows `start` to `stop` of x, raw and little-endian."""
        return self._read(self._features_start + start * self.row_bytes, (stop - start) * self.row_bytes)

    def labels(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of y: int64 classes [n], or float32 targets [n] or [n, targets]."""
        row_bytes = self._label_dtype.itemsize * self._label_values
        raw = self._read(self._labels_start + start * row_bytes, (stop - start) * row_bytes)
        values = np.frombuffer(raw, dtype=self._label_dtype)
        return values if self._label_values == 1 else values.reshape(stop - start, self._label_values)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, offset: int, n: int) -> bytes:
        found = os.pread(self._descriptor, n, offset)
        while len(found) < n:
            more = os.pread(self._descriptor, n - len(found), offset + len(found))
            if not more:
                raise CannotEvaluate("the dataset's file became shorter while it was read")
            found += more
        return found


def _header(descriptor: int) -> TensorFileHeader:
    try:
        return read_header(lambda offset, n: os.pread(descriptor, n, offset), os.fstat(descriptor).st_size)
    except TensorFileError as error:
        raise CannotEvaluate(f"the dataset is no safetensors file: {error}") from error
