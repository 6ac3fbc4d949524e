"""The demo's data: what it is, how its rows are divided among creator and nodes, and which models suit it."""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltyard.cli.connection import CommandError
from tiltyard.datasets import smallest
from tiltyard.datasources.npz import UNREADABLE
from tiltyard.type.v1 import model_pb2

Array = NDArray[Any]

EVALUATION_SHARE = 0.3
SEED = 20_240_917
_CHANNELS = (1, 2, 3, 4)
_LARGEST_CONVNET = (32, 64, 64, 128, 128, 128)


@dataclass(frozen=True)
class Rows:
    """Samples x [n, ...] with classes y [n] int64; `labels` are the original labels in order of class."""

    name: str
    x: Array
    y: NDArray[np.int64]
    labels: tuple[str, ...]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """Rows divided: the hidden evaluation set, and one disjoint shard a training node."""

    evaluation: Rows
    shards: tuple[Rows, ...]
    input_scale: float
    input_offset: float


@dataclass(frozen=True)
class NamedModel:
    """A model of the task with the name that people see."""

    name: str
    spec: model_pb2.ModelSpec


def load_digits() -> Rows:
    """The 1,797 handwritten digits that scikit-learn ships: images of 8 x 8 with values 0 to 16."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise CommandError("the digits come with scikit-learn (pip install scikit-learn); or use --data") from error
    digits = sklearn_digits()
    return _rows("scikit-learn's handwritten digits", digits.images.astype(np.uint8), digits.target)


def load_npz(path: Path) -> Rows:
    """Arrays x and y of a npz file: rows of features [n, d] or images [n, h, w], [n, c, h, w], [n, h, w, c].

    y holds whole numbers. Raises CommandError that says what does not fit.
    """
    try:
        # Of anything else numpy says how it could be unpickled.
        if path.is_file() and not zipfile.is_zipfile(path):
            raise CommandError(f"{path} is not a npz file of plain arrays")
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"x", "y"} - set(arrays.files)
            if missing:
                raise CommandError(f"{path} has no array {' and no array '.join(sorted(missing))}")
            x, y = arrays["x"], arrays["y"]
    except FileNotFoundError:
        raise CommandError(f"there is no file {path}") from None
    except (OSError, *UNREADABLE) as error:
        raise CommandError(f"{path} is not a npz file of plain arrays: {error}") from None
    return _rows(path.name, x, y)


def _rows(name: str, x: Array, y: Array) -> Rows:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise CommandError(f"y must hold one label a row, its shape is {y.shape}")
    if len(x) != len(y):
        raise CommandError(f"x has {len(x)} rows, y has {len(y)}")
    if y.dtype.kind == "f" and bool(np.isfinite(y).all()) and bool((y == np.trunc(y)).all()):
        y = y.astype(np.int64)
    if y.dtype.kind not in "iub":
        raise CommandError(f"y must hold integer labels, not {y.dtype}")
    if x.dtype.kind not in "iubf":
        raise CommandError(f"x must hold numbers, not {x.dtype}")
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise CommandError(f"x must be rows of features or images, its shape is {x.shape}")
    if x.dtype.kind == "f" and not bool(np.isfinite(x).all()):
        raise CommandError("x holds NaN or infinite values")
    if x.ndim == 4 and x.shape[3] in _CHANNELS and x.shape[1] not in _CHANNELS:
        # Channels last, as pictures are stored; the model takes channels first.
        x = np.moveaxis(x, 3, 1)
    originals, classes = np.unique(y, return_inverse=True)
    if len(originals) < 2:
        raise CommandError("y holds one class only; there is nothing to tell apart")
    labels = tuple(str(label) for label in originals.tolist())
    return Rows(name, smallest(np.ascontiguousarray(x)), classes.astype(np.int64), labels)


def split(rows: Rows, *, shards: int, seed: int = SEED) -> Split:
    """Puts 30 % of each class into the evaluation set and deals the rest to the shards, in an order set by `seed`.

    Bytes stay bytes and are scaled inside the model; wider features are standardised by the mean and deviation of the
    training rows. Raises CommandError when there are too few rows.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(rows.y))
    by_class = order[np.argsort(rows.y[order], kind="stable")]
    place = np.arange(len(by_class))
    hidden = np.floor((place + 1) * EVALUATION_SHARE) > np.floor(place * EVALUATION_SHARE)
    evaluation, training = by_class[hidden], by_class[~hidden]
    dealt = [random.permutation(training[shard::shards]) for shard in range(shards)]
    for shard in dealt:
        if len(shard) < 4 or len(np.unique(rows.y[shard])) < 2:
            raise CommandError(f"{len(rows.y)} rows are too few for {shards} training nodes")
    if not len(evaluation):
        raise CommandError(f"{len(rows.y)} rows are too few for an evaluation set")
    x, scale, offset = _scaled(rows.x, training)

    def part(index: Array) -> Rows:
        return Rows(rows.name, np.ascontiguousarray(x[index]), rows.y[index], rows.labels)

    return Split(part(random.permutation(evaluation)), tuple(part(index) for index in dealt), scale, offset)


def _scaled(x: Array, training: Array) -> tuple[Array, float, float]:
    known = x[training]
    if x.dtype.kind in "iu" and x.dtype.itemsize == 1:
        return x, 1.0 / max(1.0, float(np.abs(known.astype(np.int16)).max())), 0.0
    if x.ndim == 2:
        # Columns of a table have units of their own, which one factor cannot level.
        mean, deviation = known.mean(axis=0, dtype=np.float64), known.std(axis=0, dtype=np.float64)
        return ((x - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32), 1.0, 0.0
    if x.dtype.kind in "iu":
        return x, 1.0 / max(1.0, float(np.abs(known.astype(np.float64)).max())), 0.0
    mean, deviation = float(known.mean(dtype=np.float64)), float(known.std(dtype=np.float64)) or 1.0
    return x.astype(np.float32), 1.0 / deviation, -mean / deviation


def models_for(divided: Split) -> list[NamedModel]:
    """Three different models by the data's shape: mlp, linear and convnet for images, two mlps and linear else."""
    rows = divided.evaluation
    shape = rows.x.shape[1:]

    def spec(**architecture: Any) -> model_pb2.ModelSpec:
        return model_pb2.ModelSpec(
            input_shape=shape,
            outputs=rows.classes,
            input_scale=divided.input_scale,
            input_offset=divided.input_offset,
            **architecture,
        )

    linear = NamedModel("linear", spec(linear=model_pb2.Linear()))
    if len(shape) == 1:
        return [
            NamedModel("mlp-wide", spec(mlp=model_pb2.Mlp(hidden=[256, 128], dropout=0.1))),
            linear,
            NamedModel("mlp-small", spec(mlp=model_pb2.Mlp(hidden=[32]))),
        ]
    # Each block halves the image, as long as it has a side of about four pixels at the end.
    blocks = max(1, min(len(_LARGEST_CONVNET), round(math.log2(min(shape[-2:]) / 4)) + 1))
    convnet = model_pb2.Convnet(channels=_LARGEST_CONVNET[:blocks], hidden=[128])
    return [
        NamedModel("mlp", spec(mlp=model_pb2.Mlp(hidden=[256], dropout=0.1))),
        linear,
        NamedModel("convnet", spec(convnet=convnet)),
    ]


def epochs_for(rows: int) -> int:
    """Passes over a shard: as many as small data needs, few enough that large data does not take all day."""
    return max(3, min(40, 50_000 // rows))
