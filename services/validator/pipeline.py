"""Streams batches to an Open Inference Protocol server: read, encode, in flight, decode, in order, a window at a time.

A synchronous client in threads of its own: it costs no more than an asyncio one, and leaves the event loop to the
leases. Requests are put together by hand, since protobuf would copy every batch twice more.
"""

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from services.validator.rows import EvaluationRows
from tiltyard.calls.observed import Calls, ObservedCall
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.telemetry import tracing
from tiltyard.telemetry.tracing import Kind
from tiltyard.varint import encode_varint

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# What a message may hold beside its tensor.
ENVELOPE_BYTES = 64 * 1024
WINDOW = 4
# No pass is that long. A stalled one is found out much sooner, by its progress.
LONGEST_PASS_S = 24 * 3600.0

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
)

# Of what a server says in an answer: it may be a stranger's, and what runs say is kept, listed and published.
_MOST_CHARS = 500
_MOST_DIMENSIONS = 8

INPUT = "x"
OUTPUT = "logits"

# Field raw_input_contents, wire type LEN (protobuf encoding, "Message structure").
_RAW_INPUT_TAG = bytes([pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2])

Answer = TypeVar("Answer", bound=Message)
Take = Callable[[int, int, NDArray[np.float32]], None]
"""Called with the first row, the row after the last, and their outputs [n, outputs]."""


class StreamBroken(Exception):
    """The connection ended before every row was answered."""


class StreamCancelled(Exception):
    """`cancel` was called."""


class WrongAnswer(Exception):
    """The server answered something else than outputs for these rows; the text says what."""


class RequestRefused(Exception):
    """The server answered a batch with an error, in its own words."""


class BatchStream:
    """One pass over a dataset. `run` blocks its thread; `cancel` may be called from any other."""

    def __init__(self, address: str, *, model: str, outputs: int, rows_per_batch: int, window: int = WINDOW) -> None:
        self._address = address
        # Threads have contexts of their own: what surrounds the evaluation is known here.
        self._trace = tracing.current()
        self._model = model
        self._outputs = outputs
        self._rows_per_batch = rows_per_batch
        self._window = threading.Semaphore(window)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._call: grpc.Call | None = None
        self._source_error: Exception | None = None

    def run(self, rows: EvaluationRows, take: Take) -> None:
        """Streams every row in order and hands the outputs to `take`, in this thread.

        Raises StreamBroken, StreamCancelled, WrongAnswer, RequestRefused, and what reading rows and `take` raise.
        """
        with grpc.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            # Requests are bytes already, and answers are measured before they are read.
            method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD, None, None)
            # A socket is one model's: told as an attribute it would begin a metric of its own for every evaluation.
            peer = "" if self._address.startswith("unix:") else self._address
            observed = ObservedCall.begin(Calls(Kind.CLIENT, METHOD.lstrip("/"), peer=peer), self._trace)
            with self._lock:
                if self._stopped.is_set():
                    raise StreamCancelled
                call = method(self._requests(rows), timeout=LONGEST_PASS_S, metadata=observed.headers)
                self._call = call
            try:
                self._take_all(call, rows, take)
            except grpc.RpcError as error:
                self._raise(error)
            finally:
                self._stop(call)
                observed.answered(call.code())

    def cancel(self) -> None:
        """Ends `run` with StreamCancelled."""
        with self._lock:
            self._stopped.set()
            call = self._call
        if call is not None:
            self._stop(call)

    def _stop(self, call: grpc.Call) -> None:
        self._stopped.set()
        # Wakes the thread that waits for a place in the window, which then finds that it is over.
        self._window.release()
        call.cancel()

    def _raise(self, error: grpc.RpcError) -> None:
        if self._source_error is not None:
            raise self._source_error
        if self._stopped.is_set():
            raise StreamCancelled from error
        detail = error.details() if isinstance(error, grpc.Call) else str(error)
        raise StreamBroken(detail or "the connection ended") from error

    def _take_all(self, call: Iterator[bytes], rows: EvaluationRows, take: Take) -> None:
        start = 0
        for answer in call:
            self._window.release()
            stop = min(start + self._rows_per_batch, rows.total)
            if stop == start:
                raise WrongAnswer("more answers came than batches were sent")
            take(start, stop, self._logits(answer, start, (stop - start, self._outputs)))
            start = stop
        if self._source_error is not None:
            raise self._source_error
        if start < rows.total:
            raise StreamBroken(f"the answers ended after {start} of {rows.total} rows")

    def _requests(self, rows: EvaluationRows) -> Iterator[bytes]:
        """Runs in a thread of gRPC's; an error here is kept for `run`, since gRPC would only log it."""
        try:
            for start in range(0, rows.total, self._rows_per_batch):
                self._window.acquire()
                if self._stopped.is_set():
                    return
                stop = min(start + self._rows_per_batch, rows.total)
                yield encode_request(self._model, rows, start, stop)
        except Exception as error:
            self._source_error = error

    def _logits(self, received: bytes, start: int, expected: tuple[int, int]) -> NDArray[np.float32]:
        answer = parse_answer(pb.ModelStreamInferResponse, received, expected)
        if answer.error_message:
            raise RequestRefused(answer.error_message[:_MOST_CHARS])
        if answer.infer_response.id != str(start):
            raise WrongAnswer(f"the answer to batch {start} names batch {answer.infer_response.id[:20]!r}")
        return read_logits(answer.infer_response, expected)


def encode_request(model: str, rows: EvaluationRows, start: int, stop: int) -> bytes:
    """A ModelInferRequest with the features of these rows, serialised; its id is the first row."""
    head = pb.ModelInferRequest(model_name=model, id=str(start))
    head.inputs.add(name=INPUT, datatype=rows.datatype, shape=(stop - start, *rows.row_shape))
    features = rows.features(start, stop)
    return b"".join((head.SerializeToString(), _RAW_INPUT_TAG, encode_varint(len(features)), features))


def parse_answer(kind: type[Answer], received: bytes, expected: tuple[int, int]) -> Answer:
    """The message of an answer with FP32 outputs of the expected shape. Raises WrongAnswer for what is none.

    One much larger than that is not read: a stranger's takes fifty times its bytes of memory.
    """
    if len(received) > 4 * expected[0] * expected[1] + ENVELOPE_BYTES:
        raise WrongAnswer(f"the answer has {len(received)} bytes, too many for FP32 of shape {list(expected)}")
    try:
        return kind.FromString(received)
    except DecodeError as error:
        raise WrongAnswer("the answer is no message of the protocol") from error


def read_logits(response: pb.ModelInferResponse, expected: tuple[int, int]) -> NDArray[np.float32]:
    """The one output of an answer, FP32 of the expected shape, raw or typed. Raises WrongAnswer for anything else."""
    if len(response.outputs) != 1 or len(response.raw_output_contents) > 1:
        raise WrongAnswer(f"{len(response.outputs)} outputs came, not one")
    output = response.outputs[0]
    shape, datatype = tuple(output.shape), output.datatype
    if response.raw_output_contents:
        raw = response.raw_output_contents[0]
    else:
        raw = np.array(output.contents.fp32_contents, dtype="<f4").tobytes()
    if shape != expected or datatype != "FP32" or len(raw) != 4 * expected[0] * expected[1]:
        told = f"{datatype[:20]} of shape {list(shape[:_MOST_DIMENSIONS])}"
        raise WrongAnswer(f"the output is {told}, not FP32 of shape {list(expected)}")
    return np.frombuffer(raw, dtype="<f4").reshape(expected)
