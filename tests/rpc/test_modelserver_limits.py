"""What a model server does when more is asked than it can do: joins, refuses, forgets, and keeps within its memory."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from services.modelserver.loading import resolve_device
from services.modelserver.models import Models
from services.modelserver.running import MAX_MESSAGE_BYTES
from services.modelserver.servicer import mounts
from services.runtime.errors import FailedPrecondition, ResourceExhausted
from services.runtime.rpc_errors import from_rpc_error
from services.runtime.server import ArenaServer
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc
from tiltyard.models import Network, build, save_weights
from tiltyard.modelspec import Mlp, ModelSpec, Transformer, count_parameters, to_json

SPEC = ModelSpec((4,), 2, Mlp((8,)))
WEIGHTS_BYTES = 4 * (4 * 8 + 8 + 8 * 2 + 2)
PATIENCE_S = 20.0


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if holds():
                return
            await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(models: Models) -> AsyncIterator[rpc.GRPCInferenceServiceAsyncStub]:
    async with (
        ArenaServer("127.0.0.1:0", mounts(models), authenticator=None, max_message_bytes=MAX_MESSAGE_BYTES) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield rpc.GRPCInferenceServiceStub(channel)
    models.close()


def request(name: str = "m", *, rows: int = 1, id: str = "") -> pb.ModelInferRequest:
    values = np.ones((rows, 4), "<f4")
    message = pb.ModelInferRequest(model_name=name, id=id, raw_input_contents=[values.tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=values.shape)
    return message


class Gated:
    """A network that runs only when the gate is open; `runs` has the rows of each run."""

    def __init__(self) -> None:
        self.network: Network = build(SPEC, seed=0)
        self.open = threading.Event()
        self.runs: list[int] = []
        self.network.register_forward_pre_hook(self._wait)

    def _wait(self, _: object, rows: tuple[np.ndarray]) -> None:
        self.runs.append(len(rows[0]))
        assert self.open.wait(PATIENCE_S)

    async def begun(self) -> None:
        await until(lambda: bool(self.runs))


async def test_rows_of_calls_and_streams_run_together() -> None:
    gated = Gated()
    models = Models()
    models.add("m", gated.network)
    async with serving(models) as stub:
        first = asyncio.ensure_future(stub.ModelInfer(request()))
        await gated.begun()
        calls = [asyncio.ensure_future(stub.ModelInfer(request(rows=2))) for _ in range(3)]
        streams = [stub.ModelStreamInfer(iter([request(rows=3, id="a")])) for _ in range(2)]
        answers = [asyncio.ensure_future(stream.read()) for stream in streams]
        await until(lambda: models.waiting == 5)
        gated.open.set()
        await asyncio.gather(first, *calls)
        for answer in await asyncio.gather(*answers):
            assert list(answer.infer_response.outputs[0].shape) == [3, 2]
    assert gated.runs == [1, 3 * 2 + 2 * 3]


async def test_beyond_the_queue_a_call_is_refused_with_the_time_to_wait_and_the_others_are_answered() -> None:
    gated = Gated()
    models = Models(queue_bytes=2 * 4200)
    models.add("m", gated.network)
    async with serving(models) as stub:
        first = asyncio.ensure_future(stub.ModelInfer(request()))
        await gated.begun()
        others = [asyncio.ensure_future(stub.ModelInfer(request())) for _ in range(8)]
        done, waiting = await asyncio.wait(others, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 7:
            more, waiting = await asyncio.wait(waiting, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        for each in done:
            refused = each.exception()
            assert isinstance(refused, grpc.aio.AioRpcError)
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            error = from_rpc_error(refused)
            assert isinstance(error, ResourceExhausted)
            assert (error.reason, (error.retry_after_s or 0) > 0) == ("QUEUE_FULL", True)
        gated.open.set()
        await asyncio.gather(first, *waiting)


async def test_a_call_whose_deadline_has_passed_is_never_run() -> None:
    gated = Gated()
    models = Models()
    models.add("m", gated.network)
    async with serving(models) as stub:
        first = asyncio.ensure_future(stub.ModelInfer(request()))
        await gated.begun()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(request(rows=5), timeout=0.1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # The server may hear of it later than the client.
        await until(lambda: not models.waiting)
        gated.open.set()
        await first
        await stub.ModelInfer(request(rows=2))
    assert gated.runs == [1, 2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "spec.json").write_text(json.dumps(to_json(SPEC)))
        save_weights(build(SPEC, seed=seed), folder / "model.safetensors")
    return tmp_path


async def answer(stub: rpc.GRPCInferenceServiceAsyncStub, name: str) -> bytes:
    return (await stub.ModelInfer(request(name))).raw_output_contents[0]


async def test_the_least_recently_used_model_makes_room_and_comes_back_when_it_is_asked(repository: Path) -> None:
    models = Models(repository=repository, memory_bytes=2 * WEIGHTS_BYTES)
    await models.load_all()
    assert models.in_memory() == ["a", "b"]
    async with serving(models) as stub:
        answers = {name: await answer(stub, name) for name in "abc"}
        assert len(set(answers.values())) == 3
        assert models.in_memory() == ["b", "c"]
        await answer(stub, "b")
        assert await answer(stub, "a") == answers["a"]
        assert models.in_memory() == ["b", "a"]
        assert models.memory_bytes == 2 * WEIGHTS_BYTES
        # Who asks cannot tell, but for the time that it takes.
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="c"))).ready
        assert (await stub.ModelMetadata(pb.ModelMetadataRequest(name="c"))).outputs[0].shape[1] == 2
        index = await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))
        assert [each.name for each in index.models] == ["a", "b", "c"]
        await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="c"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(stub, "c")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_model_of_any_size_that_a_task_may_allow_is_no_bad_one(tmp_path: Path) -> None:
    huge = ModelSpec((16,), 2, Transformer(1 << 20, 8192, 1, 1))
    assert count_parameters(huge) > 1 << 33
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "spec.json").write_text(json.dumps(to_json(huge)))
    models = Models(repository=tmp_path, memory_bytes=1 << 30)
    with pytest.raises(FailedPrecondition) as caught:
        await models.load("huge")
    assert caught.value.reason == "MODEL_TOO_LARGE"


async def test_models_whose_folders_are_gone_make_room_for_good(repository: Path) -> None:
    models = Models(repository=repository, memory_bytes=2 * WEIGHTS_BYTES)
    await models.load_all()
    shutil.rmtree(repository / "a")
    await models.load("c")
    assert models.in_memory() == ["b", "c"]
    assert not models.ready("a")
    # As long as nobody needs its room, one is served all the same.
    shutil.rmtree(repository / "b")
    async with serving(models) as stub:
        assert await answer(stub, "b")


async def test_a_model_in_use_is_not_pushed_out_and_one_over_the_budget_never_loads(repository: Path) -> None:
    gated = Gated()
    models = Models(repository=repository, memory_bytes=WEIGHTS_BYTES)
    models.add("busy", gated.network)
    async with serving(models) as stub:
        first = asyncio.ensure_future(stub.ModelInfer(request("busy")))
        await gated.begun()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="a"))
        assert (caught.value.code(), from_rpc_error(caught.value).reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "MODELS_IN_USE",
        )
        gated.open.set()
        await first
    small = Models(repository=repository, memory_bytes=WEIGHTS_BYTES - 1)
    async with serving(small) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="a"))
        assert (caught.value.code(), from_rpc_error(caught.value).reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "MODEL_TOO_LARGE",
        )


async def test_many_ask_at_once_for_a_model_that_is_not_in_memory(repository: Path) -> None:
    models = Models(repository=repository, memory_bytes=WEIGHTS_BYTES)
    await models.load_all()
    async with serving(models) as stub:
        answers = {name: await answer(stub, name) for name in "abc"}
        names = list("abcabc")
        # Room for one: who comes while the others are in use is told so, and comes again.
        found = await asyncio.gather(*(answer(stub, name) for name in names), return_exceptions=True)
        for name, each in zip(names, found, strict=True):
            if isinstance(each, bytes):
                # Two for one model may have run as one batch, which rounds the last bit in another way.
                own, alone = (np.frombuffer(raw, "<f4") for raw in (each, answers[name]))
                np.testing.assert_allclose(own, alone, rtol=1e-5)
            else:
                assert isinstance(each, grpc.aio.AioRpcError)
                assert from_rpc_error(each).reason == "MODELS_IN_USE"
        assert any(isinstance(each, bytes) for each in found)
        assert models.memory_bytes <= WEIGHTS_BYTES


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="cuda:999 is wanted, and this process sees"):
        resolve_device("cuda:999")


def test_a_gpu_computes_in_float32_like_a_cpu() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        Models().close()
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
