"""One attempt at an evaluation on model servers of the operator's own, which load the model from a shared folder."""

import asyncio
import json
import secrets
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import grpc
import structlog

from services.validator.elsewhere import connected, count
from services.validator.evaluation import CannotEvaluate, Job, ServerLost
from services.validator.fleet import Endpoint, ModelServer, wanted_wait_s
from services.validator.rows import EvaluationRows
from services.validator.runs import Finding, Progress
from tiltyard.identity import Key
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc
from tiltyard.modelspec import Onnx, to_json
from tiltyard.tls import ChannelTls

_LOAD_TIMEOUT_S = 300.0
_UNLOAD_TIMEOUT_S = 10.0
_PLACEHOLDER = b"${MODEL}"

_log = structlog.get_logger("tiltyard.validator")


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
        """Removes the models that an earlier process left in the shared folder."""
        for folder in self._share.glob(f"{self._prefix}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    async def attempt(self, job: Job, progress: Progress) -> Finding:
        """The counts. Raises ModelFailed, ServerLost and CannotEvaluate; leaves no model behind."""
        loop = asyncio.get_running_loop()
        with EvaluationRows.open(job.dataset) as rows, ExitStack() as stack:
            rows.check_shape(job.order.spec.input_shape)
            progress.begin(rows.total)
            name = f"{self._prefix}-{job.order.model_digest[:16]}-{secrets.token_hex(4)}"
            await loop.run_in_executor(None, self._place, job, name)
            stack.callback(shutil.rmtree, self._share / name, ignore_errors=True)
            endpoints = [stack.enter_context(self._connected(server)) for server in self._servers]
            loaded = await loop.run_in_executor(None, _load, endpoints, name)
            try:
                return await count(
                    loaded, model=name, rows=rows, order=job.order, progress=progress, threads=self._threads
                )
            finally:
                await loop.run_in_executor(None, _unload, loaded, name)

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
        )


def _load(endpoints: Sequence[Endpoint], name: str) -> list[Endpoint]:
    """The endpoints that have loaded the model. Raises ServerLost when none is there, CannotEvaluate if none can."""
    until = time.monotonic() + _LOAD_TIMEOUT_S
    calls = [_begin_load(endpoint, name, until) for endpoint in endpoints]
    loaded, problems, away = [], [], True
    for endpoint, call in zip(endpoints, calls, strict=True):
        try:
            _end_load(endpoint, name, until, call)
        except grpc.RpcError as error:
            code, detail = (error.code(), error.details()) if isinstance(error, grpc.Call) else (None, str(error))
            problems.append(f"{endpoint.name}: {detail}")
            away = away and code is grpc.StatusCode.UNAVAILABLE
            _log.warning("a model server does not load a model", server=endpoint.name, detail=detail)
        else:
            loaded.append(endpoint)
    if not loaded:
        raise (ServerLost if away else CannotEvaluate)(f"no model server loads the model: {'; '.join(problems)}")
    return loaded


def _begin_load(endpoint: Endpoint, name: str, until: float) -> Any:
    return rpc.GRPCInferenceServiceStub(endpoint.channel).RepositoryModelLoad.future(
        pb.RepositoryModelLoadRequest(model_name=name),
        timeout=max(0.0, until - time.monotonic()),
        metadata=endpoint.metadata(),
    )


def _end_load(endpoint: Endpoint, name: str, until: float, call: Any) -> None:
    """Waits for a load, and for room on a server that is full of others' models. Raises RpcError."""
    while True:
        try:
            call.result()
        except grpc.RpcError as error:
            wait_s = wanted_wait_s(error)
            if wait_s is None or time.monotonic() + wait_s >= until:
                raise
        else:
            return
        time.sleep(wait_s)
        call = _begin_load(endpoint, name, until)


def _unload(endpoints: Sequence[Endpoint], name: str) -> None:
    for endpoint in endpoints:
        stub = rpc.GRPCInferenceServiceStub(endpoint.channel)
        try:
            stub.RepositoryModelUnload(
                pb.RepositoryModelUnloadRequest(model_name=name),
                timeout=_UNLOAD_TIMEOUT_S,
                metadata=endpoint.metadata(),
            )
        except grpc.RpcError as error:
            _log.warning("a model server keeps a model", server=endpoint.name, detail=str(error))
