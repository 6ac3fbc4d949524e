"""One attempt at an evaluation on model servers of the operator's own, which load the model from a shared folder."""

import asyncio
import contextlib
import json
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from services.validator.batches import rows_per_batch
from services.validator.children import stall_s, while_it_moves
from services.validator.evaluation import CannotEvaluate, Job, ModelFailed, ServerLost
from services.validator.fleet import Endpoint, Fleet, ModelServer
from services.validator.pipeline import CHANNEL_OPTIONS, RequestRefused, StreamBroken, WrongAnswer
from services.validator.rows import EvaluationRows
from services.validator.runs import Fault, Finding, Progress
from tiltyard.counting import Metric, NanOutput, Tally
from tiltyard.identity import Key, issue_token
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc
from tiltyard.modelspec import Onnx, to_json

_LOAD_TIMEOUT_S = 300.0
_UNLOAD_TIMEOUT_S = 10.0
_TOKEN_S = 120.0
_PLACEHOLDER = b"${MODEL}"

_log = structlog.get_logger("tiltyard.validator")


class EndpointAttempts:
    """Attempts on `servers`, all of them at once for each, with the model under a name of its own in `share`.

    What these servers do wrong is never the model's fault: they are not confined, and only their operator knows them.
    An output that is NaN is.
    """

    def __init__(
        self, servers: Sequence[ModelServer], *, share: Path, template: Path | None, key: Key, concurrency: int
    ) -> None:
        self._servers = tuple(servers)
        self._share = share
        self._template = template
        self._key = key
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
            if rows.row_shape != job.order.spec.input_shape:
                raise CannotEvaluate(
                    f"rows of the dataset have shape {rows.row_shape}, the model's input {job.order.spec.input_shape}"
                )
            progress.begin(rows.total)
            name = f"{self._prefix}-{job.order.model_digest[:16]}-{secrets.token_hex(4)}"
            await loop.run_in_executor(None, self._place, job, name)
            stack.callback(shutil.rmtree, self._share / name, ignore_errors=True)
            endpoints = [stack.enter_context(self._endpoint(server)) for server in self._servers]
            loaded = await loop.run_in_executor(None, _load, endpoints, name)
            try:
                return await self._count(loaded, name, rows, job, progress)
            finally:
                await loop.run_in_executor(None, _unload, loaded, name)

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()

    async def _count(
        self, endpoints: Sequence[Endpoint], name: str, rows: EvaluationRows, job: Job, progress: Progress
    ) -> Finding:
        order = job.order
        tally = Tally(order.metric or Metric.ACCURACY, top_k=order.top_k, bound=order.bound)
        fleet = Fleet(
            endpoints,
            model=name,
            outputs=order.spec.outputs,
            rows_per_batch=rows_per_batch(order.spec, rows.row_bytes),
        )

        def take(start: int, stop: int, logits: NDArray[np.float32]) -> None:
            try:
                tally.add(logits, rows.labels(start, stop))
            except ValueError as error:
                raise CannotEvaluate(f"rows {start} to {stop} of the dataset: {error}") from error
            progress.advance(stop)

        running = asyncio.get_running_loop().run_in_executor(self._threads, fleet.run, rows, take)
        try:
            await while_it_moves(running, progress, stall_s(order))
        except NanOutput as error:
            raise ModelFailed(Fault.NAN_OUTPUT, str(error)) from error
        except (WrongAnswer, RequestRefused) as error:
            raise CannotEvaluate(f"a model server does not answer as it should: {error}") from error
        except (StreamBroken, TimeoutError) as error:
            raise ServerLost(f"no model server is left: {error}") from error
        finally:
            fleet.cancel()
            # The thread reads the file until it ends.
            with contextlib.suppress(Exception):
                await asyncio.shield(running)
            for server, detail in fleet.lost().items():
                _log.warning("a model server failed in the middle", server=server, detail=detail)
        return Finding(counts=tally.counts(), prediction_blocks=tally.prediction_blocks())

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

    @contextmanager
    def _endpoint(self, server: ModelServer) -> Iterator[Endpoint]:
        tokens: dict[str, float] = {}

        def metadata() -> tuple[tuple[str, str | bytes], ...]:
            if not server.key_id:
                return ()
            now = time.monotonic()
            fresh = next((token for token, until in tokens.items() if until > now), None)
            if fresh is None:
                tokens.clear()
                fresh = issue_token(self._key, audience=server.key_id)
                tokens[fresh] = now + _TOKEN_S
            return (("authorization", f"Bearer {fresh}"),)

        channel = grpc.insecure_channel(server.address, options=CHANNEL_OPTIONS)
        try:
            yield Endpoint(server.name, channel, metadata)
        finally:
            # A channel closes only when what was handed to its socket has been read: nobody waits for a server that
            # hangs, and least of all the event loop.
            threading.Thread(target=channel.close, name=f"closing-{server.name}", daemon=True).start()


def _load(endpoints: Sequence[Endpoint], name: str) -> list[Endpoint]:
    """The endpoints that have loaded the model. Raises ServerLost when none is there, CannotEvaluate if none can."""
    calls = [
        rpc.GRPCInferenceServiceStub(endpoint.channel).RepositoryModelLoad.future(
            pb.RepositoryModelLoadRequest(model_name=name), timeout=_LOAD_TIMEOUT_S, metadata=endpoint.metadata()
        )
        for endpoint in endpoints
    ]
    loaded, problems, away = [], [], True
    for endpoint, call in zip(endpoints, calls, strict=True):
        try:
            call.result()
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
