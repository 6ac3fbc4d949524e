"""Which rows make up each batch: a share is held out, the rest comes in an order that seed and epoch fix."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from services.trainer.descent.rows import Rows

# What a row's number takes in memory is half of int64, where that will do.
_NARROW_ROWS = 1 << 31
_MAPPED_AT_ONCE = 1 << 20
# Rows are gathered for many batches at once: one copy of 16 MiB costs less than a thousand small ones.
_GATHERED_BYTES = 16 * 1024 * 1024


def split(rows: int, *, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices held out (the share, rounded down), by a permutation that the seed fixes."""
    order = _permutation(rows, seed, "holdout")
    train, held_out = order[int(share * rows) :], order[: int(share * rows)]
    for part in (train, held_out):
        part.numpy().sort()  # where they lie: torch would take as much memory again, and as much for their places
    return train, held_out


class Batches:
    """The rows at `indices` in batches of `size`, the last one of an epoch with what is left."""

    def __init__(self, rows: Rows, indices: Tensor, *, size: int, seed: int) -> None:
        self._rows = rows
        self._indices = indices
        self._size = size
        self._seed = seed

    def of_epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from the `first` on, in the order that seed and epoch fix."""
        size, count = self._size, len(self._indices)
        order = _permutation(count, self._seed, f"epoch {epoch}")
        for part in torch.split(order, _MAPPED_AT_ONCE):
            part.copy_(self._indices[part])
        gathered = max(1, _GATHERED_BYTES // (size * self._rows.row_bytes))
        # A resumed epoch gathers from where an uninterrupted one did: the offset of a batch in memory decides
        # which instructions its product is computed with, and with them the last bit.
        starts = range(first // gathered * gathered, -(-count // size), gathered)
        taken = self._taken(order[start * size : (start + gathered) * size].long() for start in starts)
        for start, (x, y) in zip(starts, taken, strict=True):
            yield from list(zip(torch.split(x, size), torch.split(y, size), strict=True))[max(0, first - start) :]

    def _taken(self, parts: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of each part; while one is trained on, the next is read from disk, pinned and copied."""
        if not self._rows.on_disk:
            yield from map(self._rows.take, parts)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as reader:
            ahead = None
            for part in parts:
                behind, ahead = ahead, reader.submit(self._rows.take, part)
                if behind is not None:
                    yield behind.result()
            if ahead is not None:
                yield ahead.result()


def _permutation(count: int, seed: int, purpose: str) -> Tensor:
    """The numbers below `count` in an order that seed and purpose fix: the same in int32 as in int64."""
    mixed = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "big") >> 1)
    return torch.randperm(count, generator=generator, dtype=torch.int32 if count < _NARROW_ROWS else torch.int64)
