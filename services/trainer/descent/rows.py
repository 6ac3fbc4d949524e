"""The local dataset as torch tensors, row by row: in the device's memory where it fits, else read from disk."""

import numpy as np
import torch
from torch import Tensor

from services.runtime.memory import memory_bytes
from services.trainer.config import LossKind

# What torch can hold but not index is widened.
_WIDENED = {"u2": np.int32, "u4": np.int64, "u8": np.int64}


class Rows:
    """N rows [N, ...] with labels [N] (cross-entropy) or targets [N, outputs] (the other losses).

    Binary cross-entropy takes labels too: each becomes the target 1 of its own output and 0 of the others, and where
    there is one output the label is its target. So many processes are `sharing` the machine's memory.
    """

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        *,
        loss: LossKind,
        outputs: int,
        device: str,
        in_memory: bool | None = None,
        sharing: int = 1,
    ) -> None:
        self._device = torch.device(device)
        self._x = x
        self.labelled = y.dtype.kind in "iu" and loss.takes_labels()
        self._classes = loss is LossKind.CROSS_ENTROPY or (self.labelled and outputs > 1)
        self._outputs = outputs
        self._one_hot = self._classes and loss is not LossKind.CROSS_ENTROPY
        self.row_bytes = max(1, x.nbytes // max(1, len(x)))
        size = x.nbytes + (0 if self._classes else y.nbytes)
        fits = size <= _memory_bytes(self._device, sharing) // 4 if in_memory is None else in_memory
        self._resident = _tensor(x).to(self._device) if fits else None
        self.on_disk = self._resident is None
        self._y: Tensor | np.ndarray = y
        if self._classes:
            # Also where rows are read from disk: each label would be one more place to read from.
            self._y = torch.from_numpy(y.astype(_holding_labels(outputs)))
        elif fits:
            self._y = torch.from_numpy(y.astype(np.float32)).reshape(-1, outputs)
        if isinstance(self._y, Tensor) and fits:
            self._y = self._y.to(self._device)

    def __len__(self) -> int:
        return len(self._x)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the rows at `indices` (int64, on the CPU), on the device."""
        if self._resident is None:
            x, y = self._on_its_way(_tensor(self._x[indices.numpy()])), self._on_its_way(self._labels(indices))
        else:
            places = indices.to(self._device)
            x, y = self._resident[places], self._labels(places)
        if self._classes:
            y = y.to(torch.int64)
        if self._one_hot:
            y = torch.nn.functional.one_hot(y, self._outputs).to(torch.float32)
        return x, y

    def _labels(self, places: Tensor) -> Tensor:
        if isinstance(self._y, Tensor):
            return self._y[places]
        return torch.from_numpy(self._y[places.numpy()].astype(np.float32)).reshape(-1, self._outputs)

    def _on_its_way(self, rows: Tensor) -> Tensor:
        """What was read from disk, on the device: nobody waits until it is there."""
        return rows.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else rows


def _holding_labels(classes: int) -> type[np.uint8] | type[np.int32]:
    """The smaller of two dtypes that torch can index by: of a hundred million rows a byte each, not eight."""
    return np.uint8 if classes <= 1 << 8 else np.int32


def _tensor(x: np.ndarray) -> Tensor:
    """A tensor of its own memory: a memory map is read-only, which torch's tensors cannot be."""
    dtype = _WIDENED.get(x.dtype.str[1:], x.dtype)
    return torch.from_numpy(np.array(x, dtype=dtype, order="C", copy=True))


def _memory_bytes(device: torch.device, sharing: int) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory_bytes() // sharing
