"""How many rows go into a batch: as many for every validator, so that no model fails at one and passes at another."""

import math

from services.validator.evaluation import CannotEvaluate
from tiltyard.modelspec import (
    Convnet,
    Mlp,
    ModelSpec,
    Onnx,
    Resnet,
    Transformer,
    image_shape,
    resnet_blocks,
    resnet_is_large,
)

BATCH_BYTES = 2 * 1024 * 1024
# Of one layer's float32 outputs; the memory limit of a task should hold a model's weights, not our batches.
LAYER_BYTES = 64 * 1024 * 1024
# Larger ones have the client wait for the server, or the server for the client.
MAX_ROWS = 4096
MAX_TENSOR_BYTES = 16 * 1024 * 1024 - 64 * 1024


def rows_per_batch(spec: ModelSpec, row_bytes: int) -> int:
    """Rows of `row_bytes` of features in one batch, 1 or more. Raises CannotEvaluate when one alone is over 16 MiB."""
    answer_bytes = 4 * spec.outputs
    if row_bytes > MAX_TENSOR_BYTES or answer_bytes > MAX_TENSOR_BYTES:
        raise CannotEvaluate(f"a row of {row_bytes} bytes with {spec.outputs} outputs is over the message limit")
    bounds = (
        MAX_ROWS,
        BATCH_BYTES // max(row_bytes, 1),
        BATCH_BYTES // answer_bytes,
        LAYER_BYTES // (4 * _widest_layer(spec)),
    )
    return max(1, min(bounds))


def _widest_layer(spec: ModelSpec) -> int:
    """The most numbers that one layer makes of one row."""
    widths = [spec.outputs]
    match spec.architecture:
        case Mlp(hidden=hidden):
            widths += hidden
        case Convnet(channels=channels, hidden=hidden):
            _, rows, columns = image_shape(spec)
            for count in channels:
                widths.append(count * rows * columns)
                rows, columns = -(-rows // 2), -(-columns // 2)
            widths += hidden
        case Resnet() as resnet:
            _, rows, columns = image_shape(spec)
            if resnet_is_large(spec):
                rows, columns = -(-rows // 2), -(-columns // 2)
            widths.append(resnet.width * rows * columns)
            if resnet_is_large(spec):
                rows, columns = -(-rows // 2), -(-columns // 2)
            for _, convolutions, _ in resnet_blocks(resnet):
                for each in convolutions:
                    rows, columns = -(-rows // each.stride), -(-columns // each.stride)
                    widths.append(each.outputs * rows * columns)
        case Transformer(width=width, heads=heads, feed_forward=feed_forward):
            tokens = spec.input_shape[0]
            # Where attention is not computed piece by piece, each head holds how much every token is to every other.
            widths += [3 * width * tokens, feed_forward * tokens, heads * tokens * tokens]
        case Onnx():
            # Unknown before it runs: a few dozen numbers for each of the input is what images commonly become.
            widths.append(64 * math.prod(spec.input_shape))
    return max(widths)
