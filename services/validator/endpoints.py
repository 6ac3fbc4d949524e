"""One attempt at an evaluation on model servers of the operator's own, which load the model from a shared folder."""

import asyncio
import contextlib
import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TypeVar

from services.validator.elsewhere import connected, count
from services.validator.evaluation import Job
from services.validator.fleet import Endpoint, ModelServer
from services.validator.repository import Loads, unload
from services.validator.rows import EvaluationRows
from services.validator.runs import Finding, Progress
from tiltyard.calls.tls import ChannelTls
from tiltyard.identity import Key
from tiltyard.modelspec import Onnx, to_json

T = TypeVar("T")

_PLACEHOLDER = b"${MODEL}"


class EndpointAttempts:
    """Attempts on `servers`, all of them at once for each, with the model under a name of its own in `share`.

    `tls` is how peers are called; a server says by itself whether it is one of them.
    """

    def __init__(
        self,
        servers: Sequence[ModelServer],
        *,
        share: Path,
        template: Path | None,
        key: Key,
        concurrency: int,
        tls: ChannelTls | None = None,
    ) -> None:
        self._servers = tuple(servers)
        self._share = share
        self._template = template
        self._key = key
        self._tls = tls
        self._prefix = f"tiltyard-{key.id[:12]}"
        self._threads = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="evaluation")

    def isolation(self) -> str:
        """Who confines the models, in one sentence."""
        names = ", ".join(server.name for server in self._servers)
        return f"Models run on the operator's own model servers ({names}), which the validator does not confine."

    async def tidy(self) -> None:
        """Removes the models that an earlier process left, from the servers' memory and from the shared folder."""
        # Listed before any other model can have been placed.
        hidden = list(self._share.glob(f".{self._prefix}-*"))
        left = list(self._share.glob(f"{self._prefix}-*"))
        if hidden or left:
            await asyncio.to_thread(self._remove, left, hidden)

    def _remove(self, left: Sequence[Path], hidden: Sequence[Path]) -> None:
        with ExitStack() as stack:
            endpoints = [stack.enter_context(self._connected(server)) for server in self._servers] if left else []
            for folder in left:
                unload(endpoints, folder.name)
        for folder in (*left, *hidden):
            shutil.rmtree(folder, ignore_errors=True)

    async def attempt(self, job: Job, progress: Progress) -> Finding:
        """The counts. Raises ModelFailed, ServerLost and CannotEvaluate; leaves no model behind."""
        loop = asyncio.get_running_loop()
        with EvaluationRows.open(job.dataset) as rows, ExitStack() as stack:
            rows.check_shape(job.order.spec.input_shape)
            progress.begin(rows.total)
            name = f"{self._prefix}-{job.order.model_digest[:16]}-{secrets.token_hex(4)}"
            stack.callback(shutil.rmtree, self._share / name, ignore_errors=True)
            await _to_its_end(loop.run_in_executor(None, self._place, job, name))
            endpoints = [stack.enter_context(self._connected(server)) for server in self._servers]
            try:
                loads = Loads(endpoints, name)
                loaded = await _to_its_end(loop.run_in_executor(None, loads.run), loads.give_up)
                return await count(
                    loaded, model=name, rows=rows, order=job.order, progress=progress, threads=self._threads
                )
            finally:
                await _to_its_end(loop.run_in_executor(None, unload, endpoints, name))

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()

    def _place(self, job: Job, name: str) -> None:
        """Puts the model into the shared folder; it appears there whole."""
        hidden = self._share / f".{name}"
        hidden.mkdir(parents=True)
        try:
            if self._template is not None:
                shutil.copytree(self._template, hidden, dirs_exist_ok=True)
                for path in filter(Path.is_file, hidden.rglob("*")):
                    path.write_bytes(path.read_bytes().replace(_PLACEHOLDER, name.encode()))
            (hidden / "spec.json").write_text(json.dumps(to_json(job.order.spec)))
            onnx = isinstance(job.order.spec.architecture, Onnx)
            shutil.copyfile(job.model, hidden / ("model.onnx" if onnx else "model.safetensors"))
            hidden.rename(self._share / name)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise

    def _connected(self, server: ModelServer) -> AbstractContextManager[Endpoint]:
        by_tls = self._tls is not None if server.tls is None else server.tls
        return connected(
            server.name,
            server.address,
            key=self._key,
            audience=server.key_id,
            # Read for each evaluation, so that certificates may be replaced meanwhile.
            credentials=(self._tls or ChannelTls()).credentials() if by_tls else None,
            peer=server.address,
        )


async def _to_its_end(work: asyncio.Future[T], give_up: Callable[[], None] = lambda: None) -> T:
    """The result of a thread's work. When this is cancelled the work goes on all the same, and is waited for.

    `give_up` is called then: what the work would still bring about, nobody would take back.
    """
    try:
        return await asyncio.shield(work)
    finally:
        while not work.done():
            give_up()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
