"""A validator process with model servers of its operator's instead of children of its own."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from test_validator import LONG_S, ValidatorProcess, first_position, plain_evaluation, until_run
from validator_registry import ACCEPTED, DECLINED, OPENED, FakeRegistry, dataset_bytes, model_bytes, random_dataset

from services.runtime.channels import open_peer
from services.validator import endpoints, repository
from services.validator.assignments import Order
from services.validator.endpoints import EndpointAttempts
from services.validator.evaluation import Job
from services.validator.fleet import parse_servers
from services.validator.runs import Progress
from tiltyard.authority import Authority
from tiltyard.calls.tls import ChannelTls
from tiltyard.identity import Key
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc
from tiltyard.modelspec import Mlp, ModelSpec
from tiltyard.transparency import root_hash
from tiltyard.type.v1 import evaluation_pb2 as types_pb2


@asynccontextmanager
async def model_server(folder: Path, share: Path, operator: str, **more: Path):
    """`python -m services.modelserver` behind a token; yields its address, its key's id, and the process."""
    key = Key.load_or_create(folder / "key.pem")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")}
    settings = {
        "TILTYARD_LISTEN": "127.0.0.1:0",
        "TILTYARD_STATE_DIR": str(folder),
        "TILTYARD_MODEL_REPOSITORY": str(share),
        "TILTYARD_OPERATORS": operator,
        "TILTYARD_THREADS": "1",
        "TILTYARD_LOG_FORMAT": "json",
        **{f"TILTYARD_{name.upper()}": str(value) for name, value in more.items()},
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.modelserver", env={**inherited, **settings}, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(LONG_S):
            while b'"serving"' not in (line := await process.stderr.readline()):
                assert line, "the model server did not start"
        address = line.decode().partition('"address": "')[2].partition('"')[0]
        yield address, key.id, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
async def registry(tmp_path):
    key = Key.load_or_create(tmp_path / "state" / "key.pem")
    fake = FakeRegistry(key.id)
    # Peers at other addresses are called by TLS here.
    fake.address = f"unix:{tmp_path}/r.sock"
    await fake.start()
    yield fake
    await fake.stop()


async def test_of_two_servers_that_share_an_evaluation_one_dies_in_the_middle_and_the_other_goes_on(registry, tmp_path):
    share = tmp_path / "share"
    share.mkdir()
    # Wide enough to be caught in the middle; the second server is called by mutual TLS.
    spec = ModelSpec((8, 8), 10, Mlp((1024, 1024, 1024)), input_scale=1 / 255)
    x, y = random_dataset(40_000, (8, 8), 10)
    model = model_bytes(spec)
    operator = Key.load_or_create(tmp_path / "state" / "key.pem").id
    authority = Authority.open(tmp_path / "authority")
    ours, theirs = (authority.issue(name, ["127.0.0.1"]) for name in ("validator", "two"))
    tls = {"tls_certificate": theirs.certificate, "tls_key": theirs.key, "tls_client_ca": authority.certificate}
    async with (
        model_server(tmp_path / "one", share, operator) as (one, one_id, first),
        model_server(tmp_path / "two", share, operator, **tls) as (two, two_id, _),
    ):
        validator = ValidatorProcess(
            tmp_path / "state",
            registry.address,
            model_servers=f"one=grpc://{one}@{one_id},two={two}@{two_id}",
            model_share=share,
            tls_ca=authority.certificate,
            tls_certificate=ours.certificate,
            tls_key=ours.key,
        )
        await validator.start()
        try:
            name = await registry.offer(dataset_bytes(x, y), model, spec, max_cpu_s=600)
            await asyncio.wait_for(registry.until(name, ACCEPTED), LONG_S)
            async with validator.calls(tls=ChannelTls(authority.certificate)) as calls:
                await until_run(calls)
                assert (await first_position(calls, name)).position < len(y)
            first.send_signal(signal.SIGKILL)
            await first.wait()
            both = await asyncio.wait_for(registry.until(name, OPENED, DECLINED), LONG_S)
            assert both.report is not None, both.reason
            correct, blocks, _ = plain_evaluation(tmp_path, model, spec, x, y)
            assert both.report.counts.correct == correct
            assert both.report.prediction_root == root_hash(blocks)
            troubles = [entry for entry in validator.log if entry["event"] == "a model server failed or was late"]
            assert [entry["server"] for entry in troubles] == ["one"]
            nan = await registry.offer(dataset_bytes(x, y), model_bytes(spec, spoil=np.nan), spec)
            duty = await asyncio.wait_for(registry.until(nan, OPENED, DECLINED), LONG_S)
            assert duty.report is not None, duty.reason
            assert duty.report.fault == types_pb2.MODEL_FAULT_NAN_OUTPUT
        finally:
            await validator.stop()
        assert list(share.iterdir()) == []
        assert any(entry["event"] == "a model server does not load a model" for entry in validator.log)


async def test_what_a_killed_validator_left_on_its_servers_and_in_the_share_is_removed_by_the_next(registry, tmp_path):
    share = tmp_path / "share"
    share.mkdir()
    spec = ModelSpec((8, 8), 10, Mlp((1024, 1024, 1024)), input_scale=1 / 255)
    x, y = random_dataset(40_000, (8, 8), 10)
    operator = Key.load_or_create(tmp_path / "state" / "key.pem")
    async with model_server(tmp_path / "one", share, operator.id) as (address, server_id, _):
        validator = ValidatorProcess(
            tmp_path / "state", registry.address, model_servers=f"one={address}@{server_id}", model_share=share
        )
        await validator.start()
        try:
            name = await registry.offer(dataset_bytes(x, y), model_bytes(spec), spec, max_cpu_s=600)
            async with validator.calls() as calls:
                await until_run(calls)
                await first_position(calls, name)
            await validator.kill()
            (left,) = share.iterdir()
            # One that was killed while it still copied a model.
            (share / f".{left.name}").mkdir()
            await validator.start()
            duty = await asyncio.wait_for(registry.until(name, OPENED, DECLINED), LONG_S)
            assert duty.report is not None, duty.reason
        finally:
            await validator.stop()
        assert list(share.iterdir()) == []
        async with open_peer(address, key=operator, audience=server_id) as channel:
            ready = await rpc.GRPCInferenceServiceStub(channel).RepositoryIndex(pb.RepositoryIndexRequest(ready=True))
        assert list(ready.models) == []


async def test_an_attempt_that_is_given_up_while_it_copies_or_loads_leaves_nothing(tmp_path, monkeypatch):
    share, dataset, model = tmp_path / "share", tmp_path / "dataset", tmp_path / "model"
    share.mkdir()
    spec = ModelSpec((8, 8), 10, Mlp((8,)), input_scale=1 / 255)
    dataset.write_bytes(dataset_bytes(*random_dataset(10, (8, 8), 10)))
    model.write_bytes(model_bytes(spec))
    key = Key.load_or_create(tmp_path / "key.pem")
    order = Order("0" * 64, dataset.stat().st_size, "1" * 64, model.stat().st_size, spec, 60.0, 1 << 30)
    # Nobody answers there, and nobody refuses.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(LONG_S)
        servers = parse_servers(f"silent=127.0.0.1:{silent.getsockname()[1]}")
        attempts = EndpointAttempts(servers, share=share, template=None, key=key, concurrency=1)
        copying, go_on = threading.Event(), threading.Event()
        copy = shutil.copyfile

        def slowly(source, destination):
            copying.set()
            assert go_on.wait(LONG_S)
            return copy(source, destination)

        monkeypatch.setattr(endpoints.shutil, "copyfile", slowly)
        monkeypatch.setattr(repository, "UNLOAD_TIMEOUT_S", 0.5)
        attempt = asyncio.create_task(attempts.attempt(Job(order, dataset, model), Progress()))
        await asyncio.to_thread(copying.wait, LONG_S)
        attempt.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(attempt, LONG_S)
        assert list(share.iterdir()) == []

        attempt = asyncio.create_task(attempts.attempt(Job(order, dataset, model), Progress()))
        connection, _ = await asyncio.to_thread(silent.accept)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(attempt, 20)
        assert list(share.iterdir()) == []
        assert not any(thread.name.startswith("loading") for thread in threading.enumerate())
        connection.close()
        attempts.close()
