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
    there is one output the label is its target.
    """

    def __init__(
        self, x: np.ndarray, y: np.ndarray, *, loss: LossKind, outputs: int, device: str, in_memory: bool | None = None
    ) -> None:
        self._device = torch.device(device)
        self._x = x
        self.labelled = y.dtype.kind in "iu" and loss.takes_labels()
        self._one_hot = outputs if self.labelled and loss is not LossKind.CROSS_ENTROPY and outputs > 1 else 0
        labels = (
            y.astype(np.int64)
            if loss is LossKind.CROSS_ENTROPY or self._one_hot
            else y.astype(np.float32).reshape(-1, outputs)
        )
        self._y = torch.from_numpy(labels).to(self._device)
        self.row_bytes = max(1, x.nbytes // max(1, len(x)))
        fits = x.nbytes <= _memory_bytes(self._device) // 4 if in_memory is None else in_memory
        self._resident = _tensor(np.asarray(x)).to(self._device) if fits else None
        self.on_disk = self._resident is None

    def __len__(self) -> int:
        return len(self._y)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the rows at `indices` (int64, on the CPU), on the device."""
        y = self._y[indices.to(self._device)]
        if self._one_hot:
            y = torch.nn.functional.one_hot(y, self._one_hot).to(torch.float32)
        if self._resident is not None:
            return self._resident[indices.to(self._device)], y
        x = _tensor(self._x[indices.numpy()])
        if self._device.type == "cuda":
            return x.pin_memory().to(self._device, non_blocking=True), y
        return x, y


def _tensor(x: np.ndarray) -> Tensor:
    """A tensor of its own memory: a memory map is read-only, which torch's tensors cannot be."""
    dtype = _WIDENED.get(x.dtype.str[1:], x.dtype)
    return torch.from_numpy(np.array(x, dtype=dtype, order="C", copy=True))


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory_bytes()
