"""A model on rows: batches checked, run alone or several small ones as one, and their outputs."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.modelserver.loading import LoadedModel, is_out_of_memory
from services.runtime.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from tiltyard.models.onnxmodel import GraphFailed, OnnxNetwork
from tiltyard.modelspec import ModelSpec

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# What an answer may hold beside the logits.
ENVELOPE_BYTES = 64 * 1024

# Where the CPU computes; measured for perceptrons (a tenth faster) and convnets.
_PIECE_BYTES = 1024 * 1024
_LEAST_PIECE_ROWS = 64
# Where a GPU computes, few rows cost as much as many.
_DEVICE_BATCH_BYTES = 4 * 1024 * 1024

# The protocol's data types that a model takes; the network turns each into float32.
DATATYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "UINT16": torch.uint16,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}

with warnings.catch_warnings():
    # torch warns once in a process that a read-only buffer must not be written to; no batch ever is.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


@dataclass(frozen=True)
class Batch:
    """Rows for a model: `data` holds them row-major and little-endian in `datatype`, shape [n, ...input_shape]."""

    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True)
class Logits:
    """What a model answered: float32, row-major, shape [n, outputs] where the model keeps to its spec.

    `data` is empty where it does not, and the numbers are more than a message holds.
    """

    shape: tuple[int, ...]
    data: bytes | memoryview


def check_batch(batch: Batch, spec: ModelSpec) -> None:
    """Raises InvalidArgument, naming the field, for a batch that is none for this model."""
    if batch.datatype not in DATATYPES:
        raise InvalidArgument.field("inputs[0].datatype", f"must be one of {', '.join(DATATYPES)}")
    rows, row_shape = batch.shape[:1], batch.shape[1:]
    if not rows or rows[0] < 1 or row_shape != spec.input_shape:
        wanted = ", ".join(["n", *map(str, spec.input_shape)])
        raise InvalidArgument.field("inputs[0].shape", f"must be [{wanted}] with n at least 1, is {list(batch.shape)}")
    expected = DATATYPES[batch.datatype].itemsize
    for size in batch.shape:
        expected *= size
    if len(batch.data) != expected:
        raise InvalidArgument.field("raw_input_contents[0]", f"must have {expected} bytes, has {len(batch.data)}")
    if batch.shape[0] * spec.outputs * 4 > MAX_MESSAGE_BYTES - ENVELOPE_BYTES:
        raise InvalidArgument.field("inputs[0].shape", "has more rows than one answer of 16 MiB can hold")


def joint_rows(model: LoadedModel) -> int:
    """Up to how many rows of several batches run as one: what a core or a device takes at once anyway.

    Batches of as many rows or more run alone, so that an evaluation's answers do not depend on who else asks. A graph
    of somebody else's making may mix its rows, so it always runs alone: 0.
    """
    if isinstance(model.network, OnnxNetwork):
        return 0
    row_bytes = 4 * math.prod(model.spec.input_shape)
    return _piece_rows(model.spec) if model.device == "cpu" else max(1, _DEVICE_BATCH_BYTES // row_bytes)


def run_batches(model: LoadedModel, batches: Sequence[Batch]) -> list[Logits]:
    """The outputs of each batch, in their order; several run as one and have one datatype.

    Raises FailedPrecondition when the model fails on these rows, ResourceExhausted when memory does not suffice.
    """
    try:
        with torch.inference_mode():
            rows = [_rows(batch) for batch in batches]
            logits = _forward(model, rows[0] if len(rows) == 1 else torch.cat(rows))
        if len(batches) == 1:
            return [_logits(logits)]
        return [_logits(part) for part in torch.split(logits, [len(each) for each in rows])]
    except GraphFailed as error:
        raise FailedPrecondition("MODEL_FAILED", str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rows_in_all = sum(batch.shape[0] for batch in batches)
        raise ResourceExhausted("OUT_OF_MEMORY", f"{rows_in_all} rows do not fit in memory") from error


def _rows(batch: Batch) -> torch.Tensor:
    return torch.frombuffer(batch.data, dtype=DATATYPES[batch.datatype]).reshape(batch.shape)


def _logits(logits: torch.Tensor) -> Logits:
    if logits.nbytes > MAX_MESSAGE_BYTES - ENVELOPE_BYTES:
        # Of the spec's shape it would fit, see `check_batch`; who judges the shape needs no numbers.
        return Logits(tuple(logits.shape), b"")
    return Logits(tuple(logits.shape), logits.numpy().reshape(-1).view("u1").data)


def _forward(model: LoadedModel, rows: torch.Tensor) -> torch.Tensor:
    """The logits of a batch, float32 on the CPU; there, piece by piece, which is faster and gives the same bits."""
    if model.device != "cpu":
        answered: torch.Tensor = model.network(rows.to(model.device))
        return answered.to("cpu", torch.float32).contiguous()
    if isinstance(model.network, OnnxNetwork):
        # Whatever shape it gives is for the client to judge.
        return model.network(rows)
    logits = torch.empty((len(rows), model.spec.outputs), dtype=torch.float32)
    step = _piece_rows(model.spec)
    for start in range(0, len(rows), step):
        logits[start : start + step] = model.network(rows[start : start + step])
    return logits


def _piece_rows(spec: ModelSpec) -> int:
    """Rows whose float32 features fit a core's cache beside the weights that they are multiplied with."""
    return max(_LEAST_PIECE_ROWS, _PIECE_BYTES // (4 * math.prod(spec.input_shape)))
