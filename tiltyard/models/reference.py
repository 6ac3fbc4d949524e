"""The reference for disputes: a model's predictions on the CPU in float32, rows in order.

`python -m tiltyard.models.reference DATA MODEL OUT INDEX` with a serialised TaskConfig on standard input.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tiltyard.datasets import Dataset, DatasetError
from tiltyard.models.onnxmodel import OnnxNetwork
from tiltyard.models.weights import load_model
from tiltyard.modelspec import ModelFault, ModelSpec, Onnx
from tiltyard.type.v1 import task_pb2
from tiltyard.wire import model_spec_from_proto


def predictions(
    config: task_pb2.TaskConfig,
    index: int,
    data: Path,
    model: Path,
    *,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.int32]:
    """One prediction for each row, as `tiltyard.type.v1.EvaluationReport.prediction_root` is over them.

    `progress` is told how many rows there are predictions for.
    """
    dataset = Dataset.open(data)
    network = _network(model_spec_from_proto(config.models[index]), model)
    answers = np.empty(len(dataset), dtype="<i4")
    with torch.inference_mode():
        for start, part in dataset.chunks("x"):
            outputs = network(torch.from_numpy(part)).numpy()
            stop = start + len(part)
            if config.metric == task_pb2.METRIC_WITHIN_BOUND:
                targets = dataset.y[start:stop].astype(np.float64).reshape(outputs.shape)
                answers[start:stop] = np.abs(outputs.astype(np.float64) - targets).max(axis=1) <= config.bound
            else:
                answers[start:stop] = outputs.argmax(axis=1)
            if progress:
                progress(stop)
    return answers


def _network(spec: ModelSpec, model: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    if isinstance(spec.architecture, Onnx):
        size_bytes = model.stat().st_size
        network, _ = OnnxNetwork.load(spec, model, max_bytes=size_bytes, max_parameters=size_bytes)
        return network
    return load_model(spec, model)


def main(data: str, model: str, out: str, index: str) -> None:
    """Writes the predictions, and says line by line how many there are by then."""

    def say(rows: int) -> None:
        sys.stdout.write(f"{rows}\n")
        sys.stdout.flush()

    config = task_pb2.TaskConfig.FromString(sys.stdin.buffer.read())
    found = predictions(config, int(index), Path(data), Path(model), progress=say)
    Path(out).write_bytes(found.tobytes())
    say(len(found))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (DatasetError, ModelFault, OSError) as error:
        sys.exit(f"error: {error}")
