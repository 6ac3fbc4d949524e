"""Several processes that descend as one: each takes a part of every batch, and their gradients are added up."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, distributed


class WorkerLost(Exception):
    """Another worker is gone: nobody's fault, and the run may go on from its checkpoint."""


class Workers(Protocol):
    """The processes of one training, seen from one of them: number `rank` of `size`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all workers, which wait for each other here. Raises WorkerLost."""
        ...


class ProcessGroup:
    """Workers over torch's default process group: gloo on CPUs, NCCL on CUDA devices."""

    @property
    def rank(self) -> int:
        """This worker, from 0."""
        return distributed.get_rank()

    @property
    def size(self) -> int:
        """All workers."""
        return distributed.get_world_size()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """One message for all tensors: most are too small to be worth one each."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        try:
            distributed.all_reduce(flat)
        except RuntimeError as error:  # gloo and NCCL have no class of their own for it
            raise WorkerLost(str(error)) from error
        for tensor, summed in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
