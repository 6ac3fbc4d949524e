"""Loads a model on several model servers at once, from the folder that they share, and unloads it again."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import grpc
import structlog

from services.validator.evaluation import CannotEvaluate, ServerLost
from services.validator.fleet import LEAST_PAUSE_S, Endpoint, wanted_wait_s
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc

LOAD_TIMEOUT_S = 300.0
UNLOAD_TIMEOUT_S = 10.0
# Who has not loaded so long after the first, or after so many times what that took, is left out.
LATE_S = 10.0
LATE_TIMES = 3

_HOLDS_NOTHING = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)

_log = structlog.get_logger("tiltyard.validator")


class Loads:
    """The loads of one model on several servers. `run` blocks its thread; `give_up` may be called from any other."""

    def __init__(self, endpoints: Sequence[Endpoint], name: str) -> None:
        until = time.monotonic() + LOAD_TIMEOUT_S
        self._loads = [_Load(endpoint, name, until=until) for endpoint in endpoints]

    def run(self) -> list[Endpoint]:
        """The endpoints that have loaded the model. One that hangs, or is full of others' models, holds up nobody long.

        Raises ServerLost when none is there, CannotEvaluate if none can.
        """
        began = time.monotonic()
        with ThreadPoolExecutor(max_workers=len(self._loads), thread_name_prefix="loading") as threads:
            running = {threads.submit(each.run): each for each in self._loads}
            _wait_for_first(running)
            _, late = wait(running, timeout=max(LATE_S, LATE_TIMES * (time.monotonic() - began)))
            for future in late:
                running[future].give_up("it took much longer than another server")
        for future in running:
            future.result()  # raises what nobody thought of
        failures = [(each.endpoint.name, *each.failure) for each in self._loads if each.failure is not None]
        for server, _, detail in failures:
            _log.warning("a model server does not load a model", server=server, detail=detail)
        if len(failures) == len(self._loads):
            away = all(code is grpc.StatusCode.UNAVAILABLE for _, code, _ in failures)
            told = "; ".join(f"{server}: {detail}" for server, _, detail in failures)
            raise (ServerLost if away else CannotEvaluate)(f"no model server loads the model: {told}")
        return [each.endpoint for each in self._loads if each.failure is None]

    def give_up(self) -> None:
        """Ends `run`: nobody wants the model any more."""
        for each in self._loads:
            each.give_up("nobody waits for it any more")


def unload(endpoints: Sequence[Endpoint], name: str) -> None:
    """Has all of them let go of the model, whether they have loaded it or not."""
    request = pb.RepositoryModelUnloadRequest(model_name=name)
    calls: list[tuple[Endpoint, Any]] = [
        (
            endpoint,
            rpc.GRPCInferenceServiceStub(endpoint.channel).RepositoryModelUnload.future(
                request, timeout=UNLOAD_TIMEOUT_S, metadata=endpoint.metadata()
            ),
        )
        for endpoint in endpoints
    ]
    for endpoint, call in calls:
        try:
            call.result()
        except grpc.RpcError as error:
            code, detail = _told(error)
            if code not in _HOLDS_NOTHING:
                _log.warning("a model server may keep a model", server=endpoint.name, detail=detail)


class _Load:
    """One server's load. `run` blocks its thread; `give_up` may be called from any other."""

    def __init__(self, endpoint: Endpoint, name: str, *, until: float) -> None:
        self.endpoint = endpoint
        self.failure: tuple[grpc.StatusCode | None, str] | None = None
        """Why it did not come about; known when `run` has returned."""
        self._name = name
        self._until = until
        self._lock = threading.Lock()
        self._given_up = threading.Event()
        self._reason = ""
        self._call: Any = None

    def run(self) -> None:
        """Waits for the load, and for room on a server that is full of others' models."""
        while self._begin():
            try:
                self._call.result()
            except grpc.FutureCancelledError:
                break
            except grpc.RpcError as error:
                wait_s = wanted_wait_s(error)
                if wait_s is None or time.monotonic() + wait_s >= self._until:
                    self.failure = _told(error)
                    return
            else:
                return
            self._given_up.wait(max(wait_s, LEAST_PAUSE_S))
        self.failure = (None, self._reason)

    def give_up(self, reason: str) -> None:
        """Ends `run`, which has then failed for this reason."""
        with self._lock:
            self._reason = self._reason or reason
            self._given_up.set()
            if self._call is not None:
                self._call.cancel()

    def _begin(self) -> bool:
        with self._lock:
            if self._given_up.is_set():
                return False
            self._call = rpc.GRPCInferenceServiceStub(self.endpoint.channel).RepositoryModelLoad.future(
                pb.RepositoryModelLoadRequest(model_name=self._name),
                timeout=max(0.0, self._until - time.monotonic()),
                metadata=self.endpoint.metadata(),
            )
            return True


def _wait_for_first(running: "dict[Future[None], _Load]") -> None:
    """Returns when one server has loaded the model, or all have failed."""
    pending = set(running)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        if any(running[future].failure is None for future in done):
            return


def _told(error: grpc.RpcError) -> tuple[grpc.StatusCode | None, str]:
    if not isinstance(error, grpc.Call):
        return None, str(error)
    return error.code(), error.details() or str(error.code())
