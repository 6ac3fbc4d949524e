"""The stream of batches against model servers that answer well, wrongly, or not at all."""

import threading
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from safetensors.numpy import save_file

from services.validator.pipeline import (
    BatchStream,
    RequestRefused,
    StreamBroken,
    StreamCancelled,
    WrongAnswer,
    parse_answer,
)
from services.validator.rows import EvaluationRows
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc
from tiltyard.varint import encode_varint

ROWS, WIDTH = 1000, 5


class Server(rpc.GRPCInferenceServiceServicer):
    """Answers each row with its first two features, unless `spoil` changes the answer. Keeps what came."""

    def __init__(self, spoil=None):
        self.requests = []
        self.asked = threading.Event()
        self._spoil = spoil

    def ModelStreamInfer(self, request_iterator, context):
        for request in request_iterator:
            self.requests.append(request)
            self.asked.set()
            x = np.frombuffer(request.raw_input_contents[0], dtype=np.uint8).reshape(tuple(request.inputs[0].shape))
            logits = x[:, :2].astype("<f4")
            answer = pb.ModelStreamInferResponse()
            answer.infer_response.id = request.id
            answer.infer_response.outputs.add(name="logits", datatype="FP32", shape=logits.shape)
            answer.infer_response.raw_output_contents.append(logits.tobytes())
            if self._spoil:
                self._spoil(answer, context)
            yield answer


@contextmanager
def serving(server):
    running = grpc.server(futures.ThreadPoolExecutor(2))
    rpc.add_GRPCInferenceServiceServicer_to_server(server, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}"
    running.stop(0).wait()


@pytest.fixture
def rows(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (ROWS, WIDTH), dtype=np.uint8)
    save_file({"x": x, "y": np.zeros(ROWS, int)}, tmp_path / "d")
    with EvaluationRows.open(tmp_path / "d") as opened:
        yield opened


def stream(address, **options):
    return BatchStream(address, model="m", outputs=2, rows_per_batch=300, **options)


def test_every_row_is_answered_in_order(rows):
    server, taken = Server(), []
    with serving(server) as address:
        stream(address).run(rows, lambda start, stop, logits: taken.append((start, stop, logits.copy())))
    assert [(start, stop) for start, stop, _ in taken] == [(0, 300), (300, 600), (600, 900), (900, 1000)]
    x = np.frombuffer(rows.features(0, ROWS), np.uint8).reshape(ROWS, WIDTH)
    assert np.array_equal(np.concatenate([logits for *_, logits in taken]), x[:, :2])
    assert [request.inputs[0].datatype for request in server.requests] == ["UINT8"] * 4


def test_no_more_than_the_window_is_in_flight(rows):
    allowed = threading.Semaphore(0)
    server = Server(lambda answer, context: allowed.acquire(timeout=30))
    seen = []

    def take(start, stop, logits):
        seen.append(len(server.requests))
        allowed.release()

    with serving(server) as address:
        allowed.release()
        BatchStream(address, model="m", outputs=2, rows_per_batch=10, window=3).run(rows, take)
    assert len(seen) == 100
    # When the n-th answer is taken, at most n + 3 requests have been sent.
    assert all(sent <= taken + 3 for taken, sent in enumerate(seen, start=1))


def set_shape(answer, context):
    answer.infer_response.outputs[0].shape[1] = 3


def drop_bytes(answer, context):
    answer.infer_response.raw_output_contents[0] = b"\0"


def another_id(answer, context):
    answer.infer_response.id = "7"


def another_dtype(answer, context):
    answer.infer_response.outputs[0].datatype = "FP64"


def no_output(answer, context):
    del answer.infer_response.outputs[:]


def long_error_message(answer, context):
    answer.error_message = "x" * 10_000


def long_dtype(answer, context):
    answer.infer_response.outputs[0].datatype = "x" * 10_000


def long_shape(answer, context):
    answer.infer_response.outputs[0].shape.extend([1] * 10_000)


def many_outputs(answer, context):
    for _ in range(50_000):
        answer.infer_response.outputs.add()


def error_message(answer, context):
    answer.error_message = "no such model"


def abort(answer, context):
    context.abort(grpc.StatusCode.INTERNAL, "the model server fell over")


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (set_shape, WrongAnswer, r"shape \[300, 3\], not FP32 of shape \[300, 2\]"),
        (drop_bytes, WrongAnswer, "not FP32"),
        (another_id, WrongAnswer, "names batch '7'"),
        (another_dtype, WrongAnswer, "FP64"),
        (no_output, WrongAnswer, "0 outputs"),
        (error_message, RequestRefused, "no such model"),
        (long_error_message, RequestRefused, "^x{500}$"),
        (long_dtype, WrongAnswer, r"^the output is x{20} of shape \[300, 2\], not FP32"),
        (long_shape, WrongAnswer, r"of shape \[300, 2(, 1){6}\], not FP32"),
        (many_outputs, WrongAnswer, r"has 10\d{4} bytes, too many for FP32 of shape \[300, 2\]"),
        (abort, StreamBroken, "fell over"),
    ],
)
def test_a_wrong_answer_is_named(rows, spoil, error, text):
    with serving(Server(spoil)) as address, pytest.raises(error, match=text):
        stream(address).run(rows, lambda *_: None)


def test_an_answer_that_is_no_message_is_a_wrong_one():
    with pytest.raises(WrongAnswer, match="no message of the protocol"):
        parse_answer(pb.ModelInferResponse, b"\xff", (300, 2))


def test_a_server_that_is_not_there_breaks_the_stream(rows, tmp_path):
    with pytest.raises(StreamBroken):
        stream(f"unix:{tmp_path}/none").run(rows, lambda *_: None)


def test_what_take_raises_comes_out(rows):
    def take(start, stop, logits):
        raise ValueError("enough")

    with serving(Server()) as address, pytest.raises(ValueError, match="enough"):
        stream(address).run(rows, take)


def test_a_dataset_that_shrinks_is_an_error_of_its_own(rows, tmp_path):
    (tmp_path / "d").write_bytes((tmp_path / "d").read_bytes()[:1500])
    with serving(Server()) as address, pytest.raises(Exception, match="became shorter"):
        stream(address).run(rows, lambda *_: None)


def test_it_can_be_cancelled_from_another_thread(rows):
    hanging = threading.Event()
    server = Server(lambda answer, context: hanging.wait(30))
    with serving(server) as address, futures.ThreadPoolExecutor(1) as pool:
        one = stream(address, window=1)
        running = pool.submit(one.run, rows, lambda *_: None)
        assert server.asked.wait(10)
        one.cancel()
        with pytest.raises(StreamCancelled):
            running.result(timeout=10)
        hanging.set()
        with pytest.raises(StreamCancelled):
            one.run(rows, lambda *_: None)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**21, 2**32])
def test_lengths_are_encoded_as_protobuf_does(value):
    message = pb.InferParameter(int64_param=value).SerializeToString()
    assert message == bytes([pb.InferParameter.INT64_PARAM_FIELD_NUMBER << 3]) + encode_varint(value)
