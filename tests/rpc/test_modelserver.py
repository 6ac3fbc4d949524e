"""The Open Inference Protocol over a real server."""

from __future__ import annotations  # the stubs' asynchronous types exist for the type checker only

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from services.modelserver.models import Models
from services.modelserver.pipeline import answered_in_order
from services.modelserver.running import MAX_MESSAGE_BYTES, Batch, Logits
from services.modelserver.servicer import mounts
from services.runtime.errors import Unavailable
from services.runtime.rpc_errors import from_rpc_error
from services.runtime.server import ArenaServer
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc
from tiltyard.models import build, save_weights
from tiltyard.modelspec import Convnet, Mlp, ModelSpec, to_json

SPEC = ModelSpec((2, 3), 4, Mlp((5,)), 1 / 16)
ROWS = np.arange(18, dtype=np.uint8).reshape(3, 2, 3)
LONG_S = 60.0  # on a busy machine
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def put(folder: Path, spec: ModelSpec, *, seed: int = 0) -> None:
    """A model's folder as the server expects it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(to_json(spec)))
    save_weights(build(spec, seed=seed), folder / "model.safetensors")


def expected(rows: np.ndarray, *, seed: int = 0) -> np.ndarray:
    with torch.inference_mode():
        return build(SPEC, seed=seed).eval()(torch.tensor(rows)).numpy()


def request(
    rows: np.ndarray = ROWS, datatype: str = "UINT8", *, name: str = "m", shape: list[int] | None = None, id: str = ""
) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=name, id=id, raw_input_contents=[rows.tobytes()])
    message.inputs.add(name="x", datatype=datatype, shape=list(rows.shape) if shape is None else shape)
    return message


def logits(response: pb.ModelInferResponse) -> np.ndarray:
    output = response.outputs[0]
    assert (output.name, output.datatype) == ("logits", "FP32")
    return np.frombuffer(response.raw_output_contents[0], "<f4").reshape(output.shape)


@pytest.fixture
async def models(tmp_path: Path) -> AsyncIterator[Models]:
    put(tmp_path / "m", SPEC)
    loaded = Models(repository=tmp_path)
    await loaded.load_all()
    yield loaded
    loaded.close()


@pytest.fixture
async def stub(models: Models) -> AsyncIterator[rpc.GRPCInferenceServiceAsyncStub]:
    async with (
        ArenaServer("127.0.0.1:0", mounts(models), authenticator=None, max_message_bytes=MAX_MESSAGE_BYTES) as server,
        grpc.aio.insecure_channel(server.address, options=OPTIONS) as channel,
    ):
        yield rpc.GRPCInferenceServiceStub(channel)


async def test_a_stream_left_open_does_not_hold_a_drain_up_and_what_was_asked_in_it_is_answered(models: Models) -> None:
    server = ArenaServer("127.0.0.1:0", mounts(models), authenticator=None, stream_idle_s=LONG_S)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel, asyncio.timeout(LONG_S):
        calls = rpc.GRPCInferenceServiceStub(channel)
        idle, asking = calls.ModelStreamInfer(), calls.ModelStreamInfer()
        await idle.write(request(id="idle"))
        await idle.read()
        begun, go_on = asyncio.Event(), asyncio.Event()
        infer = models.infer

        async def slow(name: str, version: str, batch: Batch) -> Logits:
            begun.set()
            await go_on.wait()
            return await infer(name, version, batch)

        models.infer = slow  # type: ignore[method-assign]
        await asking.write(request(id="asked"))
        await begun.wait()
        stopping = asyncio.create_task(server.stop(grace_s=10 * LONG_S))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await idle.read()
        assert isinstance(from_rpc_error(ended.value), Unavailable)
        assert from_rpc_error(ended.value).reason == "SERVER_DRAINING"
        go_on.set()
        answer = await asking.read()
        assert isinstance(answer, pb.ModelStreamInferResponse)
        assert answer.infer_response.id == "asked"
        with pytest.raises(grpc.aio.AioRpcError):
            await asking.read()
        await stopping


async def test_health_and_metadata(stub: rpc.GRPCInferenceServiceAsyncStub) -> None:
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert "model_repository" in (await stub.ServerMetadata(pb.ServerMetadataRequest())).extensions
    assert (await stub.ModelReady(pb.ModelReadyRequest(name="m"))).ready
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="other"))).ready
    metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="m"))
    assert list(metadata.inputs[0].shape) == [-1, 2, 3]
    assert list(metadata.outputs[0].shape) == [-1, 4]


@pytest.mark.parametrize(
    ("datatype", "dtype"), [("UINT8", "u1"), ("FP16", "<f2"), ("FP32", "<f4"), ("INT64", "<i8"), ("UINT16", "<u2")]
)
async def test_raw_rows_of_each_type(stub: rpc.GRPCInferenceServiceAsyncStub, datatype: str, dtype: str) -> None:
    response = await stub.ModelInfer(request(ROWS.astype(dtype), datatype, id="r"))
    assert (response.model_name, response.model_version, response.id) == ("m", "1", "r")
    np.testing.assert_array_equal(logits(response), expected(ROWS))


@pytest.mark.parametrize(
    ("datatype", "place"),
    [("UINT8", "uint_contents"), ("INT32", "int_contents"), ("INT64", "int64_contents"), ("FP32", "fp32_contents")],
)
async def test_typed_rows(stub: rpc.GRPCInferenceServiceAsyncStub, datatype: str, place: str) -> None:
    message = request(datatype=datatype)
    del message.raw_input_contents[:]
    getattr(message.inputs[0].contents, place).extend(ROWS.flatten().tolist())
    np.testing.assert_array_equal(logits(await stub.ModelInfer(message)), expected(ROWS))


def _typed(datatype: str, **contents: list[int]) -> pb.ModelInferRequest:
    message = request(datatype=datatype)
    del message.raw_input_contents[:]
    message.inputs[0].contents.CopyFrom(pb.InferTensorContents(**contents))  # type: ignore[arg-type]
    return message


def _changed(**fields: object) -> pb.ModelInferRequest:
    message = request()
    message.MergeFrom(pb.ModelInferRequest(**fields))  # type: ignore[arg-type]
    return message


def _both() -> pb.ModelInferRequest:
    message = request()
    message.inputs[0].contents.uint_contents.extend([1] * 18)
    return message


BAD = {
    "no input": (pb.ModelInferRequest(model_name="m"), "inputs"),
    "another input": (_changed(inputs=[pb.ModelInferRequest.InferInputTensor(name="z")]), "inputs"),
    "another output": (
        _changed(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="probabilities")]),
        "outputs",
    ),
    "type": (request(datatype="BF16"), "inputs[0].datatype"),
    "no type": (request(datatype=""), "inputs[0].datatype"),
    "shape": (request(shape=[3, 3, 2]), "inputs[0].shape"),
    "flat": (request(shape=[18]), "inputs[0].shape"),
    "no shape": (request(shape=[]), "inputs[0].shape"),
    "no rows": (request(ROWS[:0]), "inputs[0].shape"),
    "negative": (request(shape=[-1, 2, 3]), "inputs[0].shape"),
    "huge": (request(shape=[1 << 62, 2, 3]), "raw_input_contents[0]"),
    "short": (request(shape=[4, 2, 3]), "raw_input_contents[0]"),
    "long": (request(shape=[2, 2, 3]), "raw_input_contents[0]"),
    "twice": (_changed(raw_input_contents=[b""]), "raw_input_contents"),
    "two inputs": (_changed(inputs=[pb.ModelInferRequest.InferInputTensor(name="x")]), "inputs"),
    "both": (_both(), "inputs[0].contents"),
    "typed out of range": (_typed("UINT8", uint_contents=[256] * 18), "inputs[0].contents.uint_contents"),
    "typed too few": (_typed("UINT8", uint_contents=[1] * 17), "raw_input_contents[0]"),
    "typed half": (_typed("FP16"), "inputs[0].datatype"),
    "name": (request(name="../m"), "model_name"),
    "no name": (request(name=""), "model_name"),
}


@pytest.mark.parametrize(("message", "field"), BAD.values(), ids=BAD.keys())
async def test_a_wrong_request_names_its_field_and_does_not_end_a_stream(
    stub: rpc.GRPCInferenceServiceAsyncStub, message: pb.ModelInferRequest, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in (caught.value.details() or "")

    wrong = pb.ModelInferRequest()
    wrong.CopyFrom(message)
    wrong.id = "wrong"
    answers = [answer async for answer in stub.ModelStreamInfer(iter([request(id="a"), wrong, request(id="b")]))]
    assert [answer.infer_response.id for answer in answers] == ["a", "wrong", "b"]
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]
    assert field in answers[1].error_message
    assert not answers[1].infer_response.outputs


async def test_a_model_that_is_not_loaded_is_not_found(stub: rpc.GRPCInferenceServiceAsyncStub) -> None:
    versioned = request()
    versioned.model_version = "2"
    for message in (request(name="other"), versioned):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(message)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_more_rows_than_an_answer_holds_are_refused(stub: rpc.GRPCInferenceServiceAsyncStub) -> None:
    rows = np.zeros((1_050_000, 2, 3), dtype=np.uint8)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request(rows))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "rows" in (caught.value.details() or "")


async def test_a_long_stream_is_answered_in_order(stub: rpc.GRPCInferenceServiceAsyncStub) -> None:
    batches = [np.full((1 + number % 5, 2, 3), number, dtype=np.uint8) for number in range(64)]
    call = stub.ModelStreamInfer(request(batch, id=str(number)) for number, batch in enumerate(batches))
    answers = [answer.infer_response async for answer in call]
    assert [answer.id for answer in answers] == [str(number) for number in range(64)]
    for batch, answer in zip(batches, answers, strict=True):
        np.testing.assert_allclose(logits(answer), expected(batch), rtol=1e-5, atol=1e-6)


async def test_a_stream_is_answered_before_it_ends(stub: rpc.GRPCInferenceServiceAsyncStub) -> None:
    call = stub.ModelStreamInfer()
    for number in range(3):
        await call.write(request(id=str(number)))
        answer = await call.read()
        assert answer.infer_response.id == str(number)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_a_stream_that_is_cancelled_in_the_middle_ends_without_a_trace(
    stub: rpc.GRPCInferenceServiceAsyncStub,
) -> None:
    with capture_logs() as logged:
        call = stub.ModelStreamInfer()
        await call.write(request())
        assert (await call.read()).infer_response.model_name == "m"
        call.cancel()
        async with asyncio.timeout(10):
            while not logged:  # noqa: ASYNC110 - the server is a step behind its client
                await asyncio.sleep(0.01)
    # A server may hear of the end of the messages before it hears why.
    assert [(entry["event"], entry["code"] in ("CANCELLED", "OK")) for entry in logged] == [("call", True)]


async def test_models_are_loaded_anew_and_let_go(
    stub: rpc.GRPCInferenceServiceAsyncStub, models: Models, tmp_path: Path
) -> None:
    one = models.memory_bytes
    put(tmp_path / "m", SPEC, seed=1)
    np.testing.assert_array_equal(logits(await stub.ModelInfer(request())), expected(ROWS))
    await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m"))
    np.testing.assert_array_equal(logits(await stub.ModelInfer(request())), expected(ROWS, seed=1))
    put(tmp_path / "n", SPEC)
    await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="n"))
    assert models.memory_bytes == 2 * one > 0
    for _ in range(2):
        await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="n"))
    assert models.memory_bytes == one
    index = await stub.RepositoryIndex(pb.RepositoryIndexRequest())
    assert [(entry.name, entry.state) for entry in index.models] == [("m", "READY"), ("n", "UNAVAILABLE")]
    index = await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))
    assert [entry.name for entry in index.models] == ["m"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("../m", grpc.StatusCode.INVALID_ARGUMENT),
        ("m/../m", grpc.StatusCode.INVALID_ARGUMENT),
        ("..", grpc.StatusCode.INVALID_ARGUMENT),
        ("m\n", grpc.StatusCode.INVALID_ARGUMENT),
        ("/etc", grpc.StatusCode.INVALID_ARGUMENT),
        ("absent", grpc.StatusCode.NOT_FOUND),
    ],
)
async def test_names_stay_inside_the_repository(
    stub: rpc.GRPCInferenceServiceAsyncStub, name: str, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name))
    assert caught.value.code() is code


async def test_a_model_that_does_not_load_keeps_the_one_before(
    stub: rpc.GRPCInferenceServiceAsyncStub, tmp_path: Path
) -> None:
    for spec, raw, reason in (
        (to_json(ModelSpec((2, 3), 5, Mlp((5,)))), None, "SHAPE_MISMATCH"),
        (to_json(SPEC), b"\x80\x04nonsense", "BAD_FORMAT"),
        ({**to_json(SPEC), "outputs": 0}, None, "BAD_FORMAT"),
        ("[" * 100_000, None, "BAD_FORMAT"),
    ):
        put(tmp_path / "m", SPEC)
        (tmp_path / "m" / "spec.json").write_text(spec if isinstance(spec, str) else json.dumps(spec))
        if raw is not None:
            (tmp_path / "m" / "model.safetensors").write_bytes(raw)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert from_rpc_error(caught.value).reason == reason
    np.testing.assert_array_equal(logits(await stub.ModelInfer(request())), expected(ROWS))


async def test_a_module_of_the_process_is_served_and_the_loop_goes_on_meanwhile(models: Models) -> None:
    spec = ModelSpec((128, 128), 2, Convnet((64, 64)))
    models.add("busy", build(spec, seed=0))
    rows = np.zeros((16, 128, 128), dtype=np.uint8)
    async with (
        ArenaServer("127.0.0.1:0", mounts(models), authenticator=None, max_message_bytes=MAX_MESSAGE_BYTES) as server,
        grpc.aio.insecure_channel(server.address, options=OPTIONS) as channel,
    ):
        stub = rpc.GRPCInferenceServiceStub(channel)
        slow = asyncio.ensure_future(stub.ModelInfer(request(rows, name="busy")))
        answered_meanwhile = 0
        while not slow.done():
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            answered_meanwhile += not slow.done()
        assert logits(await slow).shape == (16, 2)
        assert answered_meanwhile


async def test_the_pipeline_reads_no_further_than_its_depth_and_stops_when_left() -> None:
    read: list[int] = []
    cancelled: list[int] = []
    gate = asyncio.Event()

    async def numbers() -> AsyncIterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    async def answer(number: int) -> int:
        if number:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                cancelled.append(number)
                raise
        return number

    stream = answered_in_order(numbers(), answer, depth=3)
    assert await anext(stream) == 0
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(read) <= 6
    await stream.aclose()  # type: ignore[attr-defined]
    for _ in range(3):
        await asyncio.sleep(0)
    assert cancelled
    before = len(read)
    gate.set()
    await asyncio.sleep(0)
    assert len(read) == before


async def test_nobody_reads_the_requests_any_more_when_the_pipeline_is_left() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    async def answer(number: int) -> int:
        return number

    source = numbers()
    stream = answered_in_order(source, answer)
    assert await anext(stream) == 1
    await stream.aclose()  # type: ignore[attr-defined]
    await source.aclose()  # type: ignore[attr-defined]


async def test_an_error_of_the_stream_comes_out_after_the_answers_before_it() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        raise RuntimeError("broken off")

    async def answer(number: int) -> int:
        return number

    stream = answered_in_order(numbers(), answer)
    assert await anext(stream) == 1
    with pytest.raises(RuntimeError, match="broken off"):
        await anext(stream)
