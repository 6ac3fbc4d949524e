"""Durable `CommitEvaluation` and `GetSubmission` of a whole registry process, beside a bare gRPC echo and Vizier.

The registry is `python -m services.registry` with its background loop, on SQLite, beside a real selector. Its clients,
the echo's (of as many bytes) and those of Vizier's `CreateTrial`, on SQLite too, are this process, in turns within one
run; every call to the registry carries a token, every seal a signature and a request id.
"""

import asyncio
import hashlib
import os
import secrets
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import grpc

from benchmarks._duties import LEASE, PER_SUBMISSION, SUBMISSIONS, TASK, VALIDATORS, fill
from benchmarks._peers import PeerUnavailable
from benchmarks._vizier import CREATE_TRIAL, Vizier, serving_vizier
from services.runtime import names
from services.runtime.names import AssignmentId
from tiltyard.identity import Key, issue_token
from tiltyard.registry.v1 import evaluation_pb2, evaluation_pb2_grpc, submission_pb2, submission_pb2_grpc
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2

ORIGIN = "benchmark.local"
_ROUNDS, _ROUND_S = 9, 0.6
_ECHO = "/benchmark.v1.Echo/Echo"

Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Rates:
    """What one round of calls came to."""

    per_s: float
    spans_s: list[float] = field(repr=False)
    """How long each call took."""


class Registry:
    """Clients of a registry process with duties enough, and of an echo process."""

    def __init__(self, registry: str, echo: str, keys: list[Key]) -> None:
        self._channels = [grpc.aio.insecure_channel(registry) for _ in range(VALIDATORS)]
        self._echo_channels = [grpc.aio.insecure_channel(echo) for _ in range(VALIDATORS)]
        tokens = [issue_token(key, audience=f"{ORIGIN}/registry") for key in keys]
        self._metadata = [(("authorization", f"Bearer {token}"),) for token in tokens]
        self._seals = deque(_seals(keys))
        self._number = 0

    async def close(self) -> None:
        """Hang up."""
        for channel in (*self._channels, *self._echo_channels):
            await channel.close()

    def commits(self, client: int) -> Call:
        """The next seal, whosever it is, over the connection of this client."""
        stub: Any = evaluation_pb2_grpc.EvaluationServiceStub(self._channels[client])

        def call() -> Awaitable[object]:
            validator, request = self._seals.popleft()
            answer: Awaitable[object] = stub.CommitEvaluation(request, metadata=self._metadata[validator], timeout=20)
            return answer

        return call

    def gets(self, client: int) -> Call:
        """One submission after the other."""
        stub: Any = submission_pb2_grpc.SubmissionServiceStub(self._channels[client])

        def call() -> Awaitable[object]:
            self._number = self._number % SUBMISSIONS + 1
            request = submission_pb2.GetSubmissionRequest(name=names.format_submission(TASK, self._number))
            answer: Awaitable[object] = stub.GetSubmission(request, metadata=self._metadata[client], timeout=20)
            return answer

        return call

    def echoes(self, client: int) -> Call:
        """As many bytes as a seal has, there and back."""
        method: Any = self._echo_channels[client].unary_unary(_ECHO)
        payload = self._seals[0][1].SerializeToString()
        return lambda: method(payload, timeout=20)


def _seals(keys: list[Key]) -> Iterator[tuple[int, evaluation_pb2.CommitEvaluationRequest]]:
    """The first seal of every submission, then every second one, then every third: so they come in an arena, too."""
    for position in range(PER_SUBMISSION):
        for number in range(1, SUBMISSIONS + 1):
            validator = (number + position) % VALIDATORS
            name = names.format_assignment(AssignmentId(TASK, number, 1, keys[validator].id))
            statement = envelope_pb2.SealStatement(
                origin=ORIGIN, assignment=name, seal=hashlib.sha256(name.encode()).digest()
            )
            yield (
                validator,
                evaluation_pb2.CommitEvaluationRequest(
                    statement=sign_statement(keys[validator], statement),
                    lease_token=LEASE,
                    request_id=secrets.token_hex(16),
                ),
            )


class Trials:
    """Clients of a Vizier server."""

    def __init__(self, vizier: Vizier) -> None:
        self._request = vizier.request
        self._channels = [grpc.aio.insecure_channel(vizier.address) for _ in range(VALIDATORS)]

    async def close(self) -> None:
        """Hang up."""
        for channel in self._channels:
            await channel.close()

    def creates(self, client: int) -> Call:
        """One trial after the other."""
        method: Any = self._channels[client].unary_unary(CREATE_TRIAL)
        return lambda: method(self._request, timeout=20)


async def rate(calls: list[Call], *, seconds: float = _ROUND_S) -> Rates:
    """Calls answered in one round, each of `calls` one after the other."""
    spans: list[float] = []
    started = time.perf_counter()

    async def repeat(call: Call) -> None:
        while (begin := time.perf_counter()) < started + seconds:
            await call()
            spans.append(time.perf_counter() - begin)

    await asyncio.gather(*(repeat(call) for call in calls))
    return Rates(len(spans) / (time.perf_counter() - started), spans)


async def measure(folder: Path) -> list[dict[str, Any]]:
    """The lines of both methods."""
    keys = [Key.generate() for _ in range(VALIDATORS)]
    await fill(folder, keys)
    async with AsyncExitStack() as processes:
        registry = Registry(
            processes.enter_context(serving_registry(folder)), processes.enter_context(_serving_echo(folder)), keys
        )
        processes.push_async_callback(registry.close)
        trials: Trials | None = None
        problem = ""
        try:
            trials = Trials(await asyncio.to_thread(processes.enter_context, serving_vizier(folder)))
            processes.push_async_callback(trials.close)
        except PeerUnavailable as error:
            problem = str(error)
        return [*await _commit_lines(registry, trials, problem), await _get_line(registry)]


async def _commit_lines(registry: Registry, trials: Trials | None, problem: str) -> list[dict[str, Any]]:
    """At 1, 4 and 16 clients, beside the echo and beside Vizier; `problem` says why there is none of it."""
    for client in range(VALIDATORS):
        await asyncio.gather(*(make(client)() for make in (registry.commits, registry.gets, registry.echoes)))
        if trials is not None:
            await trials.creates(client)()
    lines, mine = [], list[Rates]()
    for clients in (1, 4, 16):
        ours = [registry.commits(client) for client in range(clients)]
        echoes = [registry.echoes(client) for client in range(clients)]
        creates = [] if trials is None else [trials.creates(client) for client in range(clients)]
        turns = [[await rate(calls) for calls in (ours, echoes, creates) if calls] for _ in range(_ROUNDS)]
        mine, echoed, *created = (list(each) for each in zip(*turns, strict=True))
        name = f"durable CommitEvaluation, {clients} client{'s' * (clients > 1)}"
        lines.append(_line(name, mine, "bare grpc.aio echo", echoed, goal=0.25 if clients == 16 else None))
        if created:
            goal = 8.0 if clients == 16 else None
            lines.append(_line(name, mine, "Vizier's CreateTrial, SQLite", created[0], goal=goal))
    if trials is None:
        lines.append(_unmeasured("durable CommitEvaluation, 16 clients", mine, f"not measured, no Vizier: {problem}"))
    p99_ms = quantiles([span for each in mine for span in each.spans_s], n=100)[98] * 1e3
    lines.append(
        {
            "name": "durable CommitEvaluation, 16 clients, 99th percentile",
            "ours": round(p99_ms, 2),
            "unit": "ms",
            "against": "its limit",
            "theirs": 50.0,
            "ratio": 50.0 / p99_ms,
            "goal": 1.0,
        }
    )
    return lines


async def _get_line(registry: Registry) -> dict[str, Any]:
    gets = [registry.gets(client) for client in range(16)]
    echoes = [registry.echoes(client) for client in range(16)]
    turns = [(await rate(gets), await rate(echoes)) for _ in range(_ROUNDS)]
    mine, theirs = (list(each) for each in zip(*turns, strict=True))
    return _line("GetSubmission, token checked, 16 clients", mine, "bare grpc.aio echo", theirs, goal=0.5)


def _line(name: str, mine: list[Rates], against: str, theirs: list[Rates], *, goal: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "ours": median(each.per_s for each in mine),
        "unit": "calls/s",
        "against": against,
        "theirs": median(each.per_s for each in theirs),
        "ratio": median(one.per_s / other.per_s for one, other in zip(mine, theirs, strict=True)),
        "goal": goal,
    }


def _unmeasured(name: str, mine: list[Rates], against: str) -> dict[str, Any]:
    ours = median(each.per_s for each in mine)
    return {
        "name": name,
        "ours": ours,
        "unit": "calls/s",
        "against": against,
        "theirs": 0.0,
        "ratio": 0.0,
        "goal": None,
    }


@contextmanager
def serving_registry(folder: Path) -> Iterator[str]:
    """The address of a registry process on the database in `folder`, beside a selector that its key operates."""
    key = Key.load_or_create(folder / "registry.pem")
    with (
        _process(folder, "selector", services=key.id, operators=key.id) as selector,
        _process(folder, "registry", selector=selector, key_file=str(folder / "registry.pem")) as address,
    ):
        yield address


@contextmanager
def _process(folder: Path, service: str, **settings: str) -> Iterator[str]:
    address = f"unix:{folder / service}.sock"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")}
    told = {"listen": address, "state_dir": str(folder), "origin": ORIGIN, **settings}
    with (folder / f"{service}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{service}"],
            env=environment | {f"TILTYARD_{name.upper()}": value for name, value in told.items()},
            stdout=log,
            stderr=log,
        )
    try:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
        yield address
    finally:
        process.kill()
        process.wait()


@contextmanager
def _serving_echo(folder: Path) -> Iterator[str]:
    address = f"unix:{folder / 'echo'}.sock"
    process = subprocess.Popen([sys.executable, "-m", __name__, address])
    try:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
        yield address
    finally:
        process.kill()
        process.wait()


async def _echo(request: bytes, _context: object) -> bytes:
    return request


async def _serve_echo(address: str) -> None:
    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Echo": grpc.unary_unary_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("benchmark.v1.Echo", handlers)])
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve_echo(sys.argv[1]))
