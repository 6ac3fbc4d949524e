"""One evaluation over several Open Inference Protocol servers: each takes batches as fast as it answers them.

Unary ModelInfer, several in flight: servers differ in the shape of ModelStreamInfer's answers, in this they do not. One
that fails loses the batches that it had; the others take them over. One that hangs fails much later: a batch that holds
up the count goes to an idle server, too, and the first answer counts.
"""

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from services.runtime.errors import ResourceExhausted
from services.runtime.rpc_errors import from_rpc_error
from services.validator.pipeline import (
    RequestRefused,
    StreamBroken,
    StreamCancelled,
    Take,
    encode_request,
    parse_answer,
    read_logits,
)
from services.validator.rows import EvaluationRows
from tiltyard.inference.v2 import inference_pb2 as pb

METHOD = "/inference.GRPCInferenceService/ModelInfer"
WINDOW = 4
# What is answered ahead of the row that is counted next waits in memory.
AHEAD = 4
ANSWER_TIMEOUT_S = 120.0
# What a busy server asks for is kept to within this and the time for an answer: it may be a stranger's.
LEAST_PAUSE_S = 0.05
# A batch is late after so long, or after so many times the longest that an answer has taken.
LATE_S = 2.0
LATE_TIMES = 3

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")
_ADDRESS = re.compile(r"unix:/[^,\s]+\Z|[^\s:/@]+:[0-9]{1,5}\Z|\[[0-9a-fA-F:.]+\]:[0-9]{1,5}\Z")
_TLS_OF_SCHEME = {"grpc://": False, "grpcs://": True}
_KEY_ID = re.compile(r"[0-9a-f]{40}\Z")

# The server is there and says no: another server would say the same.
_REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
)

Metadata = Callable[[], tuple[tuple[str, str | bytes], ...]]


@dataclass(frozen=True)
class ModelServer:
    """A server of the operator's: a name for the log, an address, and the id of its key where it wants a token.

    `tls` is None where it is as for all peers.
    """

    name: str
    address: str
    key_id: str = ""
    tls: bool | None = None


def parse_servers(text: str) -> tuple[ModelServer, ...]:
    """`NAME=[grpc://|grpcs://]ADDRESS[@PARTICIPANT_ID]`, comma-separated. Raises ValueError naming the entry."""
    servers = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, target = entry.partition("=")
        scheme, separator, rest = target.rpartition("://")
        tls = _TLS_OF_SCHEME.get(scheme + separator)
        address, at, key_id = (rest if tls is not None else target).partition("@")
        if not equals or not _NAME.match(name) or not _ADDRESS.match(address) or (at and not _KEY_ID.match(key_id)):
            raise ValueError(
                f"{entry!r} is not NAME=HOST:PORT, NAME=grpc://HOST:PORT, NAME=grpcs://HOST:PORT or NAME=unix:/PATH, "
                "each perhaps with @ and a participant id"
            )
        # Nobody listens in on a Unix socket.
        servers.append(ModelServer(name, address, key_id, False if address.startswith("unix:") else tls))
    if len({server.name for server in servers}) != len(servers):
        raise ValueError("two servers have one name")
    return tuple(servers)


@dataclass(frozen=True)
class Endpoint:
    """An open channel to a server that has the model loaded, and the metadata for each call."""

    name: str
    channel: grpc.Channel
    metadata: Metadata


class Fleet:
    """One pass over a dataset. `run` blocks its thread; `cancel` may be called from any other."""

    def __init__(
        self, endpoints: Sequence[Endpoint], *, model: str, outputs: int, rows_per_batch: int, window: int = WINDOW
    ) -> None:
        self._endpoints = tuple(endpoints)
        self._model = model
        self._outputs = outputs
        self._step = rows_per_batch
        self._window = window
        self._changed = threading.Condition()
        self._unsent = 0
        """Where the first batch begins that no server has had."""
        self._left: list[int] = []
        """A heap of batches that servers have left behind."""
        self._answered: dict[int, NDArray[np.float32]] = {}
        self._taken = 0
        self._total = 0
        self._over = False
        self._failure: Exception | None = None
        self._sent: dict[int, tuple[float, str]] = {}
        """When each unanswered batch was sent last, and to which server."""
        self._longest_answer_s = 0.0
        self._lost: dict[str, str] = {}
        self._overtaken: dict[str, str] = {}
        self._calls: set[Any] = set()

    def run(self, rows: EvaluationRows, take: Take) -> None:
        """Sends every row to some server and hands the outputs to `take` in order, in this thread.

        Raises StreamBroken when no server is left, StreamCancelled, WrongAnswer, RequestRefused, and what reading rows
        and `take` raise.
        """
        self._total = rows.total
        threads = [
            threading.Thread(target=self._serve, args=(endpoint, rows), name=f"fleet-{endpoint.name}")
            for endpoint in self._endpoints
        ]
        for thread in threads:
            thread.start()
        try:
            while self._taken < rows.total:
                start, logits = self._next()
                stop = start + len(logits)
                take(start, stop, logits)
                with self._changed:
                    self._taken = stop
                    self._changed.notify_all()
        finally:
            self.cancel()
            for thread in threads:
                thread.join()

    def cancel(self) -> None:
        """Ends `run` with StreamCancelled."""
        with self._changed:
            self._over = True
            calls = tuple(self._calls)
            self._changed.notify_all()
        for call in calls:
            call.cancel()

    def troubles(self) -> dict[str, str]:
        """The servers that failed or were late, and how."""
        return self._overtaken | self._lost

    def _next(self) -> tuple[int, NDArray[np.float32]]:
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                if self._over:
                    raise StreamCancelled
                if self._taken in self._answered:
                    return self._taken, self._answered.pop(self._taken)
                if len(self._lost) == len(self._endpoints):
                    raise StreamBroken("; ".join(f"{name}: {detail}" for name, detail in self._lost.items()))
                self._changed.wait()

    def _serve(self, endpoint: Endpoint, rows: EvaluationRows) -> None:
        """One server's thread: keeps its window full until no batch is left anywhere."""
        while (wait_s := self._serve_until_refused(endpoint, rows)) is not None:
            with self._changed:
                pause_s = min(max(wait_s, LEAST_PAUSE_S), ANSWER_TIMEOUT_S)
                self._changed.wait_for(lambda: self._over or self._failure is not None, pause_s)

    def _serve_until_refused(self, endpoint: Endpoint, rows: EvaluationRows) -> float | None:
        """The seconds after which a server that has too much to do wants more; None when this one is through."""
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = endpoint.channel.unary_unary(METHOD, None, None)
        in_flight: deque[tuple[int, Any]] = deque()
        try:
            while True:
                while len(in_flight) < self._window:
                    start = self._assign(endpoint.name, wait=not in_flight)
                    if start is None:
                        break
                    request = encode_request(self._model, rows, start, self._stop(start))
                    call = method.future(request, timeout=ANSWER_TIMEOUT_S, metadata=endpoint.metadata())
                    in_flight.append((start, call))
                    with self._changed:
                        self._calls.add(call)
                        if self._over:
                            return None
                if not in_flight:
                    return None
                start, call = in_flight[0]
                expected = (self._stop(start) - start, self._outputs)
                logits = read_logits(parse_answer(pb.ModelInferResponse, call.result(), expected), expected)
                in_flight.popleft()
                with self._changed:
                    self._calls.discard(call)
                    self._keep(start, logits)
        except grpc.RpcError as error:
            left = [start for start, _ in in_flight]
            wait_s = wanted_wait_s(error)
            if wait_s is None:
                self._end_of(endpoint, error, left)
            else:
                with self._changed:
                    self._leave(left)
            return wait_s
        except grpc.FutureCancelledError:
            return None  # cancelled by us
        except Exception as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
            return None
        finally:
            for _, call in in_flight:
                call.cancel()

    def _keep(self, start: int, logits: NDArray[np.float32]) -> None:
        """An answer, unless another server was faster. The lock is held."""
        if start in self._sent:
            sent, _ = self._sent.pop(start)
            self._longest_answer_s = max(self._longest_answer_s, time.monotonic() - sent)
            self._answered[start] = logits
            self._changed.notify_all()

    def _assign(self, name: str, *, wait: bool) -> int | None:
        """The next batch for server `name` to send. None: there is none now, or, after waiting, none will come."""
        reach = AHEAD * self._window * len(self._endpoints) * self._step
        with self._changed:
            while not self._over and self._failure is None:
                late_in_s = self._late_in_s()
                if (first := self._left[0] if self._left else self._unsent) < min(self._taken + reach, self._total):
                    start = first
                    if self._left:
                        heappop(self._left)
                    else:
                        self._unsent += self._step
                elif not wait or self._taken >= self._total:
                    return None
                elif late_in_s is not None and late_in_s <= 0:
                    start = self._taken
                    self._overtaken[self._sent[start][1]] = f"the batch from row {start} on was late"
                else:
                    # Even when all are sent, another server may fail, or be late, and leave its own behind.
                    self._changed.wait(late_in_s)
                    continue
                self._sent[start] = (time.monotonic(), name)
                return start
            return None

    def _late_in_s(self) -> float | None:
        """When the batch that is counted next is late; None when nobody has it now. The lock is held."""
        if self._taken not in self._sent:
            return None
        sent, _ = self._sent[self._taken]
        return sent + max(LATE_S, LATE_TIMES * self._longest_answer_s) - time.monotonic()

    def _stop(self, start: int) -> int:
        return min(start + self._step, self._total)

    def _end_of(self, endpoint: Endpoint, error: grpc.RpcError, left: Sequence[int]) -> None:
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        detail = (error.details() if isinstance(error, grpc.Call) else "") or str(code)
        with self._changed:
            if code in _REFUSALS:
                self._failure = RequestRefused(f"{endpoint.name}: {detail}")
            else:
                self._lost[endpoint.name] = detail
                self._leave(left)
            self._changed.notify_all()

    def _leave(self, left: Sequence[int]) -> None:
        """Batches that another server, or the same one later, is to answer. The lock is held."""
        for start in left:
            if self._sent.pop(start, None) is not None:
                heappush(self._left, start)
        self._changed.notify_all()


def wanted_wait_s(error: grpc.RpcError) -> float | None:
    """How long a server that has too much to do asks to be left alone; None for every other error."""
    if not isinstance(error, grpc.Call) or error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        return None
    refused = from_rpc_error(error)
    return refused.retry_after_s if isinstance(refused, ResourceExhausted) else None
