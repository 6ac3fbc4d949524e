"""Keeps a run's checkpoints while the run goes on: copied between two updates, written by a thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from services.trainer.descent.checkpoints import Checkpoint, save_checkpoint


class CheckpointKeeper:
    """Writes checkpoints to one place, one at a time. Use it in a `with`, which waits for the last one.

    `persist` is called with what could not be written by the thread, and does it or waits, so that a run pauses between
    two updates; `warn` is told what cannot be helped. Copying takes a twentieth of the time that writing does.
    """

    def __init__(
        self, path: Path, *, persist: Callable[[Callable[[], None]], bool], warn: Callable[[str], None]
    ) -> None:
        self._path = path
        self._persist = persist
        self._warn = warn
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copy = Checkpoint({}, {})
        self._written: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def keep(self, state: Checkpoint) -> None:
        """Has a copy of the state written; waits for the one before."""
        self.settle()
        self._copy = Checkpoint(self._copied(state), state.facts)
        self._written = self._thread.submit(save_checkpoint, self._path, self._copy)

    def look(self) -> None:
        """Deals with what the thread has met, once it has ended."""
        if self._written is not None and self._written.done():
            self.settle()

    def settle(self) -> None:
        """Waits until what was kept last has been written, or cannot be."""
        written, self._written = self._written, None
        if written is None:
            return
        try:
            written.result()
        except OSError:
            try:
                self._persist(lambda: save_checkpoint(self._path, self._copy))
            except OSError as error:
                self._warn(f"no checkpoint at step {self._copy.facts['step']}: {error}")

    def _copied(self, state: Checkpoint) -> dict[str, Tensor]:
        """The state's tensors on the CPU, where those of the last one were: fresh memory takes five times as long."""
        before = self._copy.tensors
        tensors = {}
        for name, tensor in state.tensors.items():
            place = before.get(name)
            if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
                place = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensors[name] = place.copy_(tensor.detach())
        return tensors
