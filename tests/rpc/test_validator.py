"""A validator as its owner and the registry see it: real processes and model servers, a registry of the test's own."""

import asyncio
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import save
from validator_registry import (
    ACCEPTED,
    DECLINED,
    EXPIRED,
    OPENED,
    RELEASED,
    SEALED,
    FakeRegistry,
    dataset_bytes,
    model_bytes,
    random_dataset,
)

from services.runtime.channels import open_peer
from services.validator.batches import rows_per_batch
from services.validator.settings import ValidatorSettings
from tiltyard.calls.tls import ChannelTls
from tiltyard.counting import Metric, Tally
from tiltyard.identity import Key
from tiltyard.models import load_model
from tiltyard.modelspec import Convnet, Linear, Mlp, ModelSpec, tensor_shapes
from tiltyard.transparency import root_hash
from tiltyard.type.v1 import evaluation_pb2 as types_pb2
from tiltyard.type.v1 import task_pb2
from tiltyard.validator.v1 import validator_pb2 as pb
from tiltyard.validator.v1 import validator_pb2_grpc as rpc

SPEC = ModelSpec((8, 8), 10, Mlp((32,)), input_scale=1 / 255)
LONG_S = 120  # on a busy machine


class ValidatorProcess:
    """`python -m services.validator` on a state folder."""

    def __init__(self, state: Path, registry_address: str, **settings: object) -> None:
        self.state = state
        self.key = Key.load_or_create(state / "key.pem")
        self._environment = {
            "TILTYARD_STATE_DIR": str(state),
            "TILTYARD_REGISTRY": registry_address,
            "TILTYARD_LISTEN": "127.0.0.1:0",
            "TILTYARD_LOG_FORMAT": "json",
            **{f"TILTYARD_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.log: list[dict] = []
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> "ValidatorProcess":
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.validator",
            env={**inherited, **self._environment},
            stderr=asyncio.subprocess.PIPE,
        )
        serving = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read(serving))
        self.address = await asyncio.wait_for(serving, LONG_S)
        return self

    async def _read(self, serving: asyncio.Future) -> None:
        while line := await self.process.stderr.readline():
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"event": line.decode()}
            self.log.append(entry)
            if entry["event"] == "serving":
                serving.set_result(entry["address"])
        if not serving.done():
            serving.set_exception(RuntimeError(f"the validator did not start: {self.log}"))

    async def kill(self) -> None:
        self.process.kill()
        await self.wait()

    async def wait(self) -> int:
        code = await asyncio.wait_for(self.process.wait(), LONG_S)
        await self._reader
        return code

    async def stop(self) -> int:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await self.wait()

    @asynccontextmanager
    async def calls(self, key: Key | None = None, *, tls: ChannelTls | None = None):
        async with open_peer(self.address, key=key or self.key, audience=self.key.id, tls=tls) as channel:
            yield rpc.ValidationServiceStub(channel)


@pytest.fixture
async def registry(tmp_path):
    key = Key.load_or_create(tmp_path / "state" / "key.pem")
    fake = FakeRegistry(key.id)
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def start(tmp_path, registry):
    started: list[ValidatorProcess] = []

    async def start_one(**settings) -> ValidatorProcess:
        one = ValidatorProcess(tmp_path / "state", registry.address, **settings)
        started.append(one)
        return await one.start()

    yield start_one
    for one in started:
        if one.process is not None:
            await one.stop()


def plain_evaluation(tmp_path, content: bytes, spec: ModelSpec, x, y):
    """What torch says, all rows at once."""
    path = tmp_path / "plain.safetensors"
    path.write_bytes(content)
    with torch.inference_mode():
        logits = load_model(spec, path)(torch.from_numpy(x)).numpy()
    predictions = logits.argmax(axis=1)
    raw = predictions.astype("<i4").tobytes()
    blocks = [hashlib.sha256(b"\0" + raw[start : start + 1024]).digest() for start in range(0, len(raw), 1024)]
    return int((predictions == y).sum()), blocks, logits


@pytest.mark.parametrize("spec", [SPEC, ModelSpec((8, 8), 10, Convnet((4, 8)), 1 / 255), ModelSpec((64,), 3, Linear())])
async def test_counts_equal_a_plain_evaluation_sample_for_sample(registry, start, tmp_path, spec):
    row_bytes = math.prod(spec.input_shape)
    # More than one batch, and a short one at the end.
    x, y = random_dataset(rows_per_batch(spec, row_bytes) + 1001, spec.input_shape, spec.outputs)
    model = model_bytes(spec)
    name = await registry.offer(dataset_bytes(x, y), model, spec)
    await start()
    duty = await asyncio.wait_for(registry.until(name, OPENED), LONG_S)
    correct, blocks, logits = plain_evaluation(tmp_path, model, spec, x, y)
    tally = Tally()
    tally.add(logits, y)
    report = duty.report
    assert (report.counts.correct, report.counts.total) == (correct, len(y))
    assert (report.prediction_blocks, duty.hashes) == (len(blocks), b"".join(blocks))
    assert report.prediction_root == root_hash(blocks)
    assert report.counts.ambiguous == tally.counts().ambiguous
    assert report.counts.loss_sum_micros == pytest.approx(tally.counts().loss_sum_micros, rel=1e-5)
    assert report.dataset_digest == hashlib.sha256(dataset_bytes(x, y)).digest()
    assert report.model_digest == hashlib.sha256(model).digest()
    assert report.origin == "tiltyard.local"
    assert not report.node_endpoint


async def test_one_bad_submission_after_another_stops_nothing(registry, start):
    x, y = random_dataset(2000, (8, 8), 10)
    data = dataset_bytes(x, y)
    good = model_bytes(SPEC)
    wide = ModelSpec((8, 8), 10, Mlp((33,)), input_scale=1 / 255)
    # Half precision in the file, twice that in memory.
    huge = ModelSpec((8, 8), 10, Mlp((10_000, 8_000)), input_scale=1 / 255)
    huge_model = save({name: np.zeros(shape, np.float16) for name, shape in tensor_shapes(huge).items()})
    offers = {
        "nan": await registry.offer(data, model_bytes(SPEC, spoil=math.nan), SPEC),
        "infinite": await registry.offer(data, model_bytes(SPEC, spoil=math.inf), SPEC),
        "another shape": await registry.offer(data, model_bytes(wide), SPEC),
        "truncated": await registry.offer(data, good[:-100], SPEC),
        "no safetensors": await registry.offer(data, b"\x80\x04pickled", SPEC),
        "memory": await registry.offer(data, huge_model, huge, max_memory_bytes=1 << 20),
        "good": await registry.offer(data, good, SPEC),
        "other labels": await registry.offer(dataset_bytes(x, y + 5), good, SPEC),
        "other rows": await registry.offer(dataset_bytes(x[:, :4], y), good, SPEC),
        "last": await registry.offer(data, good, SPEC),
    }
    validator = await start(concurrency=2)
    found = {}
    for case, name in offers.items():
        duty = await asyncio.wait_for(registry.until(name, OPENED, DECLINED), LONG_S)
        found[case] = duty.reason if duty.report is None else types_pb2.ModelFault.Name(duty.report.fault)
    # What is the dataset's fault is declined, and no fault of the model's.
    assert "label is outside 0 to 9" in found.pop("other labels")
    assert "rows of the dataset have shape (4, 8)" in found.pop("other rows")
    assert found == {
        "nan": "MODEL_FAULT_NAN_OUTPUT",
        "infinite": "MODEL_FAULT_NAN_OUTPUT",
        "another shape": "MODEL_FAULT_SHAPE_MISMATCH",
        "truncated": "MODEL_FAULT_BAD_FORMAT",
        "no safetensors": "MODEL_FAULT_BAD_FORMAT",
        "memory": "MODEL_FAULT_OUT_OF_MEMORY",
        "good": "MODEL_FAULT_UNSPECIFIED",
        "last": "MODEL_FAULT_UNSPECIFIED",
    }
    async with validator.calls() as calls:
        await until_status(calls, lambda status: status.ended == len(offers))
        history = await calls.ListEvaluationRuns(pb.ListEvaluationRunsRequest())
        runs = {run.assignment: run for run in history.runs}
        assert runs[offers["nan"]].fault == types_pb2.MODEL_FAULT_NAN_OUTPUT
        assert "row 0" in runs[offers["nan"]].detail
        assert runs[offers["other labels"]].state == pb.EVALUATION_RUN_STATE_FAILED
        assert runs[offers["good"]].state == pb.EVALUATION_RUN_STATE_OPENED
        assert runs[offers["good"]].counts.total == runs[offers["good"]].position == 2000
        assert runs[offers["good"]].end_time.ToDatetime() > runs[offers["good"]].start_time.ToDatetime()
        status = await calls.GetStatus(pb.GetStatusRequest())
        assert (len(status.active), status.draining) == (0, False)
        assert "network" in status.isolation
        assert "start processes" in status.isolation
    # One dataset for eight models is fetched once.
    assert registry.downloads.count(hashlib.sha256(data).hexdigest()) == 1
    assert list((validator.state / "children").iterdir()) == []


async def test_a_model_over_its_cpu_time_is_too_slow(registry, start):
    spec = ModelSpec((8, 8), 10, Mlp((2048, 2048, 2048)), input_scale=1 / 255)
    x, y = random_dataset(60_000, (8, 8), 10)
    name = await registry.offer(dataset_bytes(x, y), model_bytes(spec), spec, max_cpu_s=1)
    await start()
    duty = await asyncio.wait_for(registry.until(name, OPENED), LONG_S)
    assert duty.report.fault == types_pb2.MODEL_FAULT_TOO_SLOW


def model_servers(validator: ValidatorProcess) -> list[psutil.Process]:
    (zygote,) = psutil.Process(validator.process.pid).children()
    return zygote.children()


async def slow_offer(registry) -> tuple[str, int]:
    """An evaluation that takes a few seconds."""
    spec = ModelSpec((8, 8), 10, Mlp((512, 512, 512)), input_scale=1 / 255)
    x, y = random_dataset(60_000, (8, 8), 10)
    return await registry.offer(dataset_bytes(x, y), model_bytes(spec), spec, max_cpu_s=600), len(y)


async def first_position(calls, name: str) -> pb.EvaluationRun:
    async for message in calls.WatchEvaluationRun(pb.WatchEvaluationRunRequest(assignment=name)):
        if message.run.position:
            return message.run
    raise AssertionError("the run ended before it moved")


async def test_a_model_server_killed_in_the_middle_costs_one_attempt(registry, start):
    registry.lease_s = 3.0
    name, rows = await slow_offer(registry)
    validator = await start()
    await asyncio.wait_for(registry.until(name, ACCEPTED), LONG_S)
    async with validator.calls() as calls:
        await until_run(calls)
        run = await first_position(calls, name)
        assert run.state == pb.EVALUATION_RUN_STATE_EVALUATING
        assert (run.total, run.samples_per_second > 0, run.eta_s > 0) == (rows, True, True)
        (child,) = model_servers(validator)
        child.kill()
        messages = [each.run async for each in calls.WatchEvaluationRun(pb.WatchEvaluationRunRequest(assignment=name))]
    duty = await asyncio.wait_for(registry.until(name, OPENED), LONG_S)
    assert duty.report.fault == types_pb2.MODEL_FAULT_UNSPECIFIED
    assert duty.report.counts.total == rows
    assert duty.renewals > 0
    assert messages[-1].state == pb.EVALUATION_RUN_STATE_OPENED
    assert pb.EVALUATION_RUN_STATE_EVALUATING in {run.state for run in messages}


async def until_status(calls, holds) -> pb.GetStatusResponse:
    """The first status that holds; it is another process's, and there is no stream of them."""
    async with asyncio.timeout(LONG_S):
        while not holds(status := await calls.GetStatus(pb.GetStatusRequest())):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return status


async def until_run(calls) -> None:
    """Returns when a run is in progress."""
    await until_status(calls, lambda status: status.active)


async def test_killed_between_report_and_seal_it_seals_the_same_report(registry, start):
    registry.refuse_seals = True
    x, y = random_dataset(300, (8, 8), 10)
    name = await registry.offer(dataset_bytes(x, y), model_bytes(SPEC), SPEC)
    first = await start()
    await asyncio.wait_for(registry.until_seal_attempt(), LONG_S)
    await first.kill()
    registry.refuse_seals = False
    await start()
    duty = await asyncio.wait_for(registry.until(name, OPENED), LONG_S)
    assert set(registry.seal_attempts) == {duty.seal}
    assert duty.report.counts.total == 300


async def test_killed_between_seal_and_open_it_opens(registry, start):
    registry.open_at_once = False
    x, y = random_dataset(300, (8, 8), 10)
    name = await registry.offer(dataset_bytes(x, y), model_bytes(SPEC), SPEC)
    first = await start()
    await asyncio.wait_for(registry.until(name, SEALED), LONG_S)
    await first.kill()
    await registry.change(name, opening=True)
    second = await start()
    duty = await asyncio.wait_for(registry.until(name, OPENED), LONG_S)
    assert duty.report.counts.total == 300
    assert len(registry.seal_attempts) == 1
    async with second.calls() as calls:
        status = await calls.GetStatus(pb.GetStatusRequest())
        assert "Each model server" in status.isolation


async def test_killed_in_mid_evaluation_it_does_it_again_and_leaves_no_process(registry, start):
    name, rows = await slow_offer(registry)
    first = await start()
    await asyncio.wait_for(registry.until(name, ACCEPTED), LONG_S)
    async with first.calls() as calls:
        await until_run(calls)
        await first_position(calls, name)
    left = psutil.Process(first.process.pid).children(recursive=True)
    assert len(left) == 2
    await first.kill()
    _, alive = await asyncio.to_thread(psutil.wait_procs, left, 10)
    assert alive == []
    await start()
    duty = await asyncio.wait_for(registry.until(name, OPENED), LONG_S)
    assert duty.report.counts.total == rows


async def test_released_and_expired_assignments_end_their_runs(registry, start):
    released, _ = await slow_offer(registry)
    validator = await start()
    await asyncio.wait_for(registry.until(released, ACCEPTED), LONG_S)
    async with validator.calls() as calls:
        await until_run(calls)
        await registry.change(released, state=RELEASED)
        last = [each.run async for each in calls.WatchEvaluationRun(pb.WatchEvaluationRunRequest(assignment=released))]
        assert last[-1].state == pb.EVALUATION_RUN_STATE_RELEASED
        registry.open_at_once = False
        x, y = random_dataset(10, (8, 8), 10)
        expired = await registry.offer(dataset_bytes(x, y), model_bytes(SPEC), SPEC)
        await asyncio.wait_for(registry.until(expired, SEALED), LONG_S)
        await registry.change(expired, state=EXPIRED)
        last = [each.run async for each in calls.WatchEvaluationRun(pb.WatchEvaluationRunRequest(assignment=expired))]
        assert last[-1].state == pb.EVALUATION_RUN_STATE_FAILED
        assert last[-1].detail == "the assignment expired"
        await until_status(calls, lambda status: status.ended == 2)
    assert model_servers(validator) == []


async def test_a_drain_lets_runs_end_and_gives_the_rest_back(registry, start):
    registry.open_at_once = False
    x, y = random_dataset(300, (8, 8), 10)
    data = dataset_bytes(x, y)
    name = await registry.offer(data, model_bytes(SPEC), SPEC)
    validator = await start()
    await asyncio.wait_for(registry.until(name, SEALED), LONG_S)
    async with validator.calls() as calls:
        assert (await calls.Drain(pb.DrainRequest())).active == 1
        late = await registry.offer(data, model_bytes(SPEC, 1), SPEC)
        assert "no further" in (await asyncio.wait_for(registry.until(late, DECLINED), LONG_S)).reason
        status = await calls.GetStatus(pb.GetStatusRequest())
        assert (status.draining, len(status.active)) == (True, 1)
        assert (await calls.Drain(pb.DrainRequest())).active == 1
    assert validator.process.returncode is None
    await registry.change(name, opening=True)
    assert await validator.wait() == 0
    assert registry.duties[name].state == OPENED


async def test_it_stops_after_n_runs(registry, start):
    x, y = random_dataset(300, (8, 8), 10)
    data = dataset_bytes(x, y)
    names = [await registry.offer(data, model_bytes(SPEC, seed), SPEC) for seed in range(4)]
    validator = await start(stop_after=2, concurrency=2)
    assert await validator.wait() == 0
    states = sorted(registry.duties[name].state for name in names)
    assert states == [OPENED, OPENED, DECLINED, DECLINED]


async def test_a_registry_that_restarts_is_found_again(registry, start):
    validator = await start()
    await asyncio.wait_for(registry.until_watched(), LONG_S)
    await registry.stop()
    await registry.start()
    x, y = random_dataset(300, (8, 8), 10)
    name = await registry.offer(dataset_bytes(x, y), model_bytes(SPEC), SPEC)
    await asyncio.wait_for(registry.until(name, OPENED), LONG_S)
    assert validator.process.returncode is None


async def test_a_state_that_only_a_newer_registry_knows_is_passed_over(registry, start):
    x, y = random_dataset(300, (8, 8), 10)
    data = dataset_bytes(x, y)
    strange = await registry.offer(data, model_bytes(SPEC), SPEC)
    await registry.change(strange, state=99)
    validator = await start()
    await asyncio.wait_for(registry.until_watched(), LONG_S)
    await registry.change(strange, state=99)
    name = await registry.offer(data, model_bytes(SPEC, 1), SPEC)
    await asyncio.wait_for(registry.until(name, OPENED), LONG_S)
    assert registry.watches == 1
    assert validator.process.returncode is None


async def test_an_artifact_of_another_digest_is_declined(registry, start):
    x, y = random_dataset(300, (8, 8), 10)
    name = await registry.offer(dataset_bytes(x, y), model_bytes(SPEC), SPEC)
    digest = registry.duties[name].order.dataset.removeprefix("artifacts/")
    registry.artifacts[digest] = bytes(len(registry.artifacts[digest]))
    validator = await start()
    duty = await asyncio.wait_for(registry.until(name, DECLINED), LONG_S)
    assert digest in duty.reason
    assert not any((validator.state / "cache").iterdir())


async def test_only_its_key_and_the_operators_may_look(registry, start, tmp_path):
    operator = Key.generate()
    validator = await start(operators=operator.id)
    async with validator.calls(operator) as calls:
        status = await calls.GetStatus(pb.GetStatusRequest())
        assert status.participant == f"participants/{validator.key.id}"
    for method, request in (
        ("GetStatus", pb.GetStatusRequest()),
        ("ListEvaluationRuns", pb.ListEvaluationRunsRequest()),
        ("Drain", pb.DrainRequest()),
    ):
        async with validator.calls(Key.generate()) as calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(calls, method)(request)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    async with open_peer(validator.address, key=validator.key, audience="tiltyard.local/registry") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.ValidationServiceStub(channel).GetStatus(pb.GetStatusRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_bad_requests_name_their_field(registry, start):
    x, y = random_dataset(30, (8, 8), 10)
    data = dataset_bytes(x, y)
    names = [await registry.offer(data, model_bytes(SPEC, seed), SPEC) for seed in range(3)]
    validator = await start()
    for name in names:
        await asyncio.wait_for(registry.until(name, OPENED), LONG_S)
    async with validator.calls() as calls:
        await until_status(calls, lambda status: status.ended == 3)
        first = await calls.ListEvaluationRuns(pb.ListEvaluationRunsRequest(page_size=2))
        rest = await calls.ListEvaluationRuns(
            pb.ListEvaluationRunsRequest(page_size=2, page_token=first.next_page_token)
        )
        assert [run.assignment for run in (*first.runs, *rest.runs)] == names[::-1]
        assert rest.next_page_token == ""
        for request, field in (
            (pb.ListEvaluationRunsRequest(page_size=-1), "page_size"),
            (pb.ListEvaluationRunsRequest(page_token="forged"), "page_token"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await calls.ListEvaluationRuns(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert field in caught.value.details()
        for name, code in (
            ("tasks/x", grpc.StatusCode.INVALID_ARGUMENT),
            (f"tasks/x/submissions/1/assignments/1-{validator.key.id}", grpc.StatusCode.NOT_FOUND),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in calls.WatchEvaluationRun(pb.WatchEvaluationRunRequest(assignment=name)):
                    pass
            assert caught.value.code() is code


async def test_a_second_process_on_one_state_folder_is_refused(registry, start, tmp_path):
    await start()
    second = ValidatorProcess(tmp_path / "state", registry.address)
    with pytest.raises(RuntimeError, match="TILTYARD_STATE_DIR"):
        await second.start()
    assert await second.wait() == 2


async def test_a_bad_setting_stops_the_start_with_its_name(tmp_path):
    process = ValidatorProcess(tmp_path / "state", "127.0.0.1:1", device="cuda")
    with pytest.raises(RuntimeError, match="TILTYARD_DEVICE"):
        await process.start()
    assert await process.wait() == 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [("REGISTRY", ""), ("MODEL_SERVERS", "gpu:8001"), ("MODEL_SERVERS", "gpu=h:1"), ("CONCURRENCY", "0")],
)
def test_a_bad_setting_is_told_by_its_name(monkeypatch, capsys, variable, value):
    monkeypatch.setenv("TILTYARD_REGISTRY", "127.0.0.1:1")
    monkeypatch.setenv(f"TILTYARD_{variable}", value)
    with pytest.raises(SystemExit) as stopped:
        ValidatorSettings.load()
    assert stopped.value.code == 2
    assert f"TILTYARD_{variable}" in capsys.readouterr().err


def test_the_process_imports_no_torch():
    code = "import sys, services.validator.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_predictions_of_the_test_are_not_all_alike(tmp_path):
    x, y = random_dataset(500, (8, 8), 10)
    _, _, logits = plain_evaluation(tmp_path, model_bytes(SPEC), SPEC, x, y)
    assert len(np.unique(logits.argmax(axis=1))) > 1


async def test_a_model_that_no_task_may_have_is_not_worked_on(registry, start):
    data = dataset_bytes(*random_dataset(10, (8, 8), 10))
    boundless = ModelSpec((8, 8), 10, Mlp((1 << 17,)), input_scale=1 / 255)
    name = await registry.offer(data, model_bytes(SPEC), boundless)
    await start()
    duty = await asyncio.wait_for(registry.until(name, OPENED, DECLINED), LONG_S)
    assert "mlp.hidden[0] must be 1 to 65536" in duty.reason


@pytest.mark.parametrize("metric", ["TOP_K_ACCURACY", "WITHIN_BOUND"])
async def test_other_metrics_are_counted_as_a_tally_counts_them(registry, start, tmp_path, metric):
    spec = ModelSpec((8, 8), 3, Mlp((16,)), input_scale=1 / 255)
    x, y = random_dataset(1500, spec.input_shape, spec.outputs)
    model = model_bytes(spec)
    order = {"metric": task_pb2.METRIC_TOP_K_ACCURACY, "top_k": 2}
    tally = Tally(Metric.TOP_K_ACCURACY, top_k=2)
    if metric == "WITHIN_BOUND":
        y = np.random.default_rng(1).normal(size=(len(x), spec.outputs)).astype(np.float32)
        order = {"metric": task_pb2.METRIC_WITHIN_BOUND, "bound": 1.25}
        tally = Tally(Metric.WITHIN_BOUND, bound=1.25)
    name = await registry.offer(save({"x": x, "y": y}), model, spec, **order)
    await start()
    duty = await asyncio.wait_for(registry.until(name, OPENED), LONG_S)
    _, _, logits = plain_evaluation(tmp_path, model, spec, x, np.zeros(len(x)))
    tally.add(logits, y)
    counted = tally.counts()
    assert 0 < counted.correct < len(x)
    assert (duty.report.counts.correct, duty.report.counts.total) == (counted.correct, len(x))
    assert duty.report.counts.ambiguous == counted.ambiguous
    assert duty.hashes == b"".join(tally.prediction_blocks())
