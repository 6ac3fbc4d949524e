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
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import grpc
from sqlalchemy import insert
from sqlmodel import Session

from benchmarks._peers import PeerUnavailable
from benchmarks._vizier import CREATE_TRIAL, Vizier, serving_vizier
from services.registry import rows
from services.registry.changes import ChangeBoard
from services.registry.convert.drafts import draft_of
from services.registry.records import (
    Assignment,
    AssignmentState,
    ModelFormat,
    Round,
    RoundState,
    Submission,
    SubmissionState,
    Task,
    TaskState,
)
from services.registry.rows import COUNTERS_ID
from services.registry.store import SqlStore
from services.registry.tables import AssignmentRow, CountersRow, RoundRow, SubmissionRow
from services.runtime import names
from services.runtime.auth import utc_now
from services.runtime.database import Database
from services.runtime.names import AssignmentId
from tiltyard.identity import Key, issue_token
from tiltyard.registry.v1 import evaluation_pb2, evaluation_pb2_grpc, submission_pb2, submission_pb2_grpc
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2, model_pb2, task_pb2

ORIGIN = "benchmark.local"
_TASK = "t"
_LEASE = "lease"
_VALIDATORS, _PER_SUBMISSION = 16, 3
_SUBMISSIONS = 5000
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
        self._channels = [grpc.aio.insecure_channel(registry) for _ in range(_VALIDATORS)]
        self._echo_channels = [grpc.aio.insecure_channel(echo) for _ in range(_VALIDATORS)]
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
            self._number = self._number % _SUBMISSIONS + 1
            request = submission_pb2.GetSubmissionRequest(name=names.format_submission(_TASK, self._number))
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
    for position in range(_PER_SUBMISSION):
        for number in range(1, _SUBMISSIONS + 1):
            validator = (number + position) % _VALIDATORS
            name = names.format_assignment(AssignmentId(_TASK, number, 1, keys[validator].id))
            statement = envelope_pb2.SealStatement(
                origin=ORIGIN, assignment=name, seal=hashlib.sha256(name.encode()).digest()
            )
            yield (
                validator,
                evaluation_pb2.CommitEvaluationRequest(
                    statement=sign_statement(keys[validator], statement),
                    lease_token=_LEASE,
                    request_id=secrets.token_hex(16),
                ),
            )


class Trials:
    """Clients of a Vizier server."""

    def __init__(self, vizier: Vizier) -> None:
        self._request = vizier.request
        self._channels = [grpc.aio.insecure_channel(vizier.address) for _ in range(_VALIDATORS)]

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
    keys = [Key.generate() for _ in range(_VALIDATORS)]
    await _fill(folder, keys)
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
    for client in range(_VALIDATORS):
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


async def _fill(folder: Path, keys: list[Key]) -> None:
    """A task in which every validator holds the leases of its duties."""
    now = utc_now()
    url = f"sqlite:///{folder / 'registry.db'}"
    database = Database.open(url, migrations="services.registry.migrations")
    store = SqlStore(database, ChangeBoard(), utc_now)
    digest = task_pb2.DatasetDigest(sha256=bytes(32), size_bytes=1000)
    config = task_pb2.TaskConfig(
        display_name="Benchmark",
        models=[model_pb2.ModelSpec(input_shape=[4], outputs=3, linear=model_pb2.Linear())],
        evaluation_dataset=digest,
    )
    draft = draft_of(config, now=now, max_dataset_bytes=1 << 20)
    task = Task(_TASK, keys[0].id, draft, TaskState.OPEN, now, now, evaluation_rows=100, open_time=now)
    await store.write(lambda tx: tx.put_task(task))
    await database.write(lambda session: _insert_duties(session, keys, now))
    await database.close()


def _insert_duties(session: Session, keys: list[Key], now: datetime) -> None:
    end = now + timedelta(days=1)
    submissions: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    assignments: list[dict[str, Any]] = []
    for number in range(1, _SUBMISSIONS + 1):
        submission = Submission(
            task=_TASK,
            number=number,
            participant=keys[0].id,
            state=SubmissionState.EVALUATING,
            commitment=bytes(32),
            commit_time=now,
            deadline=end,
            model_digest=bytes(32),
            format=ModelFormat.SAFETENSORS,
            structure_checked=True,
        )
        submissions.append(rows.SUBMISSIONS.columns(submission))
        round_ = Round(_TASK, number, 1, RoundState.SEALING, end, wanted=_PER_SUBMISSION, picks=_PER_SUBMISSION)
        rounds.append(rows.ROUNDS.columns(round_) | {"touched": 0})
        for position in range(_PER_SUBMISSION):
            assignment = Assignment(
                task=_TASK,
                number=number,
                round=1,
                validator=keys[(number + position) % _VALIDATORS].id,
                state=AssignmentState.ACCEPTED,
                position=position,
                create_time=now,
                update_time=now,
                deadline=end,
                lease_token=_LEASE,
                lease_holder=bytes(32),
                sequence=len(assignments) + 1,
            )
            assignments.append(rows.ASSIGNMENTS.columns(assignment))
    counters = {"id": COUNTERS_ID, "log_size": 0, "log_frontier": b"", "ledger_position": 0}
    counters["assignment_sequence"] = len(assignments)
    for table, values in (
        (SubmissionRow, submissions),
        (RoundRow, rounds),
        (AssignmentRow, assignments),
        (CountersRow, [counters]),
    ):
        session.connection().execute(insert(table), values)


@contextmanager
def serving_registry(folder: Path) -> Iterator[str]:
    """The address of a registry process on the database in `folder`, beside a selector."""
    key = Key.load_or_create(folder / "registry.pem")
    with (
        _process(folder, "selector", services=key.id) as selector,
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
