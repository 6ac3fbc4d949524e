"""A child's server: the protocol over a synchronous gRPC server, tensors neither parsed nor copied by protobuf.

A child has one model and one client. There, asyncio and protobuf would cost a batch a third of what a small network
costs it; threads cost next to nothing.
"""

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
from typing import Any, TypeVar

import grpc

from services.modelserver import convert
from services.modelserver.models import Models
from services.modelserver.running import MAX_MESSAGE_BYTES
from services.modelserver.wireformat import RawRequest, encode_response, encode_stream_response, parse_request
from services.runtime.errors import ArenaError
from services.runtime.rpc_errors import to_rpc_status
from tiltyard.inference.v2 import inference_pb2 as pb

SERVICE = "inference.GRPCInferenceService"

# Batches read ahead of the one that runs; the client's window is of the same size.
_DEPTH = 4
# One stream has one thread; the others answer what is asked beside it.
_CALLS = 4
# Large windows and frames: over a Unix socket nothing is gained by asking for a megabyte in small pieces.
_FRAME_BYTES = 4 * 1024 * 1024

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Lane:
    """Serves `models` on a private Unix socket, `cores` batches at a time.

    Each batch runs on one core: several cores on one batch would wait for each other at every layer, and the longer the
    more there is to do beside. So torch itself is to use one thread.
    """

    def __init__(self, socket: str, models: Models, *, cores: int) -> None:
        self._models = models
        self._runner = ThreadPoolExecutor(max_workers=cores, thread_name_prefix="inference")
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=_CALLS, thread_name_prefix="calls"),
            handlers=[grpc.method_handlers_generic_handler(SERVICE, self._methods())],
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.http2.max_frame_size", _FRAME_BYTES),
                ("grpc.http2.lookahead_bytes", _FRAME_BYTES),
            ],
            maximum_concurrent_rpcs=2 * _CALLS,
        )
        self._server.add_insecure_port(f"unix:{socket}")

    def serve(self) -> None:
        """Answer calls until the process ends."""
        self._server.start()

    def wait(self) -> None:
        """Block until the server stops, which it does with the process."""
        self._server.wait_for_termination()

    def _methods(self) -> dict[str, Any]:
        def plain(behaviour: Callable[[Any], Any], request: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                _answering(behaviour), request.FromString, lambda answer: answer.SerializeToString()
            )

        return {
            "ServerLive": plain(lambda _: pb.ServerLiveResponse(live=True), pb.ServerLiveRequest),
            "ServerReady": plain(lambda _: pb.ServerReadyResponse(ready=True), pb.ServerReadyRequest),
            "ModelReady": plain(
                lambda request: pb.ModelReadyResponse(ready=self._models.ready(request.name)), pb.ModelReadyRequest
            ),
            "ModelMetadata": plain(
                lambda request: convert.model_metadata(request.name, self._models.spec(request.name, request.version)),
                pb.ModelMetadataRequest,
            ),
            "ModelInfer": grpc.unary_unary_rpc_method_handler(
                _answering(lambda request: self._runner.submit(self._infer, request).result()), parse_request, None
            ),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream, parse_request, None),
        }

    def _infer(self, request: RawRequest) -> bytes:
        head, tensor = self._run(request)
        return encode_response(head, tensor)

    def _stream(self, requests: Iterator[RawRequest], _context: grpc.ServicerContext) -> Iterator[bytes]:
        return in_order(requests, lambda request: self._runner.submit(self._stream_answer, request))

    def _stream_answer(self, request: RawRequest) -> bytes:
        # The protocol answers a wrong request inside the stream.
        try:
            head, tensor = self._run(request)
        except ArenaError as error:
            return convert.stream_error(request.message, error).SerializeToString()
        return encode_stream_response(head, tensor)

    def _run(self, request: RawRequest) -> tuple[pb.ModelInferResponse, memoryview | bytes]:
        message = request.message
        logits = self._models.run(message.model_name, message.model_version, convert.batch_of(message, request.raw))
        return convert.response_head(message, logits), logits.data


def in_order(
    requests: Iterator[Request], begin: Callable[[Request], "Future[Answer]"], *, depth: int = _DEPTH
) -> Iterator[Answer]:
    """Yield the result of `begin(request)` for each request in order, with at most `depth` begun ahead.

    An error of the stream or of a result comes out at its place.
    """
    begun: queue.Queue[Future[Answer] | BaseException | None] = queue.Queue(depth)

    def read() -> None:
        try:
            for request in requests:
                begun.put(begin(request))
        except Exception as error:
            begun.put(error)
        else:
            begun.put(None)

    # A daemon: when the caller goes away in the middle nobody empties the queue, and the process is about to end.
    Thread(target=read, name="requests", daemon=True).start()
    while (next_one := begun.get()) is not None:
        if isinstance(next_one, BaseException):
            raise next_one
        yield next_one.result()


def _answering(behaviour: Callable[[Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    """`behaviour` with the domain's errors answered by their status."""

    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return behaviour(request)
        except ArenaError as error:
            status = to_rpc_status(error)
            context.set_trailing_metadata(status.trailing_metadata)
            context.abort(status.code, status.message)

    return answer
