"""One trace from `tiltyard train --submit` to the score, over the services of `tiltyard up`, and numbers beside it."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.e2e.test_up import running
from tests.support.otlp_receiver import Collector, Span, collecting
from tiltyard.cli.memberships import join_task
from tiltyard.client import Client, new_request_id, watch
from tiltyard.datasets import write_dataset
from tiltyard.filedigest import file_digest
from tiltyard.identity import Key
from tiltyard.registry.v1 import participant_pb2, task_pb2
from tiltyard.selector.v1 import stake_pb2
from tiltyard.transfers import upload
from tiltyard.type.v1 import model_pb2
from tiltyard.type.v1 import task_pb2 as task_type_pb2

ORIGIN = "tiltyard.local"
STAKE = 1_000_000_000
TASK = "tasks/clouds"

REVEAL = (
    "registry SERVER tiltyard.registry.v1.SubmissionService/RevealSubmission",
    "trainer CLIENT tiltyard.registry.v1.SubmissionService/RevealSubmission",
    "trainer INTERNAL submit",
    "trainer SERVER tiltyard.trainer.v1.TrainingService/StartTraining",
    "cli CLIENT tiltyard.trainer.v1.TrainingService/StartTraining",
    "cli INTERNAL tiltyard train",
)
# Each from the innermost span outwards.
EXPECTED = (
    (
        "trainer SERVER tiltyard.trainer.v1.TrainingService/WatchTraining",
        "cli CLIENT tiltyard.trainer.v1.TrainingService/WatchTraining",
        "cli INTERNAL tiltyard train",
    ),
    (
        "trainer INTERNAL train",
        "trainer SERVER tiltyard.trainer.v1.TrainingService/StartTraining",
        "cli CLIENT tiltyard.trainer.v1.TrainingService/StartTraining",
        "cli INTERNAL tiltyard train",
    ),
    (
        "registry SERVER tiltyard.registry.v1.ArtifactService/UploadArtifact",
        "trainer CLIENT tiltyard.registry.v1.ArtifactService/UploadArtifact",
        *REVEAL[2:],
    ),
    ("registry INTERNAL check structure", *REVEAL),
    (
        "selector SERVER tiltyard.selector.v1.DrawService/DrawValidators",
        "registry CLIENT tiltyard.selector.v1.DrawService/DrawValidators",
        "registry INTERNAL draw",
        *REVEAL,
    ),
    (
        "registry SERVER tiltyard.registry.v1.AssignmentService/AcceptAssignment",
        "validator CLIENT tiltyard.registry.v1.AssignmentService/AcceptAssignment",
        "validator INTERNAL evaluate",
        *REVEAL,
    ),
    (
        "validator CLIENT inference.GRPCInferenceService/ModelStreamInfer",
        "validator INTERNAL model server",
        "validator INTERNAL evaluate",
        *REVEAL,
    ),
    (
        "registry SERVER tiltyard.registry.v1.EvaluationService/CommitEvaluation",
        "validator CLIENT tiltyard.registry.v1.EvaluationService/CommitEvaluation",
        "validator INTERNAL evaluate",
        *REVEAL,
    ),
    ("registry INTERNAL ask to open", *REVEAL),
    (
        "registry SERVER tiltyard.registry.v1.EvaluationService/OpenEvaluation",
        "validator CLIENT tiltyard.registry.v1.EvaluationService/OpenEvaluation",
        "validator INTERNAL evaluate",
        *REVEAL,
    ),
    ("registry INTERNAL conclude", *REVEAL),
    (
        "selector SERVER tiltyard.selector.v1.DrawService/SettleAssignment",
        "registry CLIENT tiltyard.selector.v1.DrawService/SettleAssignment",
        "registry INTERNAL settle",
        *REVEAL,
    ),
)


def described(span: Span) -> str:
    return f"{span.service.removeprefix('tiltyard-')} {span.kind} {span.name}"


def ways_out(spans: list[Span]) -> set[tuple[str, ...]]:
    """For each span the descriptions of itself and all that surround it; empty while one of those is missing."""
    by_id = {span.id: span for span in spans}
    ways = set()
    for span in spans:
        way = [span]
        while way[-1].parent:
            if way[-1].parent not in by_id:
                return set()
            way.append(by_id[way[-1].parent])
        assert all(inner.start_ns >= outer.start_ns for inner, outer in itertools.pairwise(way))
        ways.add(tuple(map(described, way)))
    return ways


async def until(wanted: Callable[[], bool], what: Callable[[], object], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not wanted():
        assert time.monotonic() < end, what()
        await asyncio.sleep(0.1)


async def open_task(creator: Client, trainer: Client, validator: Client, operator: Client, folder: Path) -> None:
    for client in (creator, trainer, validator):
        await client.participants.RegisterParticipant(participant_pb2.RegisterParticipantRequest(display_name="x"))
        deposit = stake_pb2.DepositRequest(
            participant=client.participant,
            amount_micros=STAKE,
            reference=client.participant,
            funding_account=client.participant,
            request_id=new_request_id(),
        )
        await operator.stakes.Deposit(deposit)
    hidden = folder / "hidden.safetensors"
    config = task_type_pb2.TaskConfig(
        display_name="Three clouds",
        validators_per_submission=1,
        models=[model_pb2.ModelSpec(input_shape=[5], outputs=3, linear=model_pb2.Linear())],
        evaluation_dataset=task_type_pb2.DatasetDigest(sha256=file_digest(hidden), size_bytes=hidden.stat().st_size),
    )
    request = task_pb2.CreateTaskRequest(task_id="clouds", config=config, request_id=new_request_id())
    await creator.tasks.CreateTask(request)
    await upload(creator.artifacts, hidden, task=TASK)
    await join_when_open(creator, [(trainer, "training-node"), (validator, "validator")])


async def join_when_open(creator: Client, members: list[tuple[Client, str]]) -> None:
    joined = False
    async for seen in watch(creator.tasks.WatchTask, task_pb2.WatchTaskRequest(name=TASK)):
        if seen.task.state == task_type_pb2.TASK_STATE_OPEN and not joined:
            for client, role in members:
                await join_task(client, TASK, role)
            joined = True
        if seen.task.training_nodes == 1 and seen.task.validators == 1:
            return


def train(collector: Collector, addresses: dict[str, str], key: Path) -> None:
    """`tiltyard train --submit`, which ends with the score."""
    services = {f"TILTYARD_{name.upper()}": addresses[name] for name in ("trainer", "registry")}
    done = subprocess.run(
        [sys.executable, "-m", "tiltyard.cli", "train", "shard.safetensors", "--task", TASK, "--submit", "--json"],
        env={**os.environ, **collector.environment, **services, "TILTYARD_KEY": str(key)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    training = json.loads(done.stdout)
    assert training["submission"] == training["judged"]["name"] == f"{TASK}/submissions/1"
    assert training["judged"]["state"] == "SUBMISSION_STATE_SCORED"
    assert int(training["judged"]["score"]["total"]) == 50


async def test_one_trace_from_the_command_to_the_score(tmp_path: Path) -> None:
    state = tmp_path / "state"
    random = np.random.default_rng(0)
    y = random.integers(0, 3, size=200)
    x = random.normal(size=(200, 5)).astype(np.float32) + 2 * y[:, None]
    write_dataset(tmp_path / "hidden.safetensors", x[:50], y[:50])
    (state / "trainer/data").mkdir(parents=True)
    write_dataset(state / "trainer/data/shard.safetensors", x[50:], y[50:])
    with collecting(tmp_path / "told.jsonl") as collector:
        with running(state, "--port-base", "0", **collector.environment) as (_, addresses):

            def client(key: Key) -> Client:
                return Client(key, origin=ORIGIN, registry=addresses["registry"], selector=addresses["selector"])

            async with (
                client(Key.generate()) as creator,
                client(Key.load(state / "trainer/key.pem")) as trainer,
                client(Key.load(state / "validator/key.pem")) as validator,
                client(Key.load(state / "operator.pem")) as operator,
            ):
                await open_task(creator, trainer, validator, operator, tmp_path)
                await asyncio.to_thread(train, collector, addresses, state / "trainer/key.pem")
            await check_trace(collector)
            await check_metrics(collector)
            check_logs(state, collector)
            # Nobody takes anything from here on.
            collector.process.kill()
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 20


async def check_trace(collector: Collector) -> None:
    def traced() -> list[Span]:
        spans = collector.spans()
        (root,) = [span for span in spans if span.name == "tiltyard train"]
        return [span for span in spans if span.trace == root.trace]

    await until(
        lambda: set(EXPECTED) <= ways_out(traced()),
        lambda: (sorted(set(EXPECTED) - ways_out(traced())), sorted(map(described, traced()))),
    )
    spans = traced()
    assert {span.service for span in spans} == {
        f"tiltyard-{name}" for name in ("cli", "trainer", "registry", "selector", "validator")
    }
    # The command stops watching once the training has ended.
    assert {span.error for span in spans} <= {"", "CANCELLED"}
    (reveal,) = [span for span in spans if described(span) == REVEAL[0]]
    assert reveal.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "tiltyard.registry.v1.SubmissionService/RevealSubmission",
        "rpc.response.status_code": "OK",
    }
    (conclude,) = [span for span in spans if span.name == "conclude"]
    assert conclude.attributes == {"tiltyard.submission": f"{TASK}/submissions/1", "tiltyard.round": 1}
    # What is asked every second whether there is anything or not is no trace of anything.
    assert not [span for span in collector.spans() if span.name.endswith("ListLedgerEvents")]


async def check_metrics(collector: Collector) -> None:
    expected = {
        "tiltyard-registry": {"rpc.server.call.duration", "rpc.client.call.duration", "tiltyard.referee.turn.duration"},
        "tiltyard-selector": {"rpc.server.call.duration", "process.memory.usage"},
        "tiltyard-trainer": {"rpc.server.call.duration", "tiltyard.trainings", "tiltyard.trainings.ended"},
        "tiltyard-validator": {"rpc.client.call.duration", "tiltyard.duties", "tiltyard.evaluation.rows"},
    }

    def told(service: str) -> set[str]:
        return {point["metric"] for point in collector.metrics() if point["service"] == service}

    await until(
        lambda: all(names <= told(service) for service, names in expected.items()),
        lambda: {service: names - told(service) for service, names in expected.items()},
    )
    points = collector.metrics()
    (rows,) = {point["value"] for point in points if point["metric"] == "tiltyard.evaluation.rows"}
    assert rows == 50
    draws = [
        point
        for point in points
        if point["service"] == "tiltyard-selector"
        and point["attributes"].get("rpc.method") == "tiltyard.selector.v1.DrawService/DrawValidators"
    ]
    assert (draws[-1]["metric"], draws[-1]["unit"], draws[-1]["count"]) == ("rpc.server.call.duration", "s", 1)


def check_logs(state: Path, collector: Collector) -> None:
    lines = [json.loads(line) for line in (state / "logs/validator.log").read_text().splitlines()]
    (ended,) = [line for line in lines if line["event"] == "a run ended"]
    (evaluate,) = [span for span in collector.spans() if span.name == "evaluate"]
    assert (ended["trace_id"], ended["span_id"]) == (evaluate.trace, evaluate.id)
